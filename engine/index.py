"""Features of image files with all that is needed to search in them, and the file that keeps them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint, info
from engine.data import cache, layout
from engine.data.dataset import Images
from engine.errors import UserError, command
from engine.features import NAMES, autocast, extract_one
from engine.pair import Modality
from engine.trained import Trained

SUFFIXES = (".npz", ".safetensors")
COLUMNS = {"features": np.float32, "ids": np.int64, "cams": np.int64}
NEEDED = {"checkpoint", "preprocessing", "modality", "mirror", "images"}
"""What a search must know of features."""


@dataclass(frozen=True)
class Index:
    """Features of images.

    Attributes:
        features: `[N, D]` float32 unit rows on the CPU.
        images: their files.
        about: plain values: "checkpoint" and "preprocessing" say which network made the features of which pixels,
            "modality" and "mirror" how, "images" is `stamp` of all files that were to be read, and "skipped" names those that
            could not be, with the reason.
    """

    features: Tensor
    images: Images
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def check(self, trained: Trained, name: str) -> None:
        """Raise a `UserError` where features are not those that `trained` gives; `name` is the file's."""
        for key, own in (("checkpoint", trained.digest), ("preprocessing", trained.preprocessing)):
            if self.about.get(key) != own:
                raise UserError(
                    f"{name}: made with another network: its {key} is {_short(self.about.get(key))}, {trained.path} has "
                    f"{_short(own)}; features of two networks cannot be compared: extract them again, or name the run they "
                    "come from"
                )


def make(
    trained: Trained,
    images: Images,
    modality: Modality,
    *,
    mirror: bool = True,
    batch: int = 0,
    strict: bool = False,
    label: str = "images",
) -> Index:
    """Features of image files, decoded and taken block by block: neither pixels nor maps of all are ever held.

    Args:
        modality: which of the network's stems sees the images.
        mirror: average with the features of the mirrored images, as the evaluation does.
        batch: images of a forward pass; 0 = the configuration's `evaluate.batch`.
        strict: refuse unreadable images; otherwise they are left out and named in `about`.
        label: what the images are, for progress and errors.

    Raises:
        UserError: no image can be read, or one cannot and `strict` is set, or a batch is too large for the device.
    """
    config = trained.config
    if batch < 0:
        raise UserError(f"--batch: expected at least 1, got {batch}")
    if trained.reads_captions:
        warnings.warn(
            "the network was trained with captions, which are not read here: features are those of the images alone, "
            "and the evaluation's are not",
            stacklevel=2,
        )
    batch = batch or config.evaluate.batch
    count = batch * max(1, cache.BLOCK // batch)  # whole batches, as the evaluation has them
    blocks = cache.decode_blocks(
        images.paths,
        config.data.size,
        workers=config.data.workers,
        title=f"{label}, {NAMES[modality]}",
        count=count,
        max_pixels=config.data.max_pixels,
    )
    features, kept, skipped = np.empty((0, 0), np.float32), list[int](), dict[str, str]()
    for number, block in enumerate(blocks):
        for row, pixels in enumerate(block, start=number * count):
            if isinstance(pixels, str):
                path = images.paths[row]
                skipped[path] = pixels.removeprefix(f"{path}: ")
            else:
                kept.append(row)
        readable = [pixels for pixels in block if not isinstance(pixels, str)]
        if strict and skipped:
            raise UserError(f"cannot read {_list(skipped)} of {len(images)} {label}; replace or remove them")
        if readable:
            found = _extract(trained, np.stack(readable), modality, batch, mirror)
            if not len(features):
                features = np.empty((len(images), found.shape[1]), np.float32)
            features[len(kept) - len(found) : len(kept)] = found
    if not kept:
        raise UserError(f"none of the {len(images)} {label} can be read: {_list(skipped)}")
    if skipped:
        warnings.warn(f"unreadable and left out: {_list(skipped)} of {len(images)} {label}", stacklevel=2)
    about = {
        "engine": info.versions()["vireid-engine"],
        "commit": info.commit(),
        "run": str(trained.path.absolute()),
        "checkpoint": trained.digest,
        "method": config.method.name,
        "precision": config.train.precision,
        "preprocessing": trained.preprocessing,
        "modality": modality,
        "mirror": mirror,
        "dimension": features.shape[1],
        "images": stamp(images),
        "skipped": skipped,
    }
    rows = np.array(kept)
    readable_images = Images(tuple(images.paths[row] for row in kept), images.ids[rows], images.cams[rows])
    return Index(torch.from_numpy(features[: len(kept)]), readable_images, about)


def _extract(trained: Trained, pixels: np.ndarray, modality: Modality, batch: int, mirror: bool) -> np.ndarray:
    try:
        with autocast(trained.config, trained.device):
            found = extract_one(trained.network, pixels, modality, batch, trained.device, mirror=mirror)[0]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch {batch}: too many images at once for the memory of {trained.device}; try fewer"
        ) from error
    assert found is not None
    return found.float().cpu().numpy()


