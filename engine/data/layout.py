"""What the readers share: listing folders, parsing split files, drawing galleries, checking counts."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from engine.data.dataset import Images, Trial
from engine.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TRIAL_COUNT = 10
Rows = list[int]
Choose = Callable[[int, int, Rows], Rows]
"""(identity, camera, their rows in name order) -> the rows that enter the gallery."""


def existing(path: Path, what: str, remedy: str = "check data.root") -> Path:
    """`path` if it is there.

    Raises:
        UserError: it is not; the message says that `what` was expected.
    """
    if not path.exists():
        raise UserError(f"{path} not found: expected {what}; {remedy}")
    return path


def existing_root(root: str | Path, what: str, sign: str) -> Path:
    """The folder of a data set if it is there.

    Raises:
        UserError: it is not, and `what` was expected; or the file `sign` lies a level above or below it.
    """
    root = existing(Path(root).expanduser(), what)
    around = (root.absolute().parent / sign, *sorted(root.glob(f"*/{sign}")))
    found = [path for path in around if path.is_file()]
    if found and not (root / sign).exists():
        place = str(found[0]).removesuffix(f"/{sign}")
        raise UserError(f"{root} has no {sign}, {place} has: set data.root to that, {what}")
    return root


def list_images(folder: Path, *, recursive: bool = False) -> list[str]:
    """Absolute paths of the images in a folder, in name order; links are followed, hidden files are none of the user's.

    Raises:
        UserError: the folder, or one in it, is unreadable, or there is no image.
    """
    try:
        paths = sorted(path for path in _files(str(folder.absolute()), recursive) if is_image(path))
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror}); check that it is a folder you may open"
        ) from error
    if not paths:
        raise UserError(f"{folder} holds no image: expected files ending in {', '.join(SUFFIXES)}")
    return paths


def _files(folder: str, recursive: bool, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of what is in a folder, and in those within it; a link to one of the folders `above` is a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if recursive and os.path.isdir(entry.path):
                yield from _files(entry.path, recursive, above | {real})
            elif not entry.name.startswith("."):  # such as ._0001.jpg, that systems add
                yield entry.path


def is_image(path: str | Path) -> bool:
    """Whether its name ends as that of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def read_text(path: Path, what: str) -> str:
    """A split file's text.

    Raises:
        UserError: the file is missing, unreadable, not text, or empty.
    """
    existing(path, what)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): expected {what}") from error
    if not text.strip():
        raise UserError(f"{path} is empty: expected {what}; copy it again from the data set")
    return text


def read_ids(path: Path) -> list[int]:
    """Identities of a split file, comma-separated, ascending.

    Raises:
        UserError: the file is missing or empty, or holds anything but positive integers.
    """
    what = "identities separated by commas"
    fields = [field.strip() for field in read_text(path, what).replace("\n", ",").split(",")]
    wrong = [field for field in fields if field and not is_number(field)]
    if wrong:
        raise UserError(f"{path} holds {wrong[0]!r}: expected {what}; copy it again from the data set")
    return sorted({int(field) for field in fields if field})


def is_number(text: str) -> bool:
    """Whether it is a number that an identity or a label may have."""
    return text.isdecimal() and len(text) <= 9


