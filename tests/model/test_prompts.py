"""Vision-semantic prompt fusion: residuals, cross-attention, compensation, and the network around them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine import config
from engine.errors import UserError
from engine.model import text, vit
from engine.model.prompts import Concat, CrossAttention, GatedResidual, PromptNetwork, Vspf
from engine.model.text import TextTransformer

SETTINGS = config.Model(backbone="vit_small", weights="none")
WIDTH = vit.SHAPES["vit_small"].width
FULL = {"keys": "tokens", "text_layers": 2}


def network(**switches) -> PromptNetwork:
    torch.manual_seed(0)
    made = PromptNetwork(SETTINGS, (32, 16), Vspf(**{**FULL, **switches}))
    for name, value in made.named_parameters():
        if name.endswith(("value.weight", "mix.weight")):
            torch.nn.init.normal_(value, std=0.1)  # as training leaves it
    return made


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 16, generator=torch.Generator().manual_seed(seed))


def captions(count: int = 3, first: int = 10) -> torch.Tensor:
    rows = torch.arange(first, first + 4 * count).view(count, 4)
    return torch.cat([torch.zeros(count, 1, dtype=torch.int64), rows, torch.ones(count, 1, dtype=torch.int64)], dim=1)


def test_the_gate_scales_what_is_added_to_every_token():
    layer = GatedResidual(2, 3)
    torch.nn.init.zeros_(layer.gate.weight)  # sigmoid(0) = .5
    x, projected = torch.randn(2, 5, 3), torch.randn(2, 3)
    torch.testing.assert_close(layer(x, torch.randn(2, 2), projected), x + 0.5 * projected.unsqueeze(1))


def test_cross_attention_to_one_key_is_an_addition_and_to_several_is_not():
    """Decision B: the softmax over one key is 1, so that all tokens get the same."""
    layer = CrossAttention(6, 8)
    torch.nn.init.normal_(layer.value.weight)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    one = torch.tensor([[True, False, False]] * 2)
    torch.testing.assert_close(layer(x, text, one), x + layer.value(text[:, :1]))
    added = layer(x, text, torch.ones(2, 3, dtype=torch.bool)) - x
    assert not torch.allclose(added[:, 0], added[:, 1], atol=1e-3)


def test_cross_attention_is_four_heads_of_equation_six():
    layer = CrossAttention(6, 8)
    torch.nn.init.normal_(layer.value.weight)
    x, text = torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    query, key, value = layer.query(x)[0], layer.key(text)[0], layer.value(text)[0]
    heads = [slice(2 * i, 2 * i + 2) for i in range(4)]
    found = [(query[:, h] @ key[:, h].T / 2**0.5).softmax(1) @ value[:, h] for h in heads]
    torch.testing.assert_close(layer(x, text, torch.ones(1, 3, dtype=torch.bool))[0], x[0] + torch.cat(found, dim=1))


def test_concatenation_adds_a_linear_layer_of_token_and_text():
    layer = Concat(6, 8)
    torch.nn.init.normal_(layer.mix.weight)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 6)
    expected = x[:, 2] + torch.cat([x[:, 2], text], dim=1) @ layer.mix.weight.T
    torch.testing.assert_close(layer(x, text)[:, 2], expected)


@pytest.mark.parametrize(
    ("switches", "taps"),
    [
        ({}, {0, 1, 2, 3}),
        ({"blocks": "last"}, {3}),
        ({"residual": False}, {2, 3}),
        ({"mixing": "concat"}, {0, 1, 2, 3}),
        ({"keys": "vector"}, {0, 1, 2, 3}),
    ],
)
def test_text_comes_in_at_the_blocks_that_are_asked_for(switches, taps):
    net = network(**switches)
    seen = net.prompts.encoder(captions())
    x = torch.randn(3, 9, WIDTH)
    assert {tap for tap in range(4) if not torch.equal(net.prompts.inject(x, tap, seen), x)} == taps


def test_keys_as_printed_add_the_same_to_every_token():
    net = network(keys="vector")
    x, seen = torch.randn(3, 9, WIDTH), net.prompts.encoder(captions())
    added = net.prompts.inject(x, 3, seen) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(added))


def test_features_are_unit_rows_visible_ones_first_and_images_alone_decide_without_text():
    net = network().eval()
    output = net(vis=images(seed=1), ir=images(seed=2))
    torch.testing.assert_close(output.features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(output.features[3:], net(ir=images(seed=2)).features)
    assert output.content is None and torch.equal(output.fused, output.features)
    assert output.classes.shape == (4, 6, WIDTH)
    read = net(vis=images(seed=1), vis_text=captions())
    assert not torch.allclose(read.features, output.features[:3], atol=1e-3)
    off = network(enabled=False)(vis=images(seed=1), vis_text=captions())
    assert off.content is None and torch.equal(off.fused, off.features)


def test_infrared_features_are_compensated_by_the_difference_of_paired_captions():
    net = network().eval()
    paired = torch.tensor([True, False, True])
    texts = {"vis_text": captions(), "ir_text": torch.cat([captions()[:2], captions(1, 100)])}
    output = net(vis=images(seed=1), ir=images(seed=2), **texts, paired=paired)
    assert torch.equal(output.fused[:3], output.features[:3])  # decision A
    torch.testing.assert_close(output.fused[3:5], output.features[3:5])  # equal captions; no pair
    assert not torch.allclose(output.fused[5], output.features[5], atol=1e-3)
    vis, ir = output.content.chunk(2)
    difference = (vis - ir)[2:]
    levels = net.prompts.levels.softmax(0)
    said = [net.prompts.project(net.prompts.encoder(text[2:]).vectors) for text in texts.values()]
    torch.testing.assert_close(difference, sum(levels[k] * (said[0][k] - said[1][k]) for k in range(3)))
    hidden = F.gelu(difference @ net.prompts.compensate[0].weight.T) @ net.prompts.compensate[2].weight.T
    shift = F.layer_norm(hidden, (WIDTH,)) / WIDTH**0.5
    expected = F.normalize(output.features[5:] + 0.1 * shift)
    torch.testing.assert_close(output.fused[5:], expected)
    assert torch.equal(
        (plain := network(compensation=False)(vis=images(), ir=images(), **texts, paired=paired)).fused, plain.features
    )


def test_captions_of_different_lengths_share_a_batch():
    net = network().eval()
    long = torch.cat([captions(), torch.full((3, 2), -1)], dim=1)
    first = net(vis=images(seed=1), ir=images(seed=2), vis_text=captions(), ir_text=long).features
    other = net(vis=images(seed=1), ir=images(seed=2), vis_text=long, ir_text=captions()).features
    torch.testing.assert_close(first, other)


def test_everything_that_is_used_has_a_gradient_and_the_frozen_text_layers_have_none():
    net = network()
    texts = {"vis_text": captions(), "ir_text": captions(first=30)}
    net(vis=images(seed=1), ir=images(seed=2), **texts, paired=torch.ones(3, dtype=torch.bool)).fused[
        :, 0
    ].sum().backward()
    moved = {name for name, value in net.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    learning = {name for name, value in net.named_parameters() if value.requires_grad}
    assert learning - moved == set()
    assert not any(name.startswith("prompts.encoder.layers.0.") for name in learning)


def test_text_layers_beyond_those_there_are_let_the_whole_encoder_learn():
    for layers, frozen in ((0, 3), (2, 1), (3, 0), (4, 0)):
        encoder = TextTransformer(text.SHAPES["vit_small"], 8, layers)
        silent = {
            name.split(".")[1]
            for name, value in encoder.named_parameters()
            if not value.requires_grad and "layers" in name
        }
        assert len(silent) == frozen
        assert encoder.prefix.requires_grad
        assert encoder.token_embedding.weight.requires_grad == (layers > 3)


def test_layers_are_counted_from_the_features_down():
    net = network()
    above = {name: net.layers_above(name) for name in net.state_dict()}
    assert above["head.weight"] == above["prompts.project.weight"] == above["vision.post_norm.weight"] == 0
    assert above["vision.layers.3.mlp.fc1.weight"] == 1 and above["vision.layers.0.mlp.fc1.weight"] == 4
    assert above["vision.patch_embedding.0.weight"] == above["vision.class_embedding"] == 5


def test_a_convolutional_backbone_is_refused():
    with pytest.raises(UserError, match="model.backbone: firm needs one of vit_b16, vit_small, got small"):
        PromptNetwork(config.Model(backbone="small", weights="none"), (32, 16), Vspf(**FULL))
