"""A data set is checked and decoded: counts, unreadable images, captions, exit codes; nothing else is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trees
from small_runs import write_captions, write_settings

from engine.data import cache, regdb
from engine.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The tool's exit code for a tree and settings; its cache is tmp_path/cache."""

    def run(root, *overrides):
        file = write_settings(root, tmp_path / "cache", tmp_path / "own.yaml")
        changes = [part for one in overrides for part in ("--set", one)]
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--cfg", str(file), *changes])
        return prepare.main()

    return run


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_differs_from_the_official_counts_is_named_and_images_are_decoded(sysu_tree, call, tmp_path, capsys):
    before = content(sysu_tree)
    assert call(sysu_tree) == 1
    out = capsys.readouterr().out
    assert content(sysu_tree) == before
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert rows[0] == ["", "found", "official", ""]
    assert ["visible training images", "64", "22,258", "differs"] in rows and [
        "all multi-shot gallery",
        "32",
        "",
        "",
    ] in rows
    assert "visible training images: 64 instead of 22,258" in out and "can be trained on: python tools/train.py" in out
    assert "decoded: 16 infrared test images, 0.1 MB in" in out and "captions" not in out
    files = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert files == ["infrared-test", "infrared-training", "visible-test", "visible-training"]


def test_training_finds_what_was_decoded(sysu_tree, call, monkeypatch):
    call(sysu_tree)
    monkeypatch.setattr(cache, "decode_blocks", None)
    assert call(sysu_tree) == 1


def test_a_complete_data_set_is_said_to_be(regdb_tree, call, monkeypatch, capsys):
    counts = {name: 6 if name.startswith("training id") else 4 for name in ("training identities", "test identities")}
    monkeypatch.setattr(regdb, "OFFICIAL", counts)
    assert call(regdb_tree, "data.name=regdb") == 0
    out = capsys.readouterr().out
    assert "differs" not in out and "\nready: python tools/train.py --cfg " in out and "--set data.name=regdb" in out


def test_own_footage_has_no_official_counts(folder_tree, call, capsys):
    assert call(folder_tree, "data.name=folder") == 0
    out = capsys.readouterr().out
    assert "| visible training images  |    24 |" in out and "ready" in out


def test_several_data_sets_are_counted_apart(sysu_tree, regdb_tree, call, capsys):
    assert call(sysu_tree, f"data.also=[{{name: regdb, root: {regdb_tree}}}]") == 1
    out = capsys.readouterr().out
    assert "SYSU-MM01: training identities" in out and "RegDB split 1: test visible images" in out


def test_every_image_that_cannot_be_read_is_named(tmp_path, call, capsys):
    root = trees.build_folder(tmp_path / "footage")
    bad = [*sorted((root / "visible").rglob("*.png"))[:7], *sorted((root / "query").iterdir())[:1]]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="8 images cannot be read"):
        call(root, "data.name=folder")
    out = capsys.readouterr().out
    assert all(f"  {path}: " in out for path in bad) and "decoded: 24 infrared training images" in out


def test_what_is_missing_is_named(tmp_path, call):
    root = trees.build_regdb(tmp_path / "regdb")
    for path in sorted((root / "Thermal" / "1").iterdir())[:2]:
        path.unlink()
    with pytest.raises(UserError, match=r"2 \(.*front_ir_000_0001\.bmp, .*\) of the 18 images"):
        call(root, "data.name=regdb")


def test_captions_are_counted_and_missing_ones_named(tmp_path, call, capsys):
    root = trees.build_sysu(tmp_path / "sysu", images=1)
    write_captions(root, root)
    call(root)
    out = capsys.readouterr().out
    assert "captions: 32 of 32 visible training images (captions_vis.json)" in out and "no caption" not in out
    texts = json.loads((root / "captions_ir.json").read_text())
    name = next(name for name in texts if name.startswith("cam3"))
    del texts[name]["aug_description"]
    (root / "captions_ir.json").write_text(json.dumps(texts))
    call(root)
    out = capsys.readouterr().out
    assert (
        "captions: 15 of 16 infrared training images" in out
        and f"no caption or no paraphrase of 1 ({root / name})" in out
    )


def test_a_method_that_reads_captions_misses_them(folder_tree, call, capsys):
    firm = ("method.name=firm", "augment.channels=false", "model.backbone=vit_small")
    with pytest.raises(UserError, match="firm cannot be trained without these captions"):
        call(folder_tree, "data.name=folder", *firm, "firm.missing_caption=empty")  # there is no file at all
    out = capsys.readouterr().out
    assert out.count("not there, and firm reads captions; see python tools/caption.py --help") == 2
    assert "decoded: " in out and "can be trained on" not in out
    assert call(folder_tree, "data.name=folder", *firm, "firm.vspf.enabled=false") == 1


def test_missing_captions_are_refused_where_training_refuses_them(tmp_path, call):
    firm = ("method.name=firm", "augment.channels=false", "model.backbone=vit_small")
    root = trees.build_sysu(tmp_path / "sysu", images=1)
    write_captions(root, root)
    assert call(root, *firm) == 1
    texts = json.loads((root / "captions_ir.json").read_text())
    del texts[next(name for name in texts if name.startswith("cam3"))]
    (root / "captions_ir.json").write_text(json.dumps(texts))
    with pytest.raises(UserError, match=r"set firm\.missing_caption to 'empty'"):
        call(root, *firm)
    assert call(root, *firm, "firm.missing_caption=empty") == 1
