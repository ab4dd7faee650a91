"""The network: two-stream backbone, GeM pooling, BN neck, and where a method wants them, part features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import config
from engine.errors import UserError
from engine.model import weights
from engine.model.backbone import ARCHITECTURES, TwoStreamResNet
from engine.model.norm import BatchNorm1d
from engine.model.parts import PartHead
from engine.model.pooling import GeM


@dataclass(frozen=True)
class Output:
    """What a network gives for a batch. Rows: visible images, their augmented copies where there are any, infrared images.

    A method's network may return a subclass with fields of its own, `[B, ...]` or None.

    Attributes:
        map: `[B, D, h, w]` feature map of a convolutional backbone, `[B, T, D]` tokens of a transformer; empty of a batch
            that was computed in slices (`engine.slices`), which do not exchange their maps.
        features: `[B, D]` float32 L2-normalised features.
        parts: `[N_p, Q, M, s, D]` float32 L2-normalised part features by part, kind of the query, kind of the map and image
            (`engine.model.parts`), or None.
        fused: `[B, D]` float32 L2-normalised features that captions have been fused into, or None.
        classes: `[blocks, B, D]` float32 class tokens of a transformer at the blocks that captions go to, or None.
        content: `[B, D]` float32 what the captions say (`engine.model.prompts`), or None.
    """

    map: Tensor
    features: Tensor
    parts: Tensor | None = None
    fused: Tensor | None = None
    classes: Tensor | None = None
    content: Tensor | None = None


class Network(nn.Module):
    """Images of either modality -> feature map and unit-length global features (SALCR, sec. 3.2).

    Args:
        settings: the `model` section.
        parts: number of part features from stage 2 on; 0 = none.
        uneven_parts: see `PartHead`.
    """

    def __init__(self, settings: config.Model, parts: int = 0, uneven_parts: bool = False) -> None:
        super().__init__()
        if settings.backbone not in ARCHITECTURES:
            raise UserError(
                f"model.backbone: this method needs one of {', '.join(ARCHITECTURES)}, got {settings.backbone}, which is "
                "firm's"
            )
        architecture = ARCHITECTURES[settings.backbone]
        self.backbone = TwoStreamResNet(architecture, settings.non_local)
        self.pool = GeM()
        self.neck = BatchNorm1d(architecture.channels)
        self.neck.bias.requires_grad_(False)
        # Last, so that the rest starts as it does without: one stage 1 serves them both.
        self.parts = PartHead(architecture.channels, parts, uneven_parts) if parts else None
        if settings.weights != "none":
            weights.load(self, settings)

    def forward(
        self, vis: Tensor | None = None, aug: Tensor | None = None, ir: Tensor | None = None, *, stage: int = 0
    ) -> Output:
        """Float images `[B, 3, H, W]` of each kind that is given -> `Output` with their rows in this order.

        From `stage` 1 on, the second one, there are part features, where the network has them: of one kind alone, each
        image's queries on its own map; of all three, those of the i-th images of the three on each other's maps.

        In training BatchNorm takes its statistics of groups of images, as `norm.set_groups` says. A group is what one of
        several devices would see: the same part of each kind of image.
        """
        given = {"vis": (vis, aug), "ir": (ir,)}
        streams = {stem: [x for x in images if x is not None] for stem, images in given.items()}
        streams = {stem: images for stem, images in streams.items() if images}
        sizes = [x.shape[0] for images in streams.values() for x in images]
        groups = self.neck.groups if self.training else 1
        stems = {stem: _interleave(images, groups) for stem, images in streams.items()}
        if groups == 1:
            return self._embed(self.backbone(stems), len(sizes), stage)
        # Each stem sees its images group after group; between stems and shared layers their rows are interleaved too.
        rows = list(torch.arange(sum(sizes), device=stems["vis" if "vis" in stems else "ir"].device).split(sizes))
        counts = [len(images) for images in streams.values()]
        seen = torch.cat([_interleave(rows[sum(counts[:i]) :][:count], groups) for i, count in enumerate(counts)])
        grouped = _interleave(rows, groups)
        return self._embed(self.backbone(stems, seen.argsort()[grouped]), len(sizes), stage, grouped.argsort())

    def layers_above(self, name: str) -> int:
        """Layers between a parameter and the features: 0 for the heads', 1 for layer4's, ..., 5 for the stems'."""
        part = name.removeprefix("backbone.")
        if part == name:
            return 0
        return 5 - int(part[len("layer")]) if part.startswith("layer") else 5

    def _embed(self, maps: Tensor, kinds: int, stage: int, back: Tensor | None = None) -> Output:
        """Features of maps whose rows `back` puts in order, where they are not."""
        with torch.autocast(maps.device.type, enabled=False):
            features = F.normalize(self.neck(self.pool(maps)))
            if back is not None:
                maps, features = maps[back], features[back]
            parts = self.parts(maps, kinds) if self.parts is not None and stage > 0 else None
            return Output(maps, features, parts)


def _interleave(parts: list[Tensor], groups: int) -> Tensor:
    """Rows of all `parts`, group by group: the first of `groups` chunks of each part, then the second, and so on."""
    if len(parts) == 1:
        return parts[0]
    if groups == 1:
        return torch.cat(parts)
    return torch.cat([chunk for group in zip(*(part.chunk(groups) for part in parts), strict=True) for chunk in group])
