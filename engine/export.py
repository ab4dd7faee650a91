"""Networks as ONNX or torch.export files, checked before they are kept, with a description of what goes in and comes out."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import checkpoint, info
from engine.data import transforms
from engine.errors import UserError
from engine.features import NAMES
from engine.pair import Modality
from engine.trained import Trained

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of a unit feature's entries
CHECKED = (1, 3)  # images of a batch
Run = Callable[..., Sequence[np.ndarray]]


class Exported(nn.Module):
    """Decoded images -> unit features, all that `engine.index.make` does to them.

    Args:
        network: in evaluation mode.
        modalities: of the inputs, in their order.
        mirror: average with the features of the mirrored images, and scale to unit length again.
    """

    def __init__(self, network: nn.Module, modalities: Sequence[Modality], mirror: bool) -> None:
        super().__init__()
        self.network, self.modalities, self.mirror = network, modalities, mirror

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """`[B, H, W, 3]` uint8 of each modality, each with its own B -> `[B, D]` float32 of each."""
        return tuple(self._embed(name, one) for name, one in zip(self.modalities, images, strict=True))

    def _embed(self, modality: Modality, images: Tensor) -> Tensor:
        planes = transforms.normalize(images)
        if not self.mirror:
            return self.network(**{modality: planes}).features
        features = self.network(**{modality: torch.cat([planes, planes.flip(3)])}).features
        return F.normalize(features.unflatten(0, (2, -1)).sum(0))


def export(
    trained: Trained, path: Path, kind: Format, modalities: Sequence[Modality], mirror: bool = True
) -> dict[str, Any]:
    """Write the network, and `<path>.json`, which describes it; neither where the file computes something else.

    Args:
        kind: "onnx", or "torch" for torch.export's .pt2.

    Returns:
        What the .json file holds.

    Raises:
        UserError: the name has another ending or no folder, packages are missing, the network cannot be exported, or the
            file's features differ from PyTorch's.
    """
    if path.suffix != SUFFIXES[kind]:
        raise UserError(f"--out {path}: expected a name that ends in {SUFFIXES[kind]} for --format {kind}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.absolute().parent}; make it, or choose another place")
    if kind == "onnx":
        _need_packages()
    network: Any = copy.deepcopy(trained.network).cpu()
    if trained.reads_captions:
        warnings.warn("the network was trained with captions, which the exported one does not read", stacklevel=2)
        network.prompts = None  # or the file would carry the text encoder
    height, width = trained.config.data.size
    module = Exported(network, modalities, mirror).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, ...]:
        # Each modality with a number of its own: numbers that belong together must not be taken for one.
        shapes = [(count + place, height, width, 3) for place in range(len(modalities))]
        return tuple(torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)

    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with torch.no_grad():
            try:
                run = (_write_onnx if kind == "onnx" else _write_torch)(module, draw(2), modalities, part)
            except OSError as error:
                raise UserError(
                    f"--out {path}: cannot be written ({error}); make room, or choose another place"
                ) from error
            except Exception as error:  # exporters fail in many ways, none of which a user can mend
                raise UserError(
                    f"--format {kind}: this network cannot be exported ({type(error).__name__}: {str(error).splitlines()[0]})"
                ) from error
            worst = max(_difference(module, run, draw(count)) for count in CHECKED)
        if not worst <= TOLERANCE:
            raise UserError(
                f"--out {path}: not kept: its features differ from PyTorch's by {worst:.1e}, more than {TOLERANCE:.0e}; try "
                "other versions of the packages (python -m engine.info)"
            )
        about = _describe(trained, path, kind, modalities, mirror, worst, module(*draw(1))[0].shape[1])
        checkpoint.write(path.with_name(f"{path.name}.json"), json.dumps(about, indent=2).encode(), "make room")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return about


def _need_packages() -> None:
    missing = []
    for name in PACKAGES:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(
            f'--format onnx: needs {", ".join(missing)}, not installed; run: pip install "vireid-engine[export]", or take --format torch'
        )


def _write_onnx(module: nn.Module, images: tuple[Tensor, ...], modalities: Sequence[Modality], path: Path) -> Run:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            module,
            images,
            str(path),
            input_names=list(modalities),
            output_names=[f"{name}_features" for name in modalities],
            dynamic_shapes=_free_batches(images),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*batches: np.ndarray) -> Sequence[np.ndarray]:
        return session.run(None, dict(zip(modalities, batches, strict=True)))

    return run


def _write_torch(module: nn.Module, images: tuple[Tensor, ...], modalities: Sequence[Modality], path: Path) -> Run:
    program = torch.export.export(module, images, dynamic_shapes=_free_batches(images))
    content = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    loaded = torch.export.load(str(path)).module()
    return lambda *batches: [rows.numpy() for rows in loaded(*map(torch.from_numpy, batches))]


def _free_batches(images: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Any number of images, for each of the inputs, which are one variable argument."""
    return (tuple({0: torch.export.Dim.DYNAMIC} for _ in images),)


def _difference(module: nn.Module, run: Run, images: tuple[Tensor, ...]) -> float:
    expected = module(*images)
    found = run(*(one.numpy() for one in images))
    if [rows.shape for rows in found] != [tuple(rows.shape) for rows in expected]:
        return float("inf")
    return max(float(np.abs(one - rows.numpy()).max()) for one, rows in zip(found, expected, strict=True))


def _describe(
    trained: Trained, path: Path, kind: Format, modalities: Sequence[Modality], mirror: bool, worst: float, width: int
) -> dict[str, Any]:
    steps = dict(trained.preprocessing)
    size, channels, resize = (steps.pop(name) for name in ("size", "channels", "resize"))
    image = {
        "shape": ["batch", *size, 3],
        "type": "uint8",
        "layout": "NHWC: image, row, column, channel",
        "range": [0, 255],
        "channels": channels,
        "resize": resize,
    }
    return {
        "file": path.name,
        "format": kind,
        "inputs": {name: image | {"images": NAMES[name]} for name in modalities},
        "outputs": {
            f"{name}_features": {"shape": ["batch", width], "type": "float32", "unit_length": True}
            for name in modalities
        },
        "done_inside": steps | {"mirror": mirror},
        "similarity": "inner product of two features, of either modality",
        "largest_difference_from_pytorch": worst,
        "checked_with": {"torch": torch.__version__}
        | ({name: metadata.version(name) for name in PACKAGES} if kind == "onnx" else {}),
        "run": str(trained.path.absolute()),
        "checkpoint": trained.digest,
        "method": trained.config.method.name,
        "backbone": trained.config.model.backbone,
        "engine": info.versions()["vireid-engine"],
        "commit": info.commit(),
    }
