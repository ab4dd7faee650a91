"""SALCR: Semantic-Aligned Learning with Collaborative Refinement (Cheng et al., IJCV 2025, arXiv 2504.19244)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine import memory, ops, shards
from engine.associate import associate
from engine.cluster import Labels, relabel_nearest
from engine.config import check_ranges
from engine.data.loader import Batch
from engine.features import Features
from engine.methods.base import Method
from engine.model.network import Network, Output
from engine.pair import Modality, Pair
from engine.phases import Phases
from engine.shards import Bank

Reading = Literal["released", "paper"]
Mean = Literal["bank", "kind"]
# Where released code and paper differ: the switch, and what each reading sets it to.
READINGS: dict[str, tuple[Any, Any]] = {
    "dagl.prototypes": ("means", "memories"),
    "dagl.relabel": (True, False),
    "dagl.mean": ("bank", "kind"),
    "fgsal.stripes": ("floor", "ceil"),
    "fgsal.mean": ("bank", "kind"),
    "gpcr.views": ("all", "pair"),
    "gpcr.mean": ("bank", "kind"),
}


@dataclass(frozen=True)
class Dagl:
    """Dual association with global learning (Eq. 4-8).

    The released code and the paper's text differ; a switch left empty follows `salcr.reading`.

    Attributes:
        enabled: without it stage 2 goes on as stage 1.
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
    mean: Mean | None = None


@dataclass(frozen=True)
class Cmfp:
    """Cross-modality feature propagation before the association (Eq. 28, 29).

    Attributes:
        enabled: whether features are propagated before they are associated.
        k: neighbours per block, k_tr (Tables 11, 12).
    """

    enabled: bool = True
    k: int = 30


@dataclass(frozen=True)
class Transport:
    """Entropic optimal transport.

    Attributes:
        reg: weight of the entropy, 1 / lambda of the paper.
        tol: error of the marginal at which the iteration stops.
        max_iter: iterations at most.
    """

    reg: float = 0.2
    tol: float = 1e-3
    max_iter: int = 500


@dataclass(frozen=True)
class Fgsal:
    """Fine-grained semantic-aligned learning (Eq. 9-15); needs the pairs that DAGL finds.

    Attributes:
        enabled: whether there are part features.
        parts: N_p, stripes that the feature map is cut into (Tables 9, 10).
        stripes: all of equal length, the remainder dropped (released, "floor"), or the last one shorter (paper, "ceil").
        mean: the loss is one mean over all rows of a bank (released, "bank") or one per kind of query and kind of map,
            summed (paper, "kind", Eq. 12-14).
        augmented_query_on_infrared: whether the queries of augmented copies look at infrared maps. By a slip in an index the
            released code uses what they see on visible maps a second time instead: `false`.
    """

    enabled: bool = True
    parts: int = 3
    stripes: Literal["floor", "ceil"] | None = None
    mean: Mean | None = None
    augmented_query_on_infrared: bool = True


@dataclass(frozen=True)
class Gpcr:
    """Global-part collaborative refinement (Eq. 16-27); needs the pairs that DAGL finds.

    Attributes:
        enabled: whether labels are refined.
        level: features that are refined (Table 7); those of parts where FGSAL gives them.
        k: neighbours in an instance memory (Figs. 5, 6).
        weight: lambda of Eq. 30 (Figs. 5, 6).
        views: whose neighbours a global positive is among, and which rows have a loss: visible, augmented and infrared image
            (released, "all"), or without the augmented copy (paper, "pair", Eq. 16-20).
        mean: the loss is one mean over all rows of a bank (released, "bank") or one per kind of image, for parts per kind of
            query and kind of map, summed (paper, "kind", Eq. 18-20, 24-26).
    """

    enabled: bool = True
    level: Literal["both", "global", "part"] = "both"
    k: int = 30
    weight: float = 0.5
    views: Literal["all", "pair"] | None = None
    mean: Mean | None = None


