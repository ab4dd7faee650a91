"""The DCL baseline, and the functions that a method is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import memory, ops
from engine.cluster import Labels, cluster
from engine.config import Config, Stage
from engine.data import sampler
from engine.data.dataset import Images
from engine.data.loader import Batch, Views
from engine.errors import UserError
from engine.features import Features
from engine.losses import instance_contrast
from engine.model.network import Network, Output
from engine.pair import Modality, Pair
from engine.phases import Phases


class Method:
    """Dual-contrastive learning within each modality (SALCR Eq. 1-3), and the base of every method.

    The trainer calls the functions in the order in which they stand here. None of them touches the optimiser, files (but
    for captions) or logs.

    Attributes:
        memory: the memories of the running epoch; the trainer sets them. `label` finds those of the last epoch if they last.
        lasting: whether memories live on from epoch to epoch, and so stand in every checkpoint.
        shared: names of memories whose rows processes can share out among themselves (`memory.shard`).
        copies: whether batches must have channel-augmented copies of visible images, or must not.
    """

    lasting = False
    shared: tuple[str, ...] = ()
    copies = True

    @dataclass(frozen=True)
    class Settings:
        """The method's own section of the YAML; DCL has no settings of its own."""

    def __init__(self, config: Config) -> None:
        if config.augment.channels != self.copies:
            raise UserError(
                f"augment.channels: {config.method.name} needs {str(self.copies).lower()}, got "
                f"{str(config.augment.channels).lower()}; it {'looks' if self.copies else 'does not look'} at copies of "
                "visible images in one channel"
            )
        if config.memory.shard and not self.shared:
            raise UserError(
                f"memory.shard: {config.method.name} has no memory with a row for every image; use memory.shard=false"
            )
        self.config = config
        self.settings = config.settings
        self.memory: dict[str, Tensor] = {}

    def build(self) -> nn.Module:
        """The network, on the CPU."""
        return Network(self.config.model)

    def texts(self, images: Pair[Images]) -> Pair[Tensor] | None:
        """`[N, variants, L]` int64 tokens of the images' captions, for methods that read any; -1 behind each."""
        return None

    def warm_up(self, forward: Callable[..., Output], views: Views) -> dict[str, Tensor]:
        """The loss terms of one step before the first clustering: instance contrast of views within each modality.

        Args:
            forward: the network, called as `forward(vis=, aug=, ir=, ...)`.
        """
        return contrast_views(forward(**view_inputs(views)).features, views, self.config.train.warm_up.temperature)

    def label(self, features: Features, stage: int, phases: Phases) -> Labels:
        """Pseudo-labels for one epoch.

        Args:
            features: of all training images.
            stage: 0 for the first entry of `train.stages`, and so on.
            phases: `with phases("associate"):` counts the seconds of a part for the log.
        """
        with phases("cluster"):
            return cluster(features.whole, self.config.cluster)

    def memories(self, features: Features, labels: Labels) -> dict[str, Tensor]:
        """Fresh memory banks for the epoch, by name; DCL has one per modality, `[clusters, D]`."""
        banks = features.whole.map(memory.cluster_memory, labels.clusters, labels.counts)
        return {"vis": banks.vis, "ir": banks.ir}

    def batches(self, labels: Labels, settings: Stage, rng: np.random.RandomState) -> Iterator[Pair[np.ndarray]]:
        """Rows of every batch of the epoch, `settings.iterations` of them: pairs across the modalities where they are
        associated.
        """
        own = labels.own.map(lambda part: part.cpu().numpy())
        if labels.cross is None:
            return sampler.independent_batches(own, **shape(settings, rng))
        cross = labels.cross.map(lambda part: part.cpu().numpy())
        return sampler.paired_batches(own, cross, **shape(settings, rng))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the network is called with."""
        kinds = {"vis": batch.vis, "aug": batch.aug, "ir": batch.ir}
        return {name: images for name, images in kinds.items() if images is not None}

    def losses(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms of one step by name; the trainer descends on their sum.

        `L_intra`: cluster contrast of visible images, of their augmented copies and of infrared images, each against
        the own modality's memory (SALCR Eq. 1, 2).
        """
        rows = dict(zip(("vis", "aug", "ir"), output.features.chunk(3), strict=True))
        return {
            kind: ops.cluster_contrast(rows[kind], memories[space], batch.own[space], self.config.memory.temperature)
            for kind, space in _INTRA
        }

    def update(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> None:
        """Update the memories after the optimiser's step (SALCR Eq. 3), in batch order, augmented copies first."""
        vis, aug, ir = output.features.detach().chunk(3)
        momentum = self.config.memory.momentum
        memory.update(memories["vis"], torch.cat([aug, vis]), batch.own.vis.repeat(2), momentum, None)
        memory.update(memories["ir"], ir, batch.own.ir, momentum, None)

    def describe(self, labels: Labels) -> dict[str, float]:
        """Numbers about the epoch's labels for the log."""
        numbers: dict[str, float] = {}
        for name, found, count, clustered in (
            ("vis", labels.clusters.vis, labels.counts.vis, labels.clustered.vis),
            ("ir", labels.clusters.ir, labels.counts.ir, labels.clustered.ir),
        ):
            numbers[f"clusters.{name}"] = count
            numbers[f"outliers.{name}"] = len(found) - clustered
        return numbers

    def oracles(self, features: Features, images: Pair[Images]) -> dict[str, Pair[Tensor]]:
        """Test features that look at true identities, by the label of their rows, which no other row is compared with."""
        return {}


def view_inputs(views: Views) -> dict[str, Tensor | Sequence[Tensor]]:
    """What the network is called with, by the trainer, to see two views of each image, with their captions."""
    infrared = torch.cat([views.first.ir, views.second.ir])
    given: dict[str, Tensor | Sequence[Tensor]] = {"vis": views.first.vis, "aug": views.second.vis, "ir": infrared}
    if views.texts:
        one, other = views.texts
        given |= {"vis_text": [one.vis, other.vis], "ir_text": torch.cat([one.ir, other.ir])}
    return given


def view_rows(rows: Tensor, views: Views) -> tuple[Tensor, ...]:
    """What comes of `view_inputs`, cut: visible images, their other views, infrared images, their other views."""
    return rows.split([len(part) for pair in zip(views.first, views.second, strict=True) for part in pair])


def contrast_views(rows: Tensor, views: Views, temperature: float, what: str = "") -> dict[str, Tensor]:
    """Instance contrast of the two views of each image, within each modality.

    Args:
        rows: `[R, D]` unit rows in the order of `view_inputs`.
        what: put before the names of the terms.
    """
    vis, other, ir, again = view_rows(rows, views)
    return {
        f"{what}vis": instance_contrast(vis, other, temperature),
        f"{what}ir": instance_contrast(ir, again, temperature),
    }


def shape(settings: Stage, rng: np.random.RandomState) -> dict[str, Any]:
    """A stage's settings as the samplers take them."""
    return {
        "label_count": settings.labels,
        "image_count": settings.images,
        "iterations": settings.iterations,
        "rng": rng,
    }


_INTRA: tuple[tuple[str, Modality], ...] = (("vis", "vis"), ("aug", "vis"), ("ir", "ir"))