def read_list(root: Path, name: str) -> tuple[list[str], list[int]]:
    """Absolute paths and labels of a split file of lines `relative/path label`.

    Paths are judged as they are written. Links are followed wherever they lead: who made them could read what is there,
    and data sets are often put together of links.

    Raises:
        UserError: the file is missing, empty or malformed, or images that it names are missing or not under `root`.
    """
    file, what = root / name, "lines 'relative/path label'"
    paths, labels = [], []
    for number, line in enumerate(read_text(file, what).splitlines(), start=1):
        relative, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not relative or not is_number(label):
            raise UserError(f"{file}, line {number}, is {line!r}: expected {what}; copy it again from the data set")
        if os.path.isabs(relative.strip()) or Path(os.path.normpath(relative.strip())).parts[:1] == ("..",):
            raise UserError(f"{file}, line {number}, names {relative!r}, which leaves {root}: expected {what}")
        paths.append(str((root / relative.strip()).absolute()))
        labels.append(int(label))
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{some(missing)} of the {len(paths)} images in {file} not found; unpack the data set again")
    return paths, labels


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, and how many there are."""
    listed = ", ".join(names[:limit])
    return f"{len(names)} ({listed}{', ...' if len(names) > limit else ''})"


def collect(rows: Iterable[tuple[str, int, int]]) -> Images:
    """`Images` of (path, identity, camera) rows."""
    paths, ids, cams = zip(*rows, strict=True)
    return Images(paths, np.array(ids, dtype=np.int64), np.array(cams, dtype=np.int64))


def everything(images: Images) -> np.ndarray:
    """All rows of `images`."""
    return np.arange(len(images))


def choose_random(shot_count: int) -> Callable[[int], Choose]:
    """Per trial, the gallery draw of the field's public code: `random.seed(trial)`, a choice per (identity, camera).

    One shot uses the stream of `random.choice`, so the galleries equal those that published numbers rest on. For more
    shots public code draws from NumPy's unseeded generator, which nobody can repeat; here it is `random.sample`, all
    images where there are fewer.
    """
    return lambda trial: partial(_choose, random.Random(trial), shot_count)


def _choose(generator: random.Random, shot_count: int, identity: int, camera: int, rows: Rows) -> Rows:
    return [generator.choice(rows)] if shot_count == 1 else generator.sample(rows, min(shot_count, len(rows)))


def draw_galleries(images: Images, cameras: Sequence[int], begin: Callable[[int], Choose]) -> list[np.ndarray]:
    """Rows of `images` in the gallery of each of the ten trials: identities ascending, then cameras in order.

    `begin(trial)` gives the function that chooses the rows of each (identity, camera) in that trial.
    """
    groups: dict[tuple[int, int], Rows] = {}
    for row, (identity, camera) in enumerate(zip(images.ids.tolist(), images.cams.tolist(), strict=True)):
        groups.setdefault((identity, camera), []).append(row)
    identities = sorted(set(images.ids.tolist()))
    keys = [(identity, camera) for identity in identities for camera in cameras if (identity, camera) in groups]
    choices = [begin(trial) for trial in range(TRIAL_COUNT)]
    return [np.array([row for key in keys for row in choose(*key, groups[key])], dtype=np.int64) for choose in choices]


def trials(queries: Sequence[np.ndarray], galleries: Sequence[np.ndarray]) -> tuple[Trial, ...]:
    """Queries and galleries of the trials, paired."""
    return tuple(Trial(query, gallery) for query, gallery in zip(queries, galleries, strict=True))


def check_counts(name: str, found: Mapping[str, int], expected: Mapping[str, int]) -> dict[str, tuple[int, int | None]]:
    """Warn, once and with all numbers, where `found` differs from `expected`; a count without expectation is free.

    Returns:
        Both numbers by name, as `Dataset.counts` has them.
    """
    wrong = [f"{key} {found[key]} (expected {count})" for key, count in expected.items() if found[key] != count]
    if wrong:
        warnings.warn(
            f"{name} is not the complete data set: {', '.join(wrong)}. Scores will not compare with "
            "published ones; check that every file was unpacked and that the split files are the original ones.",
            stacklevel=3,
        )
    return {key: (count, expected.get(key)) for key, count in found.items()}


def check_matches(name: str, vis: Images, ir: Images) -> None:
    """Warn when test identities lack one modality: their queries are left out of every mean."""
    for modality, lonely in (("visible", set(ir.ids) - set(vis.ids)), ("infrared", set(vis.ids) - set(ir.ids))):
        if lonely:
            listed = some([str(identity) for identity in sorted(lonely)])
            warnings.warn(f"{name}: test identities without {modality} images: {listed}", stacklevel=3)
