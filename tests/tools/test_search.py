"""Features of folders, and searching in them, by the command lines and below."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from small_runs import FIRM, write_run
from torch.nn import functional as F

from engine import data, index, search, trained
from engine.data import folder
from engine.data.dataset import Images
from engine.errors import UserError
from engine.evaluate import decode, evaluate_network
from engine.features import extract
from engine.index import Index
from engine.pair import Pair
from engine.rerank import Cmfp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set")


@pytest.fixture(scope="module")
def run(sysu_tree, tmp_path_factory):
    return write_run(sysu_tree, tmp_path_factory.mktemp("run"), 0)


@pytest.fixture(scope="module")
def network(run):
    return trained.load(run / "last.pt")


@pytest.fixture
def footage(tmp_path):
    return trees.build_folder(tmp_path / "footage", identities=(1, 3), images=3)


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        assert runpy.run_path(str(ROOT / "tools" / name))["main"]() == 0
        return capsys.readouterr().out

    return call


def unit(rows: torch.Tensor, ids: list[int], cams: list[int]) -> Index:
    images = Images(tuple(f"/nowhere/{i}.png" for i in range(len(ids))), np.array(ids), np.array(cams))
    return Index(F.normalize(rows), images, dict.fromkeys(index.NEEDED))


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_file_holds_the_features_that_the_evaluation_sees(run, network, footage, tool, tmp_path, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    out = tmp_path / f"features.{ending}"
    assert "9 images, 128 dimensions" in tool("extract.py", run, footage / "query", "--modality", "ir", "--out", out)
    found = index.load(out)
    names = sorted((footage / "query").iterdir())
    assert list(found.images.paths) == [str(path) for path in names]
    assert found.images.ids.tolist() == [int(path.name[:4]) for path in names]
    assert found.images.cams.tolist() == [int(path.name[6]) for path in names]
    pixels = np.stack([np.asarray(Image.open(path).resize((24, 48), Image.Resampling.LANCZOS)) for path in names])
    expected = extract(network.network, Pair(pixels, pixels), network.config, network.device, mirror=True).whole.ir
    assert torch.equal(found.features, expected)
    torch.testing.assert_close(found.features.norm(dim=1), torch.ones(9))
    about = found.about
    assert about["checkpoint"] == hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
    assert about["preprocessing"]["size"] == [48, 24] and about["skipped"] == {}
    assert about["modality"] == "ir" and about["mirror"] is True
    first = out.read_bytes()
    tool("extract.py", run, footage / "query", "--modality", "ir", "--out", out)
    assert out.read_bytes() == first
    tool("extract.py", run, footage / "query", "--modality", "ir", "--out", out, "--batch", 4, "--no-mirror")
    alone = extract(network.network, Pair(pixels, pixels), network.config, network.device).whole.ir
    torch.testing.assert_close(index.load(out).features, alone, atol=1e-6, rtol=0)


def test_blocks_and_unreadable_images_do_not_shift_rows(network, footage, monkeypatch):
    images = folder.gather([footage / "query"])
    whole = index.make(network, images, "ir")
    monkeypatch.setattr(index.cache, "BLOCK", 2)
    Path(images.paths[4]).write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"unreadable and left out: 1 \(.*: cannot identify image file"):
        found = index.make(network, images, "ir", batch=1)
    kept = [row for row in range(9) if row != 4]
    torch.testing.assert_close(found.features, whole.features[kept], atol=1e-6, rtol=0)
    assert found.images.paths == tuple(images.paths[row] for row in kept)
    assert found.images.ids.tolist() == images.ids[kept].tolist()
    assert list(found.about["skipped"]) == [images.paths[4]]
    with pytest.raises(UserError, match=r"cannot read 1 \(.* of 9 images; replace or remove them"):
        index.make(network, images, "ir", strict=True)
    small = replace(network, config=replace(network.config, data=replace(network.config.data, max_pixels=48 * 24 - 1)))
    with pytest.raises(UserError, match="none of the 9 images can be read"):
        index.make(small, images, "ir")
    for path in images.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 9 queries can be read: 9 \(.*is empty"):
        index.make(network, images, "ir", label="queries")


def test_places_are_folders_images_and_lists(footage, tmp_path):
    first, second = (footage / "query" / f"0002_c{camera}_000{camera - 3}.jpg" for camera in (3, 4))
    (tmp_path / "list.txt").write_text(f"{first}\t77\t5\n\nfootage/query/{second.name}\n")
    images = folder.gather([second, tmp_path / "list.txt", footage / "infrared"])
    assert images.paths[:3] == (str(second), str(first), str(second)) and len(images) == 3 + 3
    assert images.ids[:3].tolist() == [2, 77, 2] and images.cams[:3].tolist() == [4, 5, 4]
    assert set(images.ids[3:]) == {-1} and list(images.paths[3:]) == sorted(images.paths[3:])
    (tmp_path / "bad.txt").write_text(f"{first}\tseven\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 1, .*path<tab>identity<tab>camera"):
        folder.gather([tmp_path / "bad.txt"])
    (tmp_path / "person.gif").write_bytes(b"GIF89a\xff")
    with pytest.raises(UserError, match=r"person\.gif cannot be read .*: expected an image \(\.jpg, .*\), or lines"):
        folder.gather([tmp_path / "person.gif"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        folder.gather([tmp_path / "empty"])
    with pytest.raises(UserError, match="nothing.png not found: expected an image, a folder of images, or a list"):
        folder.gather([tmp_path / "nothing.png"])


def test_a_batch_too_large_for_the_device_is_named(network, footage, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(index, "extract_one", full)
    with pytest.raises(UserError, match="--batch 64: too many images at once for the memory of cpu"):
        index.make(network, folder.gather([footage / "query"]), "ir")
    with pytest.raises(UserError, match="--batch: expected at least 1, got -1"):
        index.make(network, folder.gather([footage / "query"]), "ir", batch=-1)


def test_files_that_are_no_features_are_refused(network, tmp_path):
    good = unit(torch.eye(3), [1, 2, 3], [1, 1, 1])
    path = tmp_path / "features.npz"
    index.save(path, good)
    with np.load(path) as file:
        columns = dict(file)
    cases = [
        ({"ids": np.zeros(2, np.int64)}, "damaged: its columns have different lengths"),
        ({"features": np.zeros((0, 3), np.float32)}, r"expected features \[N, D\] with N > 0"),
        ({"features": np.array([None], object)}, "not a file of features"),
        ({"features": np.full((3, 3), np.nan, np.float32)}, "damaged: features that are NaN or infinite"),
        ({"about": np.array("[")}, "not a file of features"),
        ({"about": np.array("{}")}, "its 'about' lacks some of checkpoint, images, mirror"),
    ]
    for change, message in cases:
        np.savez(path, **(columns | change))
        with pytest.raises(UserError, match=message):
            index.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a file of features"):
        index.load(path)
    with pytest.raises(UserError, match=r"none\.npz: no such file; python tools/extract\.py makes it"):
        index.load(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"ends in \.npz or \.safetensors"):
        index.save(tmp_path / "features.bin", good)
    with pytest.raises(UserError, match="there is no folder"):
        index.save(tmp_path / "none" / "features.npz", good)


def test_names_of_any_bytes_survive(tmp_path):
    pytest.importorskip("safetensors")
    strange = Index(
        torch.eye(2),
        Images(("/a/\udcff.png", "/a/ä\n.png"), np.array([1, -1]), np.array([2, -1])),
        dict.fromkeys(index.NEEDED),
    )
    for ending in index.SUFFIXES:
        index.save(tmp_path / f"file{ending}", strange)
        assert index.load(tmp_path / f"file{ending}").images.paths == strange.images.paths
    assert search.names(strange.images) == ["?.png", "ä?.png"]


def test_without_safetensors_the_other_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match=r'pip install "vireid-engine\[search\]", or choose \.npz'):
        index.save(tmp_path / "features.safetensors", unit(torch.eye(2), [1, 2], [1, 1]))


def write_list(images: Images, rows: np.ndarray, path: Path) -> Path:
    path.write_text("".join(f"{images.paths[row]}\t{images.ids[row]}\t{images.cams[row]}\n" for row in rows))
    return path


@pytest.mark.parametrize(("rerank", "number"), [(None, 0), ("cmfp:3", -1)])
def test_the_right_person_comes_first_at_the_rate_that_the_evaluation_reports(
    run, network, tool, tmp_path, rerank, number
):
    config, dataset = network.config, data.read(network.config.data)
    rerankers = [config.evaluate.rerank.parse(rerank)] if rerank else []
    pixels = decode(dataset.test, config, "test")
    scores = evaluate_network(network.network, dataset, pixels, config, network.device, rerankers)
    protocol = dataset.protocols[number]
    (row,) = (row for row in scores if row.protocol == protocol.name and bool(row.rerank) == bool(rerank))
    right = known = 0
    for trial in protocol.trials:
        queries = write_list(dataset.test.ir, trial.queries, tmp_path / "queries.txt")
        gallery = write_list(dataset.test.vis, trial.gallery, tmp_path / "gallery.txt")
        arguments = ["--query", queries, "--gallery", gallery, "-k", 1, "--rule", protocol.rule]
        arguments += ["--json", tmp_path / "found.json", *(["--rerank", rerank] if rerank else [])]
        out = tool("search.py", run, *arguments)
        assert ("all queries at once" in out) == bool(rerank)
        found = json.loads((tmp_path / "found.json").read_text())
        assert f"% of {found['queries_with_a_match']} queries with a match (R1)" in out
        right, known = right + found["first_right"], known + found["queries_with_a_match"]
    assert known == row.queries and 20 < 100 * right / known < 100
    assert 100 * right / known == pytest.approx(row.values["R1"], abs=1e-9)


def test_matches_are_those_of_all_similarities_but_the_hidden_ones():
    generator = torch.Generator().manual_seed(0)
    ids, cams = [1, 2, 3, 1, 2, 3, -1], [1, 2, 2, 4, 5, 1, 2]
    gallery = unit(torch.randn(7, 8, generator=generator), ids, cams)
    query = unit(torch.randn(4, 8, generator=generator), [1, 2, 9, -1], [3, 2, 3, -1])
    nearest = search.exact(gallery, torch.device("cpu"))
    order = (-(query.features @ gallery.features.T)).argsort(dim=1, stable=True).numpy()
    hidden = {"plain": [set()] * 4, "sysu": [{1, 2, 6}, set(), {1, 2, 6}, set()], "llcm": [set(), {1}, set(), set()]}
    for rule, rows in hidden.items():
        found = search.search(query, gallery, 5, nearest, rule)
        for number, matches in enumerate(found):
            left = [row for row in order[number].tolist() if row not in rows[number]]
            assert matches.rows.tolist() == left[:5]
            expected = query.features[number] @ gallery.features[left[:5]].T
            np.testing.assert_allclose(matches.scores, expected, rtol=1e-5)
    found = search.search(query, gallery, 1, nearest, "llcm")
    right = [int(gallery.images.ids[found[row].rows[0]] == query.images.ids[row]) for row in (0, 1)]
    assert search.first_right(query.images, gallery.images, found, "llcm") == (sum(right), 2)
    again = search.search(query, gallery, 7, search.reranked(gallery, Cmfp(2), torch.device("cpu")))
    distance = Cmfp(2)(query.features, gallery.features)
    assert [matches.rows.tolist() for matches in again] == distance.argsort(dim=1, stable=True).tolist()


def test_what_cannot_be_searched_is_refused():
    gallery, query = unit(torch.eye(3), [1, 2, 3], [1, 1, 1]), unit(torch.eye(2), [1, 2], [1, 1])
    nearest = search.exact(gallery, torch.device("cpu"))
    with pytest.raises(UserError, match="have 2 and 3 dimensions; extract both with one network"):
        search.search(query, gallery, 1, nearest)
    for k in (0, 4):
        with pytest.raises(UserError, match=f"-k {k}: expected 1 to 3, the images of the gallery"):
            search.search(gallery, gallery, k, nearest)


def test_faiss_finds_the_same(tmp_path):
    pytest.importorskip("faiss", reason="FAISS is an extra: pip install -e '.[faiss]'")
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    gallery = unit(rows, [-1] * 400, [-1] * 400)
    query = unit(rows[:5] + 0.01, [-1] * 5, [-1] * 5)
    expected = search.search(query, gallery, 3, search.exact(gallery, torch.device("cpu")))
    file = tmp_path / "gallery.npz"
    for kind, kept in (("flat", 0), ("ivf:4,4", 1), ("ivf:4,4", 1), ("ivf", 2)):
        found = search.search(query, gallery, 3, search.approximate(gallery, kind, file))
        files = list(tmp_path.glob("gallery-ivf*.faiss"))
        assert len(files) == kept
        if kind != "ivf":
            assert [matches.rows.tolist() for matches in found] == [matches.rows.tolist() for matches in expected]
        assert [matches.rows[0] for matches in found] == list(range(5))
    for damaged in files:
        damaged.write_bytes(b"nothing")
    assert search.search(query, gallery, 3, search.approximate(gallery, "ivf:4,4", file))[0].rows[0] == 0


def test_faiss_that_is_absent_or_asked_for_wrongly_is_named(monkeypatch):
    gallery = unit(torch.eye(3), [1, 2, 3], [1, 1, 1])
    for kind in ("hnsw", "flat:3", "ivf:0", "ivf:a", "ivf:1,2,3"):
        with pytest.raises(UserError, match=f"--faiss {kind}: expected flat, ivf"):
            search.approximate(gallery, kind)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r'--faiss: FAISS is not installed; run: pip install "vireid-engine\[faiss\]"'):
        search.approximate(gallery, "flat")


def test_one_command_searches_and_keeps_the_index(run, footage, tool, tmp_path, sysu_tree):
    file, picture = tmp_path / "gallery.npz", tmp_path / "found.png"
    query = sorted((footage / "query").iterdir())[:2]
    common = ["--gallery", footage / "gallery", "--query", *query, "--picture", picture]
    out = tool("search.py", run, *common, "--index", file, "-k", 4)
    assert "2 queries, 9 gallery images; exact, by cosine similarity" in out
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 1 + 2 * 4
    assert Image.open(picture).size == (5 * 112 + 16, 2 * 250 + 8)
    assert file.is_file()
    again = tool("search.py", run, *common, "--index", file, "-k", 4)
    assert again == out == tool("search.py", run, "--query", *query, "--index", file, "-k", 4)
    other = write_run(sysu_tree, tmp_path / "other", 1)
    with pytest.raises(UserError, match="made with another network: its checkpoint is"):
        tool("search.py", other, *common, "--index", file)
    with pytest.raises(UserError, match="made with another network: its preprocessing is"):
        tool("search.py", run, *common, "--index", file, "--set", "data.size=[64, 32]")
    with pytest.raises(UserError, match=r"made otherwise \(vis, with mirror images\)"):
        tool("search.py", run, *common, "--index", file, "--no-mirror")
    with pytest.raises(UserError, match=r"made otherwise \(vis"):
        tool("search.py", run, *common, "--index", file, "--gallery-modality", "ir")
    next((footage / "gallery").iterdir()).unlink()
    with pytest.raises(UserError, match="made of other images than --gallery has now"):
        tool("search.py", run, *common, "--index", file)
    assert "|     8 |" in tool("search.py", run, *common)  # fewer than ten images are all shown


def test_a_full_disk_leaves_the_picture_that_was_there(run, footage, tool, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "found.png").write_bytes(b"an old one")
    monkeypatch.setattr(os, "fsync", full)
    query = next((footage / "query").iterdir())
    with pytest.raises(UserError, match=r"found\.png: cannot be written \(the disk is full"):
        tool("search.py", run, "--query", query, "--gallery", footage / "gallery", "--picture", tmp_path / "found.png")
    assert [path.read_bytes() for path in tmp_path.iterdir() if path.is_file()] == [b"an old one"]


def test_mistakes_of_the_command_line_are_named(run, footage, tool, tmp_path):
    query = next((footage / "query").iterdir())
    (tmp_path / "bad.png").write_bytes(b"nothing")
    gallery = ["--gallery", footage / "gallery"]
    cases = [
        (["--query", query], "--gallery: needed, or --index"),
        (
            ["--query", tmp_path / "bad.png", *gallery],
            r"cannot read 1 \(.*bad.png.*\) of 1 queries; replace or remove them",
        ),
        (["--query", query, *gallery, "-k", 10], "-k 10: expected 1 to 9"),
        (["--query", query, *gallery, "--rerank", "cmfp", "--faiss", "flat"], "leave one of them away"),
        (
            ["--query", query, *gallery, "--picture", tmp_path / "found.what"],
            r"found\.what: expected a name that ends in \.png",
        ),
        (["--query", query, *gallery, "--json", tmp_path / "none" / "found.json"], "there is no folder"),
        (["--query", query, *gallery, "--rerank", "cmpf"], "--rerank cmpf: expected one of"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            tool("search.py", run, *arguments)


def test_a_picture_tells_right_from_wrong_and_survives_lost_images(footage):
    images = folder.gather([footage / "gallery"])
    lost = Images(("/nowhere/x.png", *images.paths[1:]), images.ids, images.cams)
    found = [search.Found(np.array([0, 8]), np.array([0.9, 0.1])), search.Found(np.array([1]), np.array([0.5]))]
    picture = search.sheet(images, lost, found)
    assert picture.size == (3 * 112 + 16, 2 * 250 + 8)
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours  # the frames of right and wrong


def test_images_of_a_network_that_reads_captions_are_described_without(sysu_tree, footage, tmp_path):
    place = write_run(sysu_tree, tmp_path / "firm", 0, *FIRM)
    network = trained.load(place / "last.pt")
    with pytest.warns(UserWarning, match="features are those of the images alone"):
        found = index.make(network, folder.gather([footage / "query"]), "ir")
    assert len(found) == 9
    torch.testing.assert_close(found.features.norm(dim=1), torch.ones(9))
