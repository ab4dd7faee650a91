"""Own footage: `<root>/visible` and `<root>/infrared`, unlabelled; `query` and `gallery` beside them to be scored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.data import layout
from engine.data.dataset import Dataset, Images, Protocol, Trial
from engine.errors import UserError
from engine.pair import Modality, Pair

_NAME = re.compile(r"(\d{1,9})_c(\d{1,9})(?!\d)")


def read(root: str | Path, *, query: Modality = "ir") -> Dataset:
    """Read two folders of unlabelled images (searched with their subfolders), and test images where there are some.

    With `query` and `gallery`, whose files are named `<identity>_c<camera>_*.jpg`, the data set has the protocol "query
    to gallery" with the rule "llcm" (same identity and camera removed); without them it has nothing to be scored on.

    Args:
        root: folder with visible and infrared.
        query: modality of the images in `query`; those in `gallery` are of the other one.

    Raises:
        UserError: a folder is missing or without images, only one of `query` and `gallery` is there, or a test image is
            not named as above.
    """
    root = layout.existing(Path(root).expanduser(), "a folder with visible and infrared")
    train = Pair(vis="visible", ir="infrared").map(lambda name: _list_unlabelled(root / name))
    sides = {name: (root / name).is_dir() for name in ("query", "gallery")}
    if not any(sides.values()):
        return Dataset(root.name, train, None, ())
    if not all(sides.values()):
        there, absent = sorted(sides, key=lambda name: not sides[name])
        raise UserError(f"{root / absent} not found: {there} needs it; add it, or remove {there} to train only")
    queries, gallery = _list_named(root / "query"), _list_named(root / "gallery")
    test = Pair(vis=queries, ir=gallery) if query == "vis" else Pair(vis=gallery, ir=queries)
    layout.check_matches(str(root), test.vis, test.ir)
    trial = Trial(layout.everything(queries), layout.everything(gallery))
    return Dataset(root.name, train, test, (Protocol("query to gallery", query, (trial,), "llcm"),))


def gather(places: Sequence[str | Path]) -> Images:
    """Images, all images of folders, and those that lists name, in this order; a folder's in name order.

    A list is a text file with a path a line, relative to the list's folder; an identity and a camera may follow, behind a
    tab each. Elsewhere file names `<identity>_c<camera>_*` tell them; -1 where nothing does.

    Raises:
        UserError: there is no such place, it holds no image, or it is not such a list.
    """
    return layout.collect(row for place in places for row in _gather(Path(place).expanduser()))


def _gather(place: Path) -> Iterator[tuple[str, int, int]]:
    layout.existing(place, "an image, a folder of images, or a list of their paths", "check the path")
    if place.is_dir():
        yield from map(_read_name, layout.list_images(place, recursive=True))
    elif layout.is_image(place):
        yield _read_name(str(place.absolute()))
    else:
        yield from _read_list(place)


def _read_name(path: str) -> tuple[str, int, int]:
    match = _NAME.match(Path(path).name)
    return (path, int(match[1]), int(match[2])) if match else (path, -1, -1)


def _read_list(file: Path) -> Iterator[tuple[str, int, int]]:
    what = f"an image ({', '.join(layout.SUFFIXES)}), or lines 'path', or 'path<tab>identity<tab>camera'"
    for number, line in enumerate(layout.read_text(file, what).splitlines(), start=1):
        name, *labels = line.strip().split("\t")
        if not name:
            continue
        if labels and not (len(labels) == 2 and all(map(layout.is_number, labels))):
            raise UserError(f"{file}, line {number}, is {line!r}: expected {what}")
        path = str((file.parent / name).absolute())
        yield (path, int(labels[0]), int(labels[1])) if labels else _read_name(path)


def _list_unlabelled(folder: Path) -> Images:
    paths = layout.list_images(layout.existing(folder, f"the {folder.name} images"), recursive=True)
    unknown = np.full(len(paths), -1, dtype=np.int64)
    return Images(tuple(paths), unknown, unknown)


def _list_named(folder: Path) -> Images:
    paths = layout.list_images(folder)
    matches = {path: match for path in paths if (match := _NAME.match(Path(path).name))}
    wrong = [Path(path).name for path in paths if path not in matches]
    if wrong:
        raise UserError(f"{folder}: {layout.some(wrong)} not named <identity>_c<camera>_*, as 0012_c3_0001.jpg is")
    return layout.collect((path, int(match[1]), int(match[2])) for path, match in matches.items())
