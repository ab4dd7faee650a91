"""Pseudo-labels from features, and how good they are where identities are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from engine import config, ops
from engine.pair import Pair

BLOCK_ENTRIES = 1 << 24
"""Distances held at a time: 64 MB."""


@dataclass(frozen=True)
class Labels:
    """Pseudo-labels of the training images for one epoch; all `[N]` int64, -1 = left out of the epoch.

    Attributes:
        clusters: DBSCAN's clusters per modality: what the memories are means of.
        own: training labels in the own modality's label space; the clusters, unless a method moved them.
        cross: labels in the other modality's label space (vis: of visible images, among infrared clusters), or None
            while the modalities are not associated.
    """

    clusters: Pair[Tensor]
    own: Pair[Tensor]
    cross: Pair[Tensor] | None = None

    @property
    def counts(self) -> Pair[int]:
        """Clusters per modality."""
        return self._totals.map(lambda totals: totals[0])

    @property
    def clustered(self) -> Pair[int]:
        """Images in clusters per modality."""
        return self._totals.map(lambda totals: totals[1])

    @property
    def rows(self) -> Pair[Tensor]:
        """The images in clusters per modality, `[clustered]` int64, ascending."""
        return self.clusters.map(lambda labels, count: (labels < 0).sort(stable=True).indices[:count], self.clustered)

    def moved(self, own: Pair[Tensor], cross: Pair[Tensor]) -> Labels:
        """The same clusters, which need not be counted again, with training labels of a method."""
        return self._with(own=own, cross=cross)

    def to(self, device: torch.device) -> Labels:
        """The same labels on a device."""
        names = ("clusters", "own") if self.cross is None else ("clusters", "own", "cross")
        return self._with(**{name: getattr(self, name).map(lambda rows: rows.to(device)) for name in names})

    def _with(self, **parts: Pair[Tensor]) -> Labels:
        """The same clusters, at most elsewhere."""
        labels = replace(self, **parts)
        object.__setattr__(labels, "_totals", self._totals)
        return labels

    @cached_property
    def _totals(self) -> Pair[tuple[int, int]]:
        """`counts` and `clustered`, by the one wait for the device that labels need."""
        parts = [
            torch.stack([F.pad(labels, (0, 1), value=-1).max() + 1, (labels >= 0).sum()]) for labels in self.clusters
        ]
        (vis_count, vis_clustered), (ir_count, ir_clustered) = torch.stack(parts).tolist()
        return Pair((vis_count, vis_clustered), (ir_count, ir_clustered))


def cluster(features: Pair[Tensor], settings: config.Cluster) -> Labels:
    """k-reciprocal Jaccard distance and DBSCAN, each modality for itself.

    Args:
        features: `[N, D]` unit rows per modality.

    Returns:
        Labels without association; a modality in which nothing is dense enough has only -1.
    """

    clusters = features.map(lambda rows, k1, eps: dense(rows, k1, eps, settings), settings.k1, settings.eps)
    return Labels(clusters, clusters)


def dense(rows: Tensor, k1: int, eps: float, settings: config.Cluster) -> Tensor:
    """Clusters of unit rows `[N, D]`, `[N]` int64, -1 = in none."""
    return ops.dbscan(ops.jaccard(rows, k1, settings.k2), eps, settings.min_samples)


def quality(labels: Labels, ids: Pair[np.ndarray]) -> dict[str, float]:
    """Scores of pseudo-labels against true identities (-1 = unknown, not scored).

    Returns:
        `ari.vis`, `ami.vis`, `ari.ir`, `ami.ir` over images in clusters, and, where the modalities are associated,
        `cross.precision` and `cross.recall`: of the visible-infrared pairs that share a label the part that shares an
        identity, and of the pairs that share an identity the part that shares a label (mean of both label spaces).
        Empty where no identity is known.
    """
    scores: dict[str, float] = {}
    own = labels.own.map(lambda rows: rows.cpu().numpy())
    for name, found, true in (("vis", own.vis, ids.vis), ("ir", own.ir, ids.ir)):
        known = (found >= 0) & (true >= 0)
        if known.any():
            scores[f"ari.{name}"] = float(adjusted_rand_score(true[known], found[known]))
            scores[f"ami.{name}"] = float(adjusted_mutual_info_score(true[known], found[known]))
    if labels.cross is not None and (ids.vis >= 0).any() and (ids.ir >= 0).any():
        cross = labels.cross.map(lambda rows: rows.cpu().numpy())
        spaces = [(own.vis, cross.ir), (cross.vis, own.ir)]
        pairs = [_pair_scores(*space, ids.vis, ids.ir) for space in spaces if all((rows >= 0).any() for rows in space)]
        if pairs:
            scores["cross.precision"], scores["cross.recall"] = (
                float(np.mean(part)) for part in zip(*pairs, strict=True)
            )
    return scores


def _pair_scores(vis: np.ndarray, ir: np.ndarray, vis_ids: np.ndarray, ir_ids: np.ndarray) -> tuple[float, float]:
    """Precision and recall over all visible-infrared pairs of one label space."""
    known = Pair((vis >= 0) & (vis_ids >= 0), (ir >= 0) & (ir_ids >= 0))
    people = 1 + max(vis_ids.max(), ir_ids.max())
    both = _common(vis[known.vis] * people + vis_ids[known.vis], ir[known.ir] * people + ir_ids[known.ir])
    shared = _common(vis[known.vis], ir[known.ir])
    same = _common(vis_ids[vis_ids >= 0], ir_ids[ir_ids >= 0])
    return both / max(shared, 1), both / max(same, 1)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many pairs of an entry of each are equal."""
    (values, counts), (others, other_counts) = (np.unique(part, return_counts=True) for part in (one, other))
    _, places, other_places = np.intersect1d(values, others, assume_unique=True, return_indices=True)
    return int(counts[places] @ other_counts[other_places])


def relabel_nearest(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Every labelled row's nearest mean instead of its label (squared Euclidean distance; -1 stays).

    Args:
        features: `[N, D]`; labels: `[N]` int64; means: `[C, D]`.
    """
    lengths = means.square().sum(1)
    blocks = features.split(max(1, BLOCK_ENTRIES // max(1, len(means))))
    nearest = [(lengths - 2 * (rows @ means.T)).argmin(1) for rows in blocks]
    return torch.where(labels >= 0, torch.cat(nearest), labels)