class Salcr(Method):
    """Stage 1 is the DCL baseline; from stage 2 on the modalities learn from each other's clusters.

    Memories of stage 2, by name, with `G = 1 + 2 N_p` groups (1 without FGSAL) and `I = 1 + N_p` (1 without part level):

    - `vis`, `ir`: `[G, clusters, D]` cluster prototypes of that modality's label space: of global features, of the part
      features of visible and augmented queries, and of those of infrared queries.
    - `instances.vis`, `instances.ir`: `[I, images in clusters, D]` features of that modality's images, constant within the
      epoch: global ones, then each part's.
    """

    @dataclass(frozen=True)
    class Settings:
        """All of SALCR's settings.

        Attributes:
            reading: where released code and paper differ, which one the switches follow that are not set.
        """

        reading: Reading = "released"
        dagl: Dagl = Dagl()
        cmfp: Cmfp = Cmfp()
        transport: Transport = Transport()
        fgsal: Fgsal = Fgsal()
        gpcr: Gpcr = Gpcr()

        def __post_init__(self) -> None:
            column = ("released", "paper").index(self.reading)
            for path, values in READINGS.items():
                module, name = path.split(".")
                section = getattr(self, module)
                if getattr(section, name) is None:
                    object.__setattr__(self, module, replace(section, **{name: values[column]}))
            parts, gpcr, cmfp, transport = self.fgsal.parts, self.gpcr, self.cmfp, self.transport
            check_ranges(
                [
                    ("salcr.fgsal.parts", parts, parts >= 1, "at least 1 (for none, salcr.fgsal.enabled=false)"),
                    ("salcr.gpcr.k", gpcr.k, gpcr.k >= 1, "at least 1"),
                    ("salcr.gpcr.weight", gpcr.weight, gpcr.weight >= 0, "at least 0"),
                    ("salcr.cmfp.k", cmfp.k, cmfp.k >= 1, "at least 1"),
                    ("salcr.transport.reg", transport.reg, transport.reg > 0, "a number above 0"),
                    ("salcr.transport.tol", transport.tol, transport.tol >= 0, "at least 0"),
                    ("salcr.transport.max_iter", transport.max_iter, transport.max_iter >= 1, "at least 1"),
                ]
            )

    settings: Settings
    shared = ("instances.vis", "instances.ir")

    def build(self) -> nn.Module:
        """The network, with the part head where FGSAL is on.

        Raises:
            UserError: images are too small for its parts.
        """
        fgsal = self.settings.fgsal
        parts = fgsal.parts if fgsal.enabled and self.settings.dagl.enabled else 0
        network = Network(self.config.model, parts, uneven_parts=fgsal.stripes == "ceil")
        if parts:  # noticed now, and not when stage 2 begins
            with torch.no_grad():
                network.eval()(vis=torch.zeros(1, 3, *self.config.data.size), stage=1)
        return network.train()

    def label(self, features: Features, stage: int, phases: Phases) -> Labels:
        """Clusters, and from stage 2 on the labels across modalities (Eq. 4, 5)."""
        labels = super().label(features, stage, phases)
        if stage == 0 or not self.settings.dagl.enabled or 0 in labels.counts:
            return labels
        with phases("associate"):
            return self._associate(features, labels)

    def _associate(self, features: Features, labels: Labels) -> Labels:
        dagl, transport = self.settings.dagl, self.settings.transport
        kept = labels.rows
        clusters = labels.clusters.map(lambda found, rows: found[rows], kept)
        moved = features.whole.map(lambda part, rows: features.storage.take([part], rows)[0], kept)
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
            cross = Pair(*(torch.full_like(cross[m], -1) if m == unused else cross[m] for m in _SPACES))

        def spread(part: Tensor, rows: Tensor, all_rows: Tensor) -> Tensor:
            return torch.full_like(all_rows, -1).index_copy(0, rows, part)

        own = clusters.map(spread, kept, labels.clusters)
        return labels.moved(own, cross.map(spread, kept, labels.clusters))

    def memories(self, features: Features, labels: Labels) -> dict[str, Tensor]:
        """Fresh memories, see the class; cluster prototypes are means of the queries' own features on their own maps."""
        if labels.cross is None:
            return super().memories(features, labels)
        gpcr = self.settings.gpcr
        banks: dict[str, Tensor] = {}
        for space in _SPACES:
            found, count = labels.clusters[space], labels.counts[space]
            levels = [features.whole[space], *(features.parts[space] if features.parts is not None else ())]
            prototypes = [memory.cluster_memory(rows, found, count) for rows in levels]
            banks[space] = torch.stack(prototypes + prototypes[1:])
            if gpcr.enabled:
                instances = levels if gpcr.level != "global" else levels[:1]
                rows = labels.rows[space]
                if self.config.memory.shard:
                    rows, banks[f"instances.{space}.first"] = shards.own_rows(rows)
                banks[f"instances.{space}"] = features.storage.take(instances, rows)
        return banks

    def losses(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_dagl + L_fgsal + lambda L_gpcr` (Eq. 30), of the modules that are on; DCL's without an association."""
        if batch.cross is None:
            return super().losses(output, batch, memories)
        terms = self._dagl(output.features, batch, memories)
        parts = self._parts(output)
        if parts is not None:
            terms |= self._fgsal(parts, batch, memories)
        if self.settings.gpcr.enabled:
            terms |= self._gpcr(output.features, parts, memories)
        return terms

    def _dagl(self, features: Tensor, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_dagl`: every kind of image against the clusters of both modalities (Eq. 5-8)."""
        kinds = 1 if self.settings.dagl.mean == "bank" else 3
        return {
            f"dagl.{space}": self._contrast(features, memories[space][0], batch.labels(space), kinds)
            for space in _SPACES
        }

    def _parts(self, output: Output) -> Tensor | None:
        """`[N_p, Q, M, s, D]` part features as the losses take them, by kinds visible, augmented, infrared."""
        parts = output.parts
        if parts is None or self.settings.fgsal.augmented_query_on_infrared:
            return parts
        vis, aug, ir = parts.unbind(1)
        return torch.stack([vis, torch.stack([aug[:, 0], aug[:, 1], aug[:, 0]], dim=1), ir], dim=1)

    def _fgsal(self, parts: Tensor, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_fgsal`: what a query sees on any map carries the labels of the query's image (Eq. 12-15)."""
        terms = {}
        for modality, rows, labels, group in self._queries(parts, batch):
            kinds = 1 if self.settings.fgsal.mean == "bank" else rows.shape[1] // parts.shape[3]
            spaces = [self._contrast(rows, memories[space][group], labels[space], kinds) for space in _SPACES]
            terms[f"fgsal.{modality}"] = torch.stack(spaces).sum(0).mean()
        return terms

    def _queries(self, parts: Tensor, batch: Batch) -> list[tuple[Modality, Tensor, Pair[Tensor], slice]]:
        """Part features by the modality of their query: `[N_p, R, D]` rows, `[R]` labels in both spaces, memory groups."""
        count, _, maps, size, _ = parts.shape
        found: list[tuple[Modality, Tensor, Pair[Tensor], slice]] = []
        kinds = {"vis": slice(0, 2), "ir": slice(2, 3)}
        for i, modality in enumerate(_SPACES):
            chosen = kinds[modality]
            labels = [batch.labels(space).view(3, 1, size)[chosen].expand(-1, maps, -1).flatten() for space in _SPACES]
            group = slice(1 + i * count, 1 + (i + 1) * count)
            found.append((modality, parts[:, chosen].flatten(1, 3), Pair(*labels), group))
        return found

    def _contrast(self, rows: Tensor, bank: Tensor, labels: Tensor, kinds: int) -> Tensor:
        """Sum over `kinds` runs of rows of their mean contrast; `[..., R, D]` rows -> `[...]`."""
        temperature = self.config.memory.temperature
        runs = zip(rows.chunk(kinds, dim=-2), labels.chunk(kinds), strict=True)
        return torch.stack([ops.cluster_contrast(part, bank, chosen, temperature) for part, chosen in runs]).sum(0)

    def _gpcr(self, features: Tensor, parts: Tensor | None, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`lambda L_gpcr`: against instance memories, with positives that agree across modalities and levels (Eq. 16-27)."""
        gpcr = self.settings.gpcr
        terms: dict[str, list[Tensor]] = {}
        for space in _SPACES:
            bank = Bank.of(memories, f"instances.{space}")
            _, near = bank[0].topk(features.detach(), gpcr.k)
            near = near.unflatten(0, (3, -1))  # [kind, s, k]
            if gpcr.level != "part":
                terms.setdefault("gpcr.global", []).append(self._global_refinement(features, bank[0], near))
            if gpcr.level != "global" and parts is not None:
                terms.setdefault("gpcr.part", []).append(self._part_refinement(parts, bank[1:], near))
        return {name: gpcr.weight * torch.stack(spaces).sum() for name, spaces in terms.items()}

    def _global_refinement(self, features: Tensor, bank: Bank, near: Tensor) -> Tensor:
        """Positives: neighbours of the visible and of the infrared image at once, and of the copy (Eq. 16-20)."""
        step = 2 if self.settings.gpcr.views == "pair" else 1  # visible, augmented, infrared; without the second
        views, rows = near[::step], features.unflatten(0, (3, -1))[::step]
        positives = reduce(ops.set_intersection, views)
        return self._refine(rows.flatten(0, 1), bank, positives.repeat(len(views), 1), len(views))

    def _part_refinement(self, parts: Tensor, bank: Bank, near: Tensor) -> Tensor:
        """Positives: global neighbours of the query's image that the same query has on one of the other maps (Eq. 21-26)."""
        count, queries, maps, size, _ = parts.shape
        rows = parts.flatten(1, 3)
        _, found = bank.topk(rows.detach(), self.settings.gpcr.k)
        shape = (count, queries, maps, size, found.shape[2])
        found = found.view(shape)
        others = ops.set_union(*(found.roll(shift, dims=2).flatten(0, 3) for shift in (1, 2)))
        reliable = near.unsqueeze(1).expand(shape).flatten(0, 3)
        positives = ops.set_intersection(reliable, others).view(count, -1, found.shape[4])
        return self._refine(rows, bank, positives, queries * maps).mean()

    def _refine(self, rows: Tensor, bank: Bank, positives: Tensor, kinds: int) -> Tensor:
        """Contrast with sets of positives: one mean, or the sum of those of `kinds` runs of rows; `[..., R, D]` -> `[...]`."""
        temperature = self.config.memory.temperature
        count = 1 if self.settings.gpcr.mean == "bank" else kinds
        runs = zip(rows.chunk(count, dim=-2), positives.chunk(count, dim=-2), strict=True)
        return torch.stack([bank.neighbor_contrast(part, chosen, temperature) for part, chosen in runs]).sum(0)

    def update(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> None:
        """Update all cluster prototypes with the rows that carry their labels, in a random order (Eq. 7)."""
        if batch.cross is None:
            return super().update(output, batch, memories)
        parts = self._parts(output)
        queries = [] if parts is None else self._queries(parts.detach(), batch)
        rows = torch.cat([output.features.detach(), *(seen.flatten(0, 1) for _, seen, _, _ in queries)])
        for space in _SPACES:
            bank, labels = memories[space], [batch.labels(space)]
            for _, _, given, group in queries:
                # The groups' prototypes follow one another: all of them are updated at once.
                first = torch.arange(group.start, group.stop, device=bank.device).unsqueeze(1) * bank.shape[1]
                labels.append(torch.where(given[space] < 0, -1, given[space] + first).flatten())
            memory.update(bank.flatten(0, 1), rows, torch.cat(labels), self.config.memory.momentum, batch.generator)


_SPACES: tuple[Modality, ...] = ("vis", "ir")
