"""Features of image lists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine.config import Config
from engine.data import transforms
from engine.pair import Modality, Pair

NAMES: dict[Modality, str] = {"vis": "visible", "ir": "infrared"}


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
    progress: str = "",
) -> Pair[Tensor]:
    """Unit-length features of all images, in evaluation mode, without augmentation.

    Args:
        network: called with `vis=` or `ir=` images; gives an `Output`.
        pixels: `[N, H, W, 3]` uint8 per modality.
        mirror: average with the features of the mirrored images, and scale to unit length again.
        progress: label of the progress bars; empty = none.

    Returns:
        `[N, D]` float32 on `device` per modality.
    """
    training = network.training
    network.eval()
    with autocast(config, device):
        vis, ir = (
            _extract(network, pixels[name], name, config.evaluate.batch, device, mirror, progress) for name in NAMES
        )
    network.train(training)
    return Pair(vis, ir)


@torch.no_grad()
def _extract(
    network: nn.Module,
    pixels: np.ndarray,
    modality: Modality,
    batch: int,
    device: torch.device,
    mirror: bool,
    progress: str,
) -> Tensor:
    parts = []
    title = f"{progress}, {NAMES[modality]}"
    for start in tqdm(range(0, len(pixels), batch), title, leave=False, disable=None if progress else True):
        block = torch.from_numpy(np.array(pixels[start : start + batch]))  # a copy: the file is mapped read-only
        images = transforms.normalize(block.to(device))
        features = network(**{modality: images}).features
        if mirror:
            features = F.normalize(features + network(**{modality: images.flip(3)}).features)
        parts.append(features)
    return torch.cat(parts)
