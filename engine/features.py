"""Features of image lists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine import distributed, storage
from engine.config import Config
from engine.data import transforms
from engine.pair import Modality, Pair
from engine.storage import MEMORY, Storage

NAMES: dict[Modality, str] = {"vis": "visible", "ir": "infrared"}


@dataclass(frozen=True)
class Features:
    """Features of all images of both modalities.

    Attributes:
        whole: `[N, D]` float32 unit rows per modality.
        parts: `[N_p, N, D]` float32 unit rows per modality, each image's own queries on its own map; None where the
            network gives none.
        content: `[N, D]` float32 what the captions say, per modality; None where the network looks at none.
        storage: where they lie, and what is as large as they are should.
    """

    whole: Pair[Tensor]
    parts: Pair[Tensor] | None = None
    content: Pair[Tensor] | None = None
    storage: Storage = MEMORY


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
    texts: Pair[Tensor] | None = None,
) -> Features:
    """Unit-length features of all images, in evaluation mode, without augmentation; each process extracts its share.

    Args:
        network: called with `vis=` or `ir=` images, and with texts `vis_text=` or `ir_text=` tokens; gives an `Output`.
        pixels: `[N, H, W, 3]` uint8 per modality.
        mirror: average with the features of the mirrored images, and scale to unit length again; of whole images only.
        stage: of the training; the network may give part features from the second one, 1, on.
        progress: label of the progress bars; empty = none.
        texts: `[N, variants, L]` int64 tokens of captions, of which the first variant is looked at.

    Returns:
        Features on `device`, or, with `train.features` of "disk", on the CPU and mapped.
    """
    training = network.training
    place = storage.of(config)
    network.eval()
    with autocast(config, device):
        found = {
            name: extract_one(
                network,
                pixels[name],
                name,
                config.evaluate.batch,
                device,
                mirror=mirror,
                stage=stage,
                progress=progress,
                texts=None if texts is None else texts[name],
                place=place,
            )
            for name in NAMES
        }
    network.train(training)
    columns = [None if vis is None or ir is None else Pair(vis, ir) for vis, ir in zip(*found.values(), strict=True)]
    whole, parts, content = columns
    assert whole is not None
    return Features(whole, parts, content, place)


@torch.no_grad()
def extract_one(
    network: nn.Module,
    pixels: np.ndarray,
    modality: Modality,
    batch: int,
    device: torch.device,
    *,
    mirror: bool = False,
    stage: int = 0,
    progress: str = "",
    texts: Tensor | None = None,
    place: Storage = MEMORY,
) -> tuple[Tensor | None, ...]:
    """Features of one modality's whole images and, where the network gives them, of their parts, and contents of captions.

    Arguments are those of `extract`, for one modality, the images of a forward pass, and where the features lie; the
    network is in evaluation mode.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, start: int, rows: Tensor) -> None:
        """Put `[..., n, D]` rows of some images in their place among those of all, for which there is room from the start."""
        rows = distributed.gather(rows[..., : counts[distributed.rank()], :], counts, dim=-2)
        if name not in found:
            found[name] = place.empty(*rows.shape[:-2], len(pixels), rows.shape[-1], like=rows)
        found[name][..., start : start + rows.shape[-2], :] = rows

    title, quiet = f"{progress}, {NAMES[modality]}", None if progress and distributed.is_main() else True
    for start in tqdm(range(0, len(pixels), batch * distributed.world()), title, leave=False, disable=quiet):
        # Of a run of blocks each process has one. Where it is empty, it looks at the first one to know what others have.
        counts = [max(0, min(batch, len(pixels) - start - batch * i)) for i in range(distributed.world())]
        first = start + batch * distributed.rank() if counts[distributed.rank()] else start
        block = torch.from_numpy(np.array(pixels[first : first + batch]))  # a copy: the file is mapped read-only
        images = transforms.normalize(block.to(device))
        read = {} if texts is None else {f"{modality}_text": texts[first : first + batch, 0].to(device)}
        output = network(**{modality: images}, **read, stage=stage)
        features = output.features
        if mirror:
            features = F.normalize(features + network(**{modality: images.flip(3)}, **read).features)
        keep("whole", start, features)
        if output.parts is not None:
            keep("parts", start, output.parts[:, 0, 0])
        if output.content is not None:
            keep("content", start, output.content)
    return found["whole"], found.get("parts"), found.get("content")
