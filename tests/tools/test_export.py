"""Exported networks give the features of the run, for any number of images, or are not kept."""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from small_runs import FIRM, write_run

from engine import export, index, trained
from engine.data import folder
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*trained with captions"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def needs_onnx() -> None:
    for name in export.PACKAGES:
        pytest.importorskip(name, reason=f"{name} is an extra: pip install -e '.[export]'")


@pytest.fixture(scope="module")
def run(sysu_tree, tmp_path_factory):
    return write_run(sysu_tree, tmp_path_factory.mktemp("run"), 0)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Seven images as a user prepares them, and their paths."""
    root = trees.build_folder(tmp_path_factory.mktemp("footage"), identities=(1, 7), images=1)
    paths = sorted((root / "query").iterdir())
    size = (24, 48)
    return np.stack([np.asarray(Image.open(path).resize(size, Image.Resampling.LANCZOS)) for path in paths]), paths


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        assert runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]() == 0
        return capsys.readouterr().out

    return call


def run_file(path: Path, **images: np.ndarray) -> list[np.ndarray]:
    if path.suffix == ".pt2":
        loaded = torch.export.load(str(path)).module()
        return [rows.numpy() for rows in loaded(*map(torch.from_numpy, images.values()))]
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).run(None, images)


@pytest.mark.parametrize("kind", export.SUFFIXES)
def test_a_file_of_both_modalities_gives_the_features_of_the_run(run, pixels, tool, tmp_path, kind):
    if kind == "onnx":
        needs_onnx()
    out = tmp_path / f"network{export.SUFFIXES[kind]}"
    told = tool(run, "--format", kind, "--modality", "both", "--out", out)
    assert "vis            uint8    ['batch', 48, 24, 3]" in told and "features differ from PyTorch's by" in told
    network = trained.load(run / "last.pt")
    images, paths = pixels
    expected = [index.make(network, folder.gather(paths), side).features.numpy() for side in ("vis", "ir")]
    for vis, ir in ((7, 7), (1, 5), (4, 1)):
        found = run_file(out, vis=images[:vis], ir=images[:ir])
        for rows, whole, count in zip(found, expected, (vis, ir), strict=True):
            np.testing.assert_allclose(rows, whole[:count], atol=1e-4)
    about = json.loads(Path(f"{out}.json").read_text())
    assert about["inputs"]["ir"]["shape"] == ["batch", 48, 24, 3] and about["inputs"]["ir"]["channels"] == "RGB"
    assert about["outputs"]["vis_features"] == {"shape": ["batch", 128], "type": "float32", "unit_length": True}
    assert about["done_inside"]["mirror"] is True and about["done_inside"]["mean"] == [0.485, 0.456, 0.406]
    assert about["checkpoint"] == network.digest and about["largest_difference_from_pytorch"] <= export.TOLERANCE
    assert sorted(tmp_path.iterdir()) == [out, Path(f"{out}.json")]


@pytest.mark.parametrize("kind", export.SUFFIXES)
def test_images_alone_go_through_a_network_that_reads_captions(sysu_tree, pixels, tmp_path, kind):
    if kind == "onnx":
        needs_onnx()
    network = trained.load(write_run(sysu_tree, tmp_path / "run", 0, *FIRM) / "last.pt")
    images, paths = pixels
    expected = index.make(network, folder.gather(paths), "ir", mirror=False).features.numpy()
    out = tmp_path / f"network{export.SUFFIXES[kind]}"
    about = export.export(network, out, kind, ("ir",), mirror=False)
    assert about["done_inside"]["mirror"] is False and list(about["inputs"]) == ["ir"]
    for count in (7, 1):
        np.testing.assert_allclose(run_file(out, ir=images[:count])[0], expected[:count], atol=1e-4)


def test_a_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    def write(module, images, modalities, path):
        path.write_bytes(b"a network")
        return lambda *batches: [rows.numpy() + 0.01 for rows in module(*map(torch.from_numpy, batches))]

    monkeypatch.setattr(export, "_write_torch", write)
    network = trained.load(run / "last.pt")
    with pytest.raises(UserError, match=r"not kept: its features differ from PyTorch's by 1\.0e-02, more than 1e-04"):
        export.export(network, tmp_path / "network.pt2", "torch", ("vis",))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_left(run, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"network\.pt2: cannot be written \(.*No space left on device\); make room"):
        export.export(trained.load(run / "last.pt"), tmp_path / "network.pt2", "torch", ("vis",))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(run, tmp_path, monkeypatch):
    network = trained.load(run / "last.pt")
    with pytest.raises(UserError, match=r"expected a name that ends in \.onnx for --format onnx"):
        export.export(network, tmp_path / "network.pt2", "onnx", ("vis",))
    with pytest.raises(UserError, match="there is no folder"):
        export.export(network, tmp_path / "none" / "network.pt2", "torch", ("vis",))
    monkeypatch.setattr(export, "PACKAGES", ("no-such-package",))
    with pytest.raises(
        UserError, match=r'needs no-such-package, not installed; run: pip install "vireid-engine\[export\]"'
    ):
        export.export(network, tmp_path / "network.onnx", "onnx", ("vis",))

    def fail(*_, **__):
        raise RuntimeError("no such operator\nat length")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match=r"this network cannot be exported \(RuntimeError: no such operator\)"):
        export.export(network, tmp_path / "network.pt2", "torch", ("vis",))
    assert list(tmp_path.iterdir()) == []
