"""Small image trees in the layouts of the public data sets: coloured people that a tiny network can tell apart.

Every builder writes the same images for the same arguments and returns `root`. `identities` and `images` are small by
default; all builders draw at least one image per identity and camera.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

SYSU_CAMERAS = {1: "vis", 2: "vis", 3: "ir", 4: "vis", 5: "vis", 6: "ir"}
LLCM_CAMERAS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}


def person(identity: int, camera: int, number: int, modality: str, size: Sequence[int] = (48, 24)) -> Image.Image:
    """A person: hair, top (with stripes or not), trousers. Infrared shows a material's brightness, not its colour."""
    look = np.random.default_rng([identity, 0])
    shot = np.random.default_rng([identity, camera, number, modality == "ir"])
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    colours = look.uniform(0.1, 0.9, (3, 3))
    if modality == "ir":
        colours = np.repeat(0.4 * colours.mean(1, keepdims=True) + 0.6 * look.uniform(0.1, 0.9, (3, 1)), 3, axis=1)
    stripes = 1 - 0.5 * look.integers(2) * (np.sin(rows * look.integers(3, 9) * 2 * np.pi) > 0)
    image = np.full((height, width, 3), 0.3 + 0.05 * camera)
    shift = shot.uniform(-0.06, 0.06)
    body = np.abs(columns - 0.5 - shift) < look.uniform(0.2, 0.35)
    for part, (top, bottom) in enumerate(((0.05, 0.2), (0.2, 0.55), (0.55, 0.95))):
        inside = body & (rows >= top) & (rows < bottom)
        image[inside] = (colours[part] * stripes[..., None])[inside] if part == 1 else colours[part]
    image = image * shot.uniform(0.85, 1.15) + shot.normal(0, 0.02, image.shape)
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))


def build_sysu(
    root: Path, *, identities: Sequence[int] = (6, 2, 4), images: int = 2, size: Sequence[int] = (48, 24)
) -> Path:
    """SYSU-MM01: identities (train, val, test), `images` of each in each of the six cameras."""
    numbers = _numbers(identities)
    for name, ids in zip(("train", "val", "test"), numbers, strict=True):
        _write(root / "exp" / f"{name}_id.txt", ",".join(str(i) for i in ids) + "\n")
        for identity in ids:
            for camera, modality in SYSU_CAMERAS.items():
                for number in range(1, images + 1):
                    path = root / f"cam{camera}" / f"{identity:04d}" / f"{number:04d}.jpg"
                    _save(path, person(identity, camera, number, modality, size))
    return root


def build_regdb(
    root: Path,
    *,
    identities: Sequence[int] = (6, 4),
    images: int = 3,
    size: Sequence[int] = (48, 24),
    trials: Iterable[int] = (1, 2),
) -> Path:
    """RegDB: identities (train, test), `images` per modality; a trial's split takes other people as its test part."""
    train_count, test_count = identities
    total = train_count + test_count
    for modality, folder in (("vis", "Visible"), ("ir", "Thermal")):
        for identity in range(1, total + 1):
            for number in range(images):
                path = root / folder / str(identity) / f"front_{modality}_{number:03d}_{identity:04d}.bmp"
                _save(path, person(identity, 1, number, modality, size))
    for trial in trials:
        people = np.roll(np.arange(1, total + 1), trial - 1)
        for name, ids in (("train", people[:train_count]), ("test", people[train_count:])):
            for modality, folder, listed in (("vis", "Visible", "visible"), ("ir", "Thermal", "thermal")):
                lines = [
                    f"{folder}/{identity}/front_{modality}_{number:03d}_{identity:04d}.bmp {label}"
                    for label, identity in enumerate(ids)
                    for number in range(images)
                ]
                _write(root / "idx" / f"{name}_{listed}_{trial}.txt", "\n".join(lines) + "\n")
    return root


def build_llcm(
    root: Path, *, identities: Sequence[int] = (5, 3), images: int = 1, size: Sequence[int] = (48, 24)
) -> Path:
    """LLCM: identities (train, test), `images` of each in each camera of both modalities."""
    train, test = _numbers(identities)
    for name, cameras in LLCM_CAMERAS.items():
        modality = "ir" if name == "nir" else "vis"
        lines = []
        for identity in train + test:
            for camera in cameras:
                for number in range(images):
                    file = f"{identity:04d}_c{camera:02d}_s{number:06d}_f{number}_{name}.jpg"
                    relative = f"{name}/{identity:04d}/{file}"
                    if identity in test:
                        relative = f"test_{name}/cam{camera}/{identity:04d}/{file}"
                    else:
                        lines.append(f"{relative} {identity - 1}")
                    _save(root / relative, person(identity, camera, number, modality, size))
        _write(root / "idx" / f"train_{name}.txt", "\n".join(lines) + "\n")
    _write(root / "idx" / "test_id.txt", ",".join(str(identity) for identity in test))
    return root


def build_folder(
    root: Path,
    *,
    identities: Sequence[int] = (6, 3),
    images: int = 4,
    size: Sequence[int] = (48, 24),
    scored: bool = True,
    query: str = "ir",
) -> Path:
    """Own footage: identities (train, test); without `scored` only the two unlabelled folders."""
    train, test = _numbers(identities)
    for modality, folder in (("vis", "visible"), ("ir", "infrared")):
        for identity in train:
            for number in range(images):
                day = f"day{number % 2}"
                _save(root / folder / day / f"{identity}_{number}.png", person(identity, 1, number, modality, size))
    for folder in ("query", "gallery") if scored else ():
        modality = query if folder == "query" else {"vis": "ir", "ir": "vis"}[query]
        for identity in test:
            for number in range(images):
                camera = (1 if modality == "vis" else 3) + number % 2
                path = root / folder / f"{identity:04d}_c{camera}_{number:04d}.jpg"
                _save(path, person(identity, camera, number, modality, size))
    return root


def _numbers(counts: Sequence[int]) -> list[list[int]]:
    """Consecutive identities from 1, cut into parts of the given sizes."""
    ends = np.cumsum([1, *counts]).tolist()
    return [list(range(low, high)) for low, high in pairwise(ends)]


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
