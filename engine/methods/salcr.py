"""SALCR: Semantic-Aligned Learning with Collaborative Refinement (Cheng et al., IJCV 2025, arXiv 2504.19244)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from engine import memory, ops
from engine.associate import associate
from engine.cluster import Labels, relabel_nearest
from engine.data.loader import Batch
from engine.methods.base import Method
from engine.model.network import Output
from engine.pair import Modality, Pair
from engine.phases import Phases

Reading = Literal["released", "paper"]
# Where released code and paper differ: the switch of `dagl`, and what each reading sets it to.
READINGS = {"prototypes": ("means", "memories"), "relabel": (True, False), "mean": ("bank", "kind")}


@dataclass(frozen=True)
class Dagl:
    """Dual association with global learning (Eq. 4-8).

    The released code and the paper's text differ; a switch left empty follows `salcr.reading`.

    Attributes:
        branch: label spaces that link the modalities: both, or one alone (Table 4).
        prototypes: what images are transported to: "means" of the propagated features (released), or the "memories"
            (paper, Eq. 4).
        relabel: whether an image's own label moves to its nearest mean (released) or stays its cluster (paper).
        mean: the loss is one mean over all rows of a bank (released, "bank") or one per kind of image, summed
            (paper, "kind", Eq. 5-7).
    """

    enabled: bool = True
    branch: Literal["dual", "visible", "infrared"] = "dual"
    prototypes: Literal["means", "memories"] | None = None
    relabel: bool | None = None
    mean: Literal["bank", "kind"] | None = None


@dataclass(frozen=True)
class Cmfp:
    """Cross-modality feature propagation before the association (Eq. 28, 29): `k` neighbours per block."""

    enabled: bool = True
    k: int = 30


@dataclass(frozen=True)
class Transport:
    """Entropic optimal transport: `reg` = 1 / lambda of the paper; the iteration stops at `tol` or `max_iter`."""

    reg: float = 0.2
    tol: float = 1e-3
    max_iter: int = 500


class Salcr(Method):
    """Stage 1 is the DCL baseline; from stage 2 on the modalities learn from each other's clusters."""

    @dataclass(frozen=True)
    class Settings:
        """`reading`: where released code and paper differ, which one the switches follow that are not set."""

        reading: Reading = "released"
        dagl: Dagl = Dagl()
        cmfp: Cmfp = Cmfp()
        transport: Transport = Transport()

        def __post_init__(self) -> None:
            column = ("released", "paper").index(self.reading)
            unset: dict[str, Any] = {
                name: values[column] for name, values in READINGS.items() if getattr(self.dagl, name) is None
            }
            object.__setattr__(self, "dagl", replace(self.dagl, **unset))

    settings: Settings

    def label(self, features: Pair[Tensor], stage: int, phases: Phases) -> Labels:
        """Clusters, and from stage 2 on the labels across modalities (Eq. 4, 5)."""
        labels = super().label(features, stage, phases)
        if stage == 0 or not self.settings.dagl.enabled or 0 in labels.counts:
            return labels
        with phases("associate"):
            return self._associate(features, labels)

    def _associate(self, features: Pair[Tensor], labels: Labels) -> Labels:
        dagl, transport = self.settings.dagl, self.settings.transport
        kept = labels.rows
        clusters = labels.clusters.map(lambda found, rows: found[rows], kept)
        moved = features.map(lambda part, rows: part[rows], kept)
        memories = moved.map(memory.cluster_memory, clusters, labels.counts)
        if self.settings.cmfp.enabled:
            moved = Pair(*ops.cmfp(moved.vis, moved.ir, self.settings.cmfp.k))
        means = moved.map(ops.segment_mean, clusters, labels.counts)
        if dagl.relabel:
            clusters = moved.map(relabel_nearest, clusters, means)
        prototypes = means if dagl.prototypes == "means" else memories
        cross = associate(moved, prototypes, transport.reg, transport.tol, transport.max_iter)
        # Labels among visible clusters belong to infrared images, and the other way round.
        if dagl.branch != "dual":
            unused: Modality = "vis" if dagl.branch == "visible" else "ir"
            cross = Pair(*(torch.full_like(cross[m], -1) if m == unused else cross[m] for m in ("vis", "ir")))

        def spread(part: Tensor, rows: Tensor, all_rows: Tensor) -> Tensor:
            return torch.full_like(all_rows, -1).index_copy(0, rows, part)

        own = clusters.map(spread, kept, labels.clusters)
        return labels.moved(own, cross.map(spread, kept, labels.clusters))

    def losses(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_dagl`: every kind of image against the clusters of both modalities (Eq. 5-8)."""
        if batch.cross is None:
            return super().losses(output, batch, memories)
        kinds = 1 if self.settings.dagl.mean == "bank" else 3
        terms = {}
        for space in _SPACES:
            rows = zip(output.features.chunk(kinds), batch.labels(space).chunk(kinds), strict=True)
            parts = [
                ops.cluster_contrast(part, memories[space], labels, self.config.memory.temperature)
                for part, labels in rows
            ]
            terms[f"dagl.{space}"] = torch.stack(parts).sum()
        return terms

    def update(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> None:
        """Update both memories with all rows that carry one of their labels, in a random order (Eq. 3)."""
        if batch.cross is None:
            return super().update(output, batch, memories)
        for space in _SPACES:
            memory.update(
                memories[space],
                output.features.detach(),
                batch.labels(space),
                self.config.memory.momentum,
                batch.generator,
            )


_SPACES: tuple[Modality, ...] = ("vis", "ir")
