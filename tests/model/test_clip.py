"""The encoders of images and texts: shapes, tokens, CLIP's weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine import config
from engine.errors import UserError
from engine.model import clip, text, vit
from engine.model.text import START, TextTransformer, encode, hashed_words
from engine.model.vit import VisionTransformer, interpolate

TINY = vit.Shape(16, 4, 2, 8, (1, 2, 3, 4))
WORDS = text.Shape(8, 3, 2, 50, 20)


def same(x, tap):
    return x


def test_an_image_becomes_a_class_token_and_a_token_per_patch_at_four_blocks():
    network = VisionTransformer(TINY, (32, 16))
    tokens = network(torch.randn(2, 3, 32, 16), same)
    assert [part.shape for part in tokens] == 4 * [(2, 1 + 4 * 2, 16)]
    full = VisionTransformer(vit.SHAPES["vit_b16"], (256, 128))
    assert len(full.position_embedding) == 129 and full.taps == (2, 6, 10, 12)


def test_what_is_injected_goes_on_to_the_next_block():
    network, images = VisionTransformer(TINY, (32, 16)), torch.randn(2, 3, 32, 16)
    plain = network(images, same)
    moved = network(images, lambda x, tap: x + 1 if tap == 1 else x)
    torch.testing.assert_close(moved[0], plain[0])
    torch.testing.assert_close(moved[1], plain[1] + 1)
    assert not torch.allclose(moved[2], plain[2])


def test_positions_of_a_square_grid_are_interpolated_and_the_class_tokens_kept():
    positions = torch.cat([torch.full((1, 2), 7.0), torch.arange(4.0).repeat_interleave(4).unsqueeze(1).expand(16, 2)])
    assert torch.equal(interpolate(positions, (4, 4))[0], positions[0])
    torch.testing.assert_close(interpolate(positions, (4, 4)), positions)
    tall = interpolate(positions, (8, 4))[1:].view(8, 4, 2)
    assert len(interpolate(positions, (8, 4))) == 33
    assert (tall[1:] >= tall[:-1] - 1e-6).all() and torch.allclose(tall[:, :1], tall)


def test_words_have_tokens_of_their_own_whatever_the_other_texts_are():
    tokenize = hashed_words(8192, 77)
    (one,), (first, second) = tokenize(["A red coat."]), tokenize(["a red coat .", "blue"])
    assert one == first and one[0] == START and one[-1] == 1 and len(one) == 6
    assert len(set(one)) == 6 and not set(second[1:-1]) & set(one)
    assert len(hashed_words(8192, 5)(["a b c d e f g"])[0]) == 5


def test_captions_are_padded_behind_and_punctuated():
    tokenize = hashed_words(8192, 77)
    found = encode([["a coat", ""], ["a long red coat", "hat"]], tokenize)
    assert found.shape == (2, 2, 8)
    assert found[0, 0].tolist() == tokenize([": a coat ."])[0] + 2 * [-1]
    assert (found[1, 0] >= 0).sum() == 4


def test_padding_does_not_show_and_no_word_is_missed():
    network = TextTransformer(WORDS, 2, 1).eval()
    row = torch.tensor([[0, 5, 6, 7, 1]])
    seen, padded = network(row), network(torch.cat([row, torch.full((1, 3), -1)], dim=1))
    assert seen.vectors.shape == (3, 1, 8) and seen.tokens.shape == (1, 7, 8) and seen.mask.all()
    assert padded.mask.sum() == 7
    torch.testing.assert_close(padded.vectors, seen.vectors)
    torch.testing.assert_close(padded.tokens[:, :7], seen.tokens)
    for place in (1, 2, 3):
        other = row.clone()
        other[0, place] = 9
        assert not torch.allclose(network(other).vectors[2], seen.vectors[2])


def test_the_prefix_and_the_last_layers_learn_and_nothing_else():
    network = TextTransformer(WORDS, 2, 2)
    learning = {name for name, value in network.named_parameters() if value.requires_grad}
    assert learning == {
        "prefix",
        *(name for name in network.state_dict() if name.startswith(("layers.1.", "layers.2."))),
    }
    assert {name for name, value in TextTransformer(WORDS, 2, 0).named_parameters() if value.requires_grad} == {
        "prefix"
    }


@pytest.fixture
def tiny_clip(monkeypatch):
    monkeypatch.setitem(vit.SHAPES, "vit_b16", TINY)
    monkeypatch.setitem(text.SHAPES, "vit_b16", WORDS)


def test_clips_weights_load_from_a_folder_and_give_its_outputs(tiny_clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "image_size": 32,
        "patch_size": 8,
    } | sizes
    words = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50} | sizes
    words |= {"max_position_embeddings": 20, "eos_token_id": 49, "bos_token_id": 0, "pad_token_id": 49}
    made = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=words)).eval()
    made.save_pretrained(tmp_path / "model")
    own, reader = VisionTransformer(TINY, (32, 32)), TextTransformer(WORDS, 0, 0)
    clip.load(own, reader, config.Model(backbone="vit_b16", weights=str(tmp_path / "model")))
    images, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 6, 49], [0, 9, 3, 49]])
    with torch.no_grad():
        own.scale.fill_(1), own.shift.fill_(0)
        expected = made.vision_model(images, output_hidden_states=True)
        found = own(images, same)
        torch.testing.assert_close(found[1], expected.hidden_states[2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[3][:, 0], expected.pooler_output, atol=1e-5, rtol=1e-5)
        said = made.text_model(tokens)
        torch.testing.assert_close(reader(tokens).tokens, said.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reader(tokens).vectors[2], said.pooler_output, atol=1e-5, rtol=1e-5)
    tall = VisionTransformer(TINY, (64, 32))
    clip.load(tall, reader, config.Model(backbone="vit_b16", weights=str(tmp_path / "model")))
    assert len(tall.position_embedding) == 33
    wide = VisionTransformer(dataclasses.replace(TINY, width=32), (32, 32))
    with pytest.raises(UserError, match="is not CLIP's vit_b16: .* tensors are missing or have another shape"):
        clip.load(wide, reader, config.Model(backbone="vit_b16", weights=str(tmp_path / "model")))


def test_a_missing_model_names_what_to_get_and_where_to_put_it(tiny_clip, tmp_path):
    settings = config.Model(backbone="vit_b16", weights=str(tmp_path / "nothing"))
    remedy = r"pip install \"vireid-engine|model\.safetensors.*into a folder and give it by --set model\.weights=FOLDER"
    for use in (
        lambda: clip.tokenizer(settings, 8),
        lambda: clip.load(VisionTransformer(TINY, (32, 32)), None, settings),
    ):
        with pytest.raises(UserError, match=remedy):
            use()