def stamp(images: Images) -> str:
    """A hash of the images' paths, identities and cameras, and of their files' sizes and times of change."""
    digest = hashlib.sha256(images.ids.tobytes() + images.cams.tobytes())
    for path in images.paths:
        try:
            stat = os.stat(path)
            state = f"{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError as error:
            state = str(error.strerror)
        digest.update(os.fsencode(f"\0{path}\0{state}"))
    return digest.hexdigest()


def check_name(path: Path) -> None:
    """Raise a `UserError` where `save` could not write to `path`, before hours have gone into what it should write."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}; make it, or choose another place")
    if path.suffix == ".safetensors":
        _safetensors()


def save(path: Path, index: Index) -> None:
    """Write an .npz or a .safetensors file, without any pickle, whole or not at all.

    Raises:
        UserError: the name has neither ending, the file cannot be written, or safetensors is not installed.
    """
    check_name(path)
    about = json.dumps(index.about)
    features, images = index.features.numpy(), index.images
    content: bytes | memoryview
    if path.suffix == ".npz":
        buffer, paths = io.BytesIO(), np.array(images.paths)
        columns = {
            "features": features,
            "ids": images.ids,
            "cams": images.cams,
            "paths": paths,
            "about": np.array(about),
        }
        np.savez(buffer, allow_pickle=False, **columns)
        content = buffer.getbuffer()
    else:
        # As bytes with a 0 between them: the header, where text belongs, must not grow with the gallery.
        paths = np.frombuffer(os.fsencode("\0".join(images.paths)), np.uint8)
        columns = {"features": features, "ids": images.ids, "cams": images.cams, "paths": paths}
        content = _safetensors().save(columns, {"about": about})
    checkpoint.write(path, content, "make room, or choose another place")


def load(path: Path) -> Index:
    """What `save` has written.

    Raises:
        UserError: no such file, or not one of features.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {command('extract')} makes it")
    try:
        arrays, paths, about = _load_npz(path) if path.suffix == ".npz" else _load_safetensors(path)
        rows = {name: np.ascontiguousarray(arrays[name], kind) for name, kind in COLUMNS.items()}
        about = json.loads(about)
    except UserError:
        raise
    except Exception as error:  # damaged and foreign files fail in many ways
        raise UserError(
            f"{path}: not a file of features ({type(error).__name__}: {error}); make it by {command('extract')}"
        ) from error
    features = rows["features"]
    if not isinstance(about, dict) or not about.keys() >= NEEDED:
        raise UserError(f"{path}: not a file of features: its 'about' lacks some of {', '.join(sorted(NEEDED))}")
    if features.ndim != 2 or not len(features):
        raise UserError(
            f"{path}: not a file of features: expected features [N, D] with N > 0, got {list(features.shape)}"
        )
    if {len(paths), *(len(column) for column in rows.values())} != {len(features)}:
        counts = {"paths": len(paths)} | {name: len(column) for name, column in rows.items()}
        raise UserError(f"{path}: damaged: its columns have different lengths ({counts}); make it again")
    if not np.isfinite(features).all():
        raise UserError(f"{path}: damaged: features that are NaN or infinite; make it again")
    return Index(torch.from_numpy(features), Images(tuple(paths), rows["ids"], rows["cams"]), about)


def _load_npz(path: Path) -> tuple[Mapping[str, np.ndarray], list[str], str]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in COLUMNS}, file["paths"].tolist(), str(file["about"])


def _load_safetensors(path: Path) -> tuple[Mapping[str, np.ndarray], list[str], str]:
    _safetensors()
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in COLUMNS}
        paths = os.fsdecode(file.get_tensor("paths").tobytes()).split("\0")
        return arrays, paths, file.metadata()["about"]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            '.safetensors: not installed; run: pip install "vireid-engine[search]", or choose .npz'
        ) from error
    return safetensors.numpy


def _list(skipped: Mapping[str, str]) -> str:
    return layout.some([f"{path}: {reason}" for path, reason in skipped.items()])


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)
