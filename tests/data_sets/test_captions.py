from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data import captions
from engine.data.dataset import Images
from engine.errors import UserError
from engine.pair import Pair

NAMES = Pair(vis=("cam1/0001/0001.jpg", "cam2/0002/0003.jpg"), ir=("cam3/0001/0002.jpg",))


def entry(text: str) -> dict[str, str]:
    return {"description": text, "aug_description": f"{text} again"}


def write(root: Path, vis: Any, ir: Any = None) -> None:
    """Caption files of `root`; the infrared one is right unless given."""
    contents = Pair(vis=vis, ir={NAMES.ir[0]: entry("dark coat")} if ir is None else ir)
    for name, content in zip(captions.FILES, contents, strict=True):
        (root / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*NAMES.vis, *NAMES.ir):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).touch()
    return tmp_path / "set"


@pytest.fixture
def images(root: Path) -> Pair[Images]:
    def of(names: tuple[str, ...]) -> Images:
        unknown = np.full(len(names), -1)
        return Images(tuple(str(root / name) for name in names), unknown, unknown)

    return NAMES.map(of)


def test_captions_come_in_the_order_of_the_images(root: Path, images: Pair[Images]) -> None:
    write(root, {NAMES.vis[1]: entry("red coat"), NAMES.vis[0]: entry("blue\n shirt ")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vis, ir = captions.read(images, root)
    assert vis == captions.Captions(["blue shirt", "red coat"], ["blue shirt again", "red coat again"])
    assert ir == captions.Captions(["dark coat"], ["dark coat again"])


@pytest.mark.parametrize("form", ["./{}", "/{}", "set/{}", "./set//{}", "cam9/../{}", "{root}/{}", "../set/{}"])
def test_paths_may_be_written_in_several_ways(root: Path, images: Pair[Images], form: str) -> None:
    write(root, {form.format(name, root=root): entry(name) for name in NAMES.vis})
    assert captions.read(images, root).vis.description == list(NAMES.vis)


def test_paths_may_have_backslashes(root: Path, images: Pair[Images]) -> None:
    write(root, {".\\" + name.replace("/", "\\"): entry(name) for name in NAMES.vis})
    assert captions.read(images, root).vis.description == list(NAMES.vis)


def test_a_subfolder_with_the_name_of_the_root_is_no_prefix(tmp_path: Path) -> None:
    paths = [tmp_path / "set" / "a.jpg", tmp_path / "set" / "set" / "a.jpg"]
    paths[1].parent.mkdir(parents=True)
    found = {"set/a.jpg": entry("inner"), "a.jpg": entry("outer")}
    (tmp_path / "file.json").write_text(json.dumps(found))
    loaded = captions.load(tmp_path / "file.json", tmp_path / "set")
    assert [loaded[str(path)][0] for path in paths] == ["outer", "inner"]


def test_the_root_may_be_relative_and_the_files_elsewhere(
    root: Path, images: Pair[Images], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, {name: entry(name) for name in NAMES.vis})
    files = captions.FILES.map(lambda name: (root / name).rename(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    relative = images.map(lambda side: Images(tuple(map(os.path.relpath, side.paths)), side.ids, side.cams))
    for place in (files, files.map(lambda file: f"./{file.name}")):
        assert captions.read(relative, "set", place).vis.description == list(NAMES.vis)


@pytest.mark.parametrize(
    "lack",
    [None, {}, {"description": "red coat"}, {"aug_description": "x"}, {"description": " ", "aug_description": ""}],
)
def test_images_without_captions_are_named_and_counted(
    root: Path, images: Pair[Images], lack: dict[str, str] | None
) -> None:
    write(root, {NAMES.vis[0]: entry("red coat")} | ({} if lack is None else {NAMES.vis[1]: lack}))
    problem = r"captions_vis\.json: no description .* for 1 \(cam2/0002/0003\.jpg\) of 2 images"
    with pytest.raises(UserError, match=rf"{problem}.*tools/caption\.py.*firm\.missing_caption"):
        captions.read(images, root)
    with pytest.warns(UserWarning, match=problem):
        vis = captions.read(images, root, missing="empty").vis
    texts = [text.strip() for text in (lack or {}).values()]
    assert (vis.description[1], vis.paraphrase[1]) == (max(texts, default=""),) * 2
    assert (vis.description[0], vis.paraphrase[0]) == ("red coat", "red coat again")


def test_captions_of_other_images_are_kept_apart_from_those_of_none(root: Path, images: Pair[Images]) -> None:
    (root / "test.jpg").touch()
    found = {name: entry(name) for name in (*NAMES.vis, "test.jpg", "gone/1.jpg", "gone\0/2.jpg")}
    write(root, found)
    with pytest.warns(UserWarning, match=r"do not exist: 2 \(.*gone/1\.jpg") as caught:
        assert len(captions.read(images, root).vis) == 2
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ('{"a": "é"}'.encode("latin-1"), "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        ({"a.jpg": "red coat"}, r"1 \(a\.jpg\) of 1 entries"),
        ({"a.jpg": {"description": ["red coat"]}}, "entries are not as in"),
        ({"a.jpg": {"description": "red coat", "aug_description": None}}, "entries are not as in"),
    ],
)
def test_damaged_files_are_refused_with_what_was_expected(
    root: Path, images: Pair[Images], content: Any, message: str
) -> None:
    write(root, content)
    with pytest.raises(UserError, match=message) as error:
        captions.read(images, root)
    assert "captions_vis.json" in str(error.value) and '"aug_description": "..."' in str(error.value)


def test_a_missing_file_says_what_to_get_and_where_to_put_it(root: Path, images: Pair[Images]) -> None:
    for folder in (root, root / "nowhere"):
        with pytest.raises(UserError, match=r"put the file there, .*firm\.captions, .*tools/caption\.py") as error:
            captions.read(images, folder, missing="empty")
        assert str(folder / "captions_vis.json") in str(error.value)


def test_an_unknown_way_with_missing_captions_is_refused(root: Path, images: Pair[Images]) -> None:
    with pytest.raises(UserError, match=r"firm\.missing_caption must be 'error' or 'empty', got 'skip'"):
        captions.read(images, root, missing="skip")  # type: ignore[arg-type]


def test_texts_can_always_be_encoded(root: Path, images: Pair[Images]) -> None:
    write(root, {NAMES.vis[0]: {"description": "half \ud800 pair"}})
    with pytest.warns(UserWarning, match="no description"):
        assert captions.read(images, root, missing="empty").vis.description[0].encode() == b"half ? pair"


def test_what_is_saved_is_loaded_again(root: Path, tmp_path: Path) -> None:
    content = {str(root / name): (f"ein Mann, {name}", "großer") for name in NAMES.vis}
    content[str(tmp_path / "other" / "1.jpg")] = ("beside", "")
    captions.save(root / "own.json", root, content)
    assert captions.load(root / "own.json", root) == content
    assert set(json.loads((root / "own.json").read_text(encoding="utf-8"))) == {*NAMES.vis, "../other/1.jpg"}
    with pytest.raises(UserError, match="choose another folder$"):
        captions.save(root / "nowhere" / "own.json", root, content)
