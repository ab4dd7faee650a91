"""Captions by tiny models with random weights, of the classes that real ones have."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trees

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import caption

from engine import config, data
from engine.data import captions
from engine.errors import UserError

VOCABULARY = "a person with red green blue dark light short long hair wearing coat shirt skirt trousers shoes and bag"
WORDS = VOCABULARY.split()


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption, "DESCRIPTION_TOKENS", 8)
    monkeypatch.setattr(caption, "PARAPHRASE_TOKENS", 8)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def blip(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join(special + WORDS))
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            text_config={
                **size,
                **ids,
                "vocab_size": len(tokenizer),
                "encoder_hidden_size": 16,
                "initializer_range": 1.0,
            },
            vision_config={**size, "image_size": 32, "patch_size": 8, "initializer_range": 1.0},
            projection_dim=16,
        )
    )
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "<unk>", *WORDS])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "initializer_range": 1.0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **size, **ids)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    return trees.build_folder(tmp_path / "footage", identities=(2, 1), images=2)


def call(root: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    command = ["caption.py", "--cfg", "folder", "--set", f"data.root={root}", "--device", "cpu", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
    return caption.main()


def texts(root: Path) -> dict[str, dict[str, str]]:
    files = (root / name for name in captions.FILES)
    return {key: entry for file in files for key, entry in json.loads(file.read_text()).items()}


def test_every_image_gets_what_the_models_say_of_it_alone(
    footage: Path, blip: Path, gpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(footage, "--captioner", blip, "--paraphraser", gpt, monkeypatch=monkeypatch) == 0
    assert (
        "captions_vis.json: 6 images, 0 without description, 0 captions without paraphrase" in capsys.readouterr().out
    )
    cpu = torch.device("cpu")
    describe = caption.load_captioner(str(blip), False, cpu, "")
    paraphrase = caption.load_paraphraser(str(gpt), False, cpu)
    written = texts(footage)
    assert len(written) == 12 and len({entry["description"] for entry in written.values()}) > 6
    for key, entry in written.items():
        assert [entry["description"]] == describe([str(footage / key)])
        assert [entry["aug_description"]] == paraphrase([entry["description"]])
        assert set(entry["description"].split()) <= set(WORDS)
    dataset = data.read(config.load("folder", [f"data.root={footage}"]).data)
    assert captions.read(dataset.train, footage).map(len) == dataset.train.map(len)


def test_interrupted_it_goes_on_and_keeps_what_is_there(
    footage: Path, blip: Path, gpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def interrupted(path: str) -> Any:
        opened.append(path)
        if len(opened) == 8:
            raise KeyboardInterrupt
        return open_image(path)

    open_image = caption.open_image
    with monkeypatch.context() as patched:
        patched.setattr(caption, "open_image", interrupted)
        assert call(footage, "--captioner", blip, monkeypatch=patched) == 130
    before = texts(footage)
    assert len(before) == 6  # two batches of three
    own = next(iter(before))
    file = footage / captions.FILES.vis
    file.write_text(json.dumps(before | {own: {"description": "my words", "aug_description": ""}}))
    opened.clear()
    monkeypatch.setattr(caption, "open_image", lambda path: opened.append(path) or open_image(path))
    assert call(footage, "--captioner", blip, monkeypatch=monkeypatch) == 0
    after = texts(footage)
    assert len(after) == 12 and len(opened) == 6
    assert {key: after[key] for key in before} == before | {own: {"description": "my words", "aug_description": ""}}


def test_paraphrases_may_follow_later(
    footage: Path, blip: Path, gpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(footage, "--captioner", blip, monkeypatch=monkeypatch)
    before = texts(footage)
    assert not any(entry["aug_description"] for entry in before.values())
    assert ", 0 captions without" not in capsys.readouterr().out
    call(footage, "--paraphraser", gpt, monkeypatch=monkeypatch)
    after = texts(footage)
    assert all(entry["aug_description"] for entry in after.values())
    assert {key: entry["description"] for key, entry in after.items()} == {
        key: entry["description"] for key, entry in before.items()
    }
    call(footage, "--captioner", "none", "--paraphraser", "none", monkeypatch=monkeypatch)  # not even looked for


def test_it_saves_in_between(footage: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    save = captions.save

    def watched(file: Path, root: Path, content: Any) -> None:
        sizes.append(len(content))
        save(file, root, content)

    monkeypatch.setattr(captions, "save", watched)
    monkeypatch.setattr(caption, "SAVE_SECONDS", -1.0)
    call(footage, "--captioner", blip, "--out", footage.parent, monkeypatch=monkeypatch)
    assert sizes == [0, 3, 6, 6] * 2
    assert (footage.parent / captions.FILES.ir).is_file()


def test_a_prompt_begins_every_description(footage: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(footage, "--captioner", blip, "--prompt", "a person wearing", monkeypatch=monkeypatch)
    assert all(entry["description"].startswith("a person wearing") for entry in texts(footage).values())


def test_chat_models_are_asked_in_their_own_form(transformers: Any, gpt: Path, tmp_path: Path) -> None:
    template = "{% for turn in messages %}{{ turn['content'] }} <end> {% endfor %}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    write = [caption.load_paraphraser(str(folder), False, torch.device("cpu")) for folder in (gpt, tmp_path)]
    asked = [" ".join(each(["a person with red hair"])) for each in write]
    assert asked[0] != asked[1]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" a man in a coat\nSentence: another", "a man in a coat"),
        ('Here it is:\n\n  "A man  in a coat."\nAnything else?', "A man in a coat."),
        ("\n \n", ""),
    ],
)
def test_answers_are_cut_to_their_sentence(answer: str, expected: str) -> None:
    assert caption.sentence(answer) == expected


def test_a_missing_model_is_named_with_what_to_fetch(
    footage: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--captioner: 12 images have no description yet.*hf download Salesforce/blip"):
        call(footage, monkeypatch=monkeypatch)
    missing = footage / "models" / "blip"
    with pytest.raises(UserError, match=rf"{missing}: no such folder .*hf download Salesforce/blip"):
        call(footage, "--captioner", missing, monkeypatch=monkeypatch)
    captions.save(footage / captions.FILES.vis, footage, {str(footage / "visible/day0/1_0.png"): ("a person", "")})
    missing.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{missing}: damaged, or another kind of model .*hf download Qwen"):
        caption.load_paraphraser(str(missing), False, torch.device("cpu"))


def test_a_model_of_another_kind_or_without_all_weights_is_refused(
    transformers: Any, footage: Path, gpt: Path, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match=r"another kind of model .*--captioner takes BLIP"):
        call(footage, "--captioner", gpt, monkeypatch=monkeypatch)
    part = tmp_path / "part"
    part.mkdir()
    for file in blip.iterdir():
        if file.suffix != ".safetensors":
            os.link(file, part / file.name)
    weights = load_file(blip / "model.safetensors")
    gone = weights.popitem()[0]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 weights are missing, such as {gone}"):
        call(footage, "--captioner", part, monkeypatch=monkeypatch)
    (part / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged, or another kind"):
        call(footage, "--captioner", part, monkeypatch=monkeypatch)


def test_a_damaged_image_is_named_and_the_others_kept(
    footage: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = footage / "infrared" / "day0" / "1_0.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"{broken} cannot be read .*archive"):
        call(footage, "--captioner", blip, monkeypatch=monkeypatch)
    assert len(texts(footage)) == 6


def test_a_folder_that_cannot_be_written_to_shows_before_the_work(
    footage: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "open_image", None)
    with pytest.raises(UserError, match="cannot be written"):
        call(footage, "--captioner", blip, "--out", footage / "nowhere", monkeypatch=monkeypatch)


def test_without_transformers_it_says_what_to_install(footage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "vireid-engine\[firm\]"'):
        call(footage, "--captioner", "models/blip", monkeypatch=monkeypatch)


@pytest.mark.parametrize(("option", "message"), [("--batch=0", "at least 1"), ("--device=tpu9", "cannot be used")])
def test_wrong_options_are_refused(
    option: str, message: str, footage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, UserError)) as error:
        call(footage, option, monkeypatch=monkeypatch)
    assert message in capsys.readouterr().err + str(error.value)
