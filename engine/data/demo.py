"""The demo data set: generated people seen by four visible and two infrared cameras, in the SYSU-MM01 layout.

docs/demo.md tells how it is made and why. Every identity and every image draws from a random generator of its own,
seeded by what it is, so that neither the order nor the number of the others changes a byte. `VERSION` changes whenever
a pixel or a caption does: scores compare only within a version.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.data import captions, sysu
from engine.data.dataset import Dataset
from engine.data.demo_captions import describe
from engine.data.demo_drawing import CAMERAS, HEIGHT, WIDTH, draw
from engine.data.demo_people import Person, people
from engine.errors import UserError

VERSION = 1
MARKER = "demo.json"
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Size:
    """How many identities each list holds, and how many images each identity has from each camera."""

    train: int = 64
    val: int = 16
    test: int = 32
    images: int = 4

    def lists(self) -> dict[str, range]:
        """The identities of each list, numbered from 1 throughout."""
        val, test, end = 1 + self.train, 1 + self.train + self.val, 1 + self.train + self.val + self.test
        return {"train": range(1, val), "val": range(val, test), "test": range(test, end)}

    def counts(self) -> dict[str, dict[str, int]]:
        """What the reader finds in a complete data set, per split."""
        return {
            "test": self._counts(self.train + self.val, self.test),
            "val": self._counts(self.train, self.val),
        }

    def _counts(self, train: int, test: int) -> dict[str, int]:
        vis, ir = (len(cameras) for cameras in sysu.CAMERAS)
        return {
            "training identities": train,
            "visible training images": train * vis * self.images,
            "infrared training images": train * ir * self.images,
            "test identities": test,
            "infrared queries": test * ir * self.images,
            "all single-shot gallery": test * vis,
        }


def read(root: str | Path, *, split: Literal["test", "val"] = "test") -> Dataset:
    """The demo data set at `root`, generated there first when the folder is missing or empty.

    Protocols and splits are those of `engine.data.sysu.read`: choose settings with "val", report "test".

    Raises:
        UserError: the folder holds something else or another version, or cannot be written.
    """
    root = Path(root).expanduser()
    prepare(root)
    return replace(sysu.read(root, split=split, counts=Size().counts()), name="demo")


def prepare(root: Path, size: Size | None = None) -> None:
    """Have the demo data set at `root`: generate it, find it there (and add captions that are missing), or refuse.

    It is made in a folder beside `root` that is renamed when complete, so that an interruption leaves no half of it.

    Raises:
        UserError: as for `read`.
    """
    size = size or Size()
    try:
        if (root / MARKER).is_file():
            _check_marker(root, size)
            _add_captions(root, size)
        elif root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise UserError(
                f"{root} is neither empty nor a demo data set (it has no {MARKER}); choose another data.root"
            )
        else:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
                made = Path(scratch) / "demo"
                _write(made, size)
                _move(made, root, size)
    except OSError as error:
        raise UserError(
            f"the demo data set cannot be made at {root}: {error}; free some space there or choose another data.root"
        ) from error


def image(person: Person, pid: int, cam: int, number: int) -> Image.Image:
    """Image `number` of identity `pid` from camera `cam`."""
    return draw(person, CAMERAS[cam], np.random.default_rng((VERSION, pid, cam, number)))


def caption(person: Person, pid: int, cam: int, number: int) -> tuple[str, str]:
    """What a captioner says of that image, and a paraphrase; from a generator of their own, which leaves pixels alone."""
    return describe(person, CAMERAS[cam].infrared, np.random.default_rng((VERSION, pid, cam, number, 1)))


def sheet(pids: Sequence[int], images: int = 2) -> Image.Image:
    """A contact sheet: one row per identity, `images` columns per camera, infrared cameras last."""
    persons = people(max(pids), VERSION)
    columns = [(cam, number) for cams in sysu.CAMERAS for cam in cams for number in range(1, images + 1)]
    canvas = Image.new("RGB", (len(columns) * (WIDTH + 2), len(pids) * (HEIGHT + 2)), "white")
    for row, pid in enumerate(pids):
        for column, (cam, number) in enumerate(columns):
            canvas.paste(image(persons[pid - 1], pid, cam, number), (column * (WIDTH + 2), row * (HEIGHT + 2)))
    return canvas


def _marker(size: Size) -> dict[str, int]:
    return {"version": VERSION, **asdict(size)}


def _check_marker(root: Path, size: Size) -> None:
    try:
        found = json.loads((root / MARKER).read_text())
    except ValueError:
        found = "nothing readable"
    if found != _marker(size):
        raise UserError(
            f"{root} must hold the demo data set {_marker(size)}, but its {MARKER} says {found}; "
            "remove the folder to have it made anew, or choose another data.root"
        )


def _write(folder: Path, size: Size) -> None:
    lists = size.lists()
    (folder / "exp").mkdir(parents=True)
    for name, pids in lists.items():
        (folder / "exp" / f"{name}_id.txt").write_text(",".join(map(str, pids)) + "\n")
    persons = _persons(size)
    with tqdm(
        total=len(persons) * len(CAMERAS) * size.images, desc="drawing the demo data set", unit="image", disable=None
    ) as progress:
        for pid, person in enumerate(persons, start=1):
            for cam in CAMERAS:
                (folder / _name(pid, cam, 1)).parent.mkdir(parents=True)
                for number in range(1, size.images + 1):
                    image(person, pid, cam, number).save(folder / _name(pid, cam, number), quality=JPEG_QUALITY)
                    progress.update()
    _write_captions(folder, size, persons)
    (folder / MARKER).write_text(json.dumps(_marker(size)) + "\n")


def _write_captions(folder: Path, size: Size, persons: Sequence[Person]) -> None:
    for cams, file in zip(sysu.CAMERAS, captions.FILES, strict=True):
        content = {
            str(folder / _name(pid, cam, number)): caption(person, pid, cam, number)
            for pid, person in enumerate(persons, start=1)
            for cam in cams
            for number in range(1, size.images + 1)
        }
        captions.save(folder / file, folder, content)


def _add_captions(root: Path, size: Size) -> None:
    """The captions of a data set that was made before there were any, or that lost them."""
    missing = [file for file in captions.FILES if not (root / file).is_file()]
    if not missing:
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".captions-", dir=root) as scratch:
            _write_captions(Path(scratch), size, _persons(size))
            for file in missing:
                (Path(scratch) / file).replace(root / file)
    except (OSError, UserError) as error:
        warnings.warn(f"{root}: captions cannot be added ({error}); methods that read them will not run", stacklevel=2)


def _persons(size: Size) -> list[Person]:
    return people(size.lists()["test"].stop - 1, VERSION)


def _name(pid: int, cam: int, number: int) -> str:
    return f"cam{cam}/{pid:04d}/{number:04d}.jpg"


def _move(made: Path, root: Path, size: Size) -> None:
    try:
        made.rename(root)
    except OSError:
        if not (root / MARKER).is_file():
            raise
        _check_marker(root, size)  # another process was first, and made the same


if __name__ == "__main__":
    sheet(range(1, 7)).reduce(2).save(sys.argv[1], optimize=True)
