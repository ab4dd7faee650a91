"""The DCL baseline, and the six functions that a method is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import memory, ops
from engine.cluster import Labels, cluster
from engine.config import Config
from engine.data.loader import Batch
from engine.features import Features
from engine.model.network import Network, Output
from engine.pair import Modality
from engine.phases import Phases


class Method:
    """Dual-contrastive learning within each modality (SALCR Eq. 1-3), and the base of every method.

    The trainer calls the functions in the order in which they stand here. None of them touches the optimiser, files or
    logs.
    """

    @dataclass(frozen=True)
    class Settings:
        """The method's own section of the YAML; DCL has no settings of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = config.settings

    def build(self) -> nn.Module:
        """The network, on the CPU."""
        return Network(self.config.model)

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


_INTRA: tuple[tuple[str, Modality], ...] = (("vis", "vis"), ("aug", "vis"), ("ir", "ir"))
