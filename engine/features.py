"""Features of image lists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine.config import Config
from engine.data import transforms
from engine.pair import Modality, Pair

NAMES: dict[Modality, str] = {"vis": "visible", "ir": "infrared"}


@dataclass(frozen=True)
class Features:
    """Features of all images of both modalities.

    Attributes:
        whole: `[N, D]` float32 unit rows per modality.
        parts: `[N_p, N, D]` float32 unit rows per modality, each image's own queries on its own map; None where the
            network gives none.
    """

    whole: Pair[Tensor]
    parts: Pair[Tensor] | None = None


def autocast(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network runs under `train.precision`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def extract(
    network: nn.Module,
    pixels: Pair[np.ndarray],
    config: Config,
    device: torch.device,
    *,
    mirror: bool = False,
    stage: int = 0,
    progress: str = "",
) -> Features:
    """Unit-length features of all images, in evaluation mode, without augmentation.

    Args:
        network: called with `vis=` or `ir=` images; gives an `Output`.
        pixels: `[N, H, W, 3]` uint8 per modality.
        mirror: average with the features of the mirrored images, and scale to unit length again; of whole images only.
        stage: of the training; the network may give part features from the second one, 1, on.
        progress: label of the progress bars; empty = none.

    Returns:
        Features on `device`.
    """
    training = network.training
    network.eval()
    with autocast(config, device):
        found = Pair(
            *(
                _extract(network, pixels[name], name, config.evaluate.batch, device, mirror, stage, progress)
                for name in NAMES
            )
        )
    network.train(training)
    whole, parts = found.map(lambda both: both[0]), found.map(lambda both: both[1])
    if parts.vis is None or parts.ir is None:
        return Features(whole)
    return Features(whole, Pair(parts.vis, parts.ir))


@torch.no_grad()
def _extract(
    network: nn.Module,
    pixels: np.ndarray,
    modality: Modality,
    batch: int,
    device: torch.device,
    mirror: bool,
    stage: int,
    progress: str,
) -> tuple[Tensor, Tensor | None]:
    """Features of whole images and, where the network gives them, of their parts."""
    whole, parts = [], []
    title = f"{progress}, {NAMES[modality]}"
    for start in tqdm(range(0, len(pixels), batch), title, leave=False, disable=None if progress else True):
        block = torch.from_numpy(np.array(pixels[start : start + batch]))  # a copy: the file is mapped read-only
        images = transforms.normalize(block.to(device))
        output = network(**{modality: images}, stage=stage)
        features = output.features
        if mirror:
            features = F.normalize(features + network(**{modality: images.flip(3)}).features)
        whole.append(features)
        if output.parts is not None:
            parts.append(output.parts[:, 0, 0])
    return torch.cat(whole), torch.cat(parts, dim=1) if parts else None
