"""Evolving multi-view cluster memory (FIRM Eq. 12-16): prototypes that are born, drift, merge, split and retire.

A memory is a set of named tensors over K clusters:

- `prototypes`: `[3, K, D]` by view: fused, visible and infrared features. A view that a cluster lacks is 0.
- `counts`: `[K]` n, images; `scores`: `[3, K]` number, sum and sum of squares of the confidences of accepted updates.
- `groups`: `[K]` int64: clusters of one group are one label across the modalities. Children of a split share their parent's.
- `split`: `[K]` bool, whether the cluster is such a child.
- `labels.vis`, `labels.ir`: `[N]` int64 cluster of each training image, -1 = none.
- `events`: `[6]` how often each of `EVENTS` came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.pair import Pair

Memory = dict[str, Tensor]
EVENTS = ("births", "accepted", "rejected", "merges", "splits", "retirements")
FUSED, VIS, IR = 0, 1, 2


@dataclass(frozen=True)
class Transport:
    """Entropic transport of a batch to the prototypes, per view, whose plan weighs the loss and opens the gate.

    Attributes:
        reg: of the entropy.
        iterations: of Sinkhorn.
        relax: the column marginal is held by a Kullback-Leibler penalty of this weight; 0 = held exactly, as printed.
        marginal: what prototypes take: in proportion to their "counts", or "uniform"ly, as printed.
    """

    reg: float = 0.05
    iterations: int = 5
    relax: float | None = None
    marginal: Literal["counts", "uniform"] | None = None


@dataclass(frozen=True)
class Gate:
    """Which images update the memory: confident in the fused view and in one of its own (Eq. 13).

    Attributes:
        fused: confidence that is needed in the fused view.
        own: confidence that is needed in one of the other views.
        step: b of Eq. 14, by which the prototype moves, times the confidence.
    """

    fused: float = 0.5
    own: float = 0.4
    step: float = 0.2


@dataclass(frozen=True)
class Merge:
    """Clusters whose prototypes are alike in all views that both have become one (Eq. 15).

    Attributes:
        enabled: whether clusters are merged.
        fused: cosine that is needed in the fused view.
        vis: cosine that is needed in the visible view.
        ir: cosine that is needed in the infrared view.
    """

    enabled: bool = True
    fused: float = 0.85
    vis: float = 0.75
    ir: float = 0.75


@dataclass(frozen=True)
class Split:
    """Clusters that are too wide are cut in two by Ward's criterion, again and again (Eq. 16).

    Attributes:
        enabled: whether clusters are split.
        criterion: "dispersion", the mean of 1 - cos(f, p) over the images; or the standard deviation ("conf_std") or variance
            ("conf_var", as printed) of the confidences of updates, which tells nothing of children.
        threshold: above which a cluster is too wide.
        least: images that a child has at least.
    """

    enabled: bool = True
    criterion: Literal["dispersion", "conf_std", "conf_var"] | None = None
    threshold: float = 0.25
    least: int = 5


def bootstrap(views: Pair[Tensor], fused: Pair[Tensor], labels: Pair[Tensor]) -> Memory:
    """The memory of clusters: means of their images' features in each view (Eq. 12).

    Args:
        views: `[N, D]` unit features of each modality's images; fused: their fused ones.
        labels: `[N]` int64 clusters 0 to K - 1, both modalities in one numbering; -1 = none.
    """
    both = torch.cat([labels.vis, labels.ir])
    count = int(both.max()) + 1 if len(both) else 0
    prototypes = [ops.segment_mean(torch.cat([fused.vis, fused.ir]), both, count)]
    prototypes += [ops.segment_mean(views[m], labels[m], count) for m in ("vis", "ir")]
    device = both.device
    return {
        "prototypes": torch.stack(prototypes),
        "counts": torch.bincount(both[both >= 0], minlength=count).float(),
        "scores": torch.zeros(3, count, device=device),
        "groups": torch.arange(count, device=device),
        "split": torch.zeros(count, dtype=torch.bool, device=device),
        "labels.vis": labels.vis,
        "labels.ir": labels.ir,
        "events": torch.zeros(len(EVENTS), device=device),
    }


def present(memory: Memory) -> Tensor:
    """`[3, K]` bool: the views that each cluster has."""
    return memory["prototypes"].abs().amax(2) > 0


def transport(features: Tensor, prototypes: Tensor, counts: Tensor, settings: Transport) -> Tensor:
    """Where the rows of a batch go, `[B, K]`, rows sum to 1: semi-relaxed optimal transport at cost 1 - cos.

    Args:
        features: `[B, D]` unit rows; prototypes: `[K, D]` unit rows; counts: `[K]` images of each.
    """
    cost = 1 - features.detach() @ prototypes.T
    weights = torch.ones_like(counts) if settings.marginal == "uniform" else counts
    plan = ops.sinkhorn(
        cost,
        settings.reg,
        b=weights / weights.sum(),
        relax=settings.relax or None,
        max_iter=settings.iterations,
        tol=0,
    ).plan()
    return plan * len(features)


def gate(fused: Tensor, own: Tensor, settings: Gate) -> Tensor:
    """Which images may update, `[B]` bool, by their confidences in the fused view and in their own modality's (Eq. 13).

    An image has no feature in the other modality's view, whose confidence so counts as 0 in the paper's maximum.
    """
    return (fused > settings.fused) & (own > settings.own)


@torch.no_grad()
def update(memory: Memory, view: int, features: Tensor, clusters: Tensor, steps: Tensor) -> None:
    """`p <- (1 - b) p + b f`, row after row, in one view (Eq. 14). A view that a cluster lacked begins with the feature.

    Args:
        features: `[B, D]`; clusters: `[B]` int64, -1 = no update; steps: `[B]` b.
    """
    bank = memory["prototypes"][view]
    lacking = bank.abs().amax(1) == 0
    kept = torch.where(lacking[clusters.clamp(min=0)], 0, 1 - steps)
    ops.memory_update_(bank, features.to(bank.dtype), clusters, kept, normalize=False)


@torch.no_grad()
def count(memory: Memory, clusters: Tensor, confidence: Tensor) -> None:
    """Add a batch's accepted updates to the statistics of their clusters, and both kinds to the events.

    Args:
        clusters: `[B]` int64, -1 = rejected; confidence: `[B]` in the fused view.
    """
    accepted = clusters >= 0
    columns = membership(clusters, len(memory["counts"])).to(confidence.dtype)
    found = torch.stack([torch.ones_like(confidence), confidence, confidence.square()]) @ columns
    memory["counts"] += found[0]
    memory["scores"] += found
    memory["events"][EVENTS.index("accepted")] += accepted.sum()
    memory["events"][EVENTS.index("rejected")] += (~accepted).sum()


def membership(clusters: Tensor, number: int) -> Tensor:
    """`[B, K]` bool: which of `number` clusters each row is of; a row of -1 is of none."""
    return clusters.unsqueeze(1) == torch.arange(number, device=clusters.device)


def rebuild(memory: Memory | None, fresh: Memory) -> Memory:
    """`fresh`, whose clusters take over the statistics of those of `memory` that they are the successors of.

    A new cluster succeeds the old one that most of its images come from, if most of that one's images came to it. Others are
    births; old ones without a successor retire. All images of both are the same.
    """
    events = fresh["events"] if memory is None else memory["events"].clone()
    births, retirements = len(fresh["counts"]), 0
    if memory is not None:
        old, new = _all_labels(memory), _all_labels(fresh)
        kept = (old >= 0) & (new >= 0)
        shape = (len(memory["counts"]), len(fresh["counts"]))
        table = torch.bincount(old[kept] * shape[1] + new[kept], minlength=shape[0] * shape[1]).view(shape)
        if min(shape):
            ancestor = table.argmax(0)
            columns = torch.arange(shape[1], device=table.device)
            heir = (table.argmax(1)[ancestor] == columns) & (table.amax(0) > 0)
            fresh["scores"] = memory["scores"][:, ancestor] * heir
            births, retirements = shape[1] - int(heir.sum()), shape[0] - int(heir.sum())
    events[EVENTS.index("births")] += births
    events[EVENTS.index("retirements")] += retirements
    return fresh | {"events": events}


def relabel(memory: Memory, fused: Pair[Tensor]) -> Memory:
    """Images move to their nearest fused prototype; those in no cluster stay out, and clusters left without any retire."""
    bank = F.normalize(memory["prototypes"][FUSED])
    moved = {}
    for modality in ("vis", "ir"):
        old = memory[f"labels.{modality}"]
        nearest = ops.topk(fused[modality], bank, 1)[1][:, 0]
        moved[f"labels.{modality}"] = torch.where(old >= 0, nearest, -1)
    memory = memory | moved
    taken = torch.bincount(_all_labels(memory).clamp(min=-1) + 1, minlength=len(bank) + 1)[1:] > 0
    events = memory["events"].clone()
    events[EVENTS.index("retirements")] += int((~taken).sum())
    return _renumber(memory | {"events": events}, torch.where(taken, taken.cumsum(0) - 1, -1), taken)


def merge(memory: Memory, settings: Merge) -> Memory:
    """Merge clusters that are alike in all views that both have, the most alike in the fused view first (Eq. 15).

    Statistics are added, prototypes averaged; where one of two lacks a view, the other's is taken.
    """
    prototypes, has = memory["prototypes"].clone(), present(memory)
    counts, scores, groups, split = (memory[name].clone() for name in ("counts", "scores", "groups", "split"))
    number = len(counts)
    target = torch.arange(number, device=counts.device)
    limits = prototypes.new_tensor([settings.fused, settings.vis, settings.ir]).view(3, 1, 1)
    alike = _alike(prototypes, prototypes, has, has, limits)
    alike.fill_diagonal_(-torch.inf)
    merges = 0
    while number and alike.max() > -torch.inf:
        first, second = sorted(divmod(int(alike.argmax()), number))
        both = has[:, first] & has[:, second]
        total = prototypes[:, first] + prototypes[:, second]
        prototypes[:, first] = torch.where(both.unsqueeze(1), total / 2, total)
        has[:, first] |= has[:, second]
        has[:, second] = False
        prototypes[:, second] = 0
        counts[first] += counts[second]
        scores[:, first] += scores[:, second]
        groups = torch.where(groups == groups[second], groups[first], groups)
        split[first] &= split[second]
        target[target == second] = first
        row = _alike(prototypes[:, first : first + 1], prototypes, has[:, first : first + 1], has, limits)[0]
        row[first] = -torch.inf
        alike[first], alike[:, first] = row, row
        alike[second], alike[:, second] = -torch.inf, -torch.inf
        merges += 1
    kept = target == torch.arange(number, device=target.device)
    events = memory["events"].clone()
    events[EVENTS.index("merges")] += merges
    memory = memory | {"prototypes": prototypes, "counts": counts, "scores": scores, "groups": groups, "split": split}
    return _renumber(memory | {"events": events}, (kept.cumsum(0) - 1)[target], kept)


def split(memory: Memory, views: Pair[Tensor], fused: Pair[Tensor], settings: Split) -> Memory:
    """Cut clusters that are too wide (Eq. 16). Children begin with the means of their images and share their parent's group."""
    labels, rows = _all_labels(memory), torch.cat([fused.vis, fused.ir])
    number = len(memory["counts"])
    origin = list(range(number))
    scores = memory["scores"]
    mean = scores[1] / scores[0].clamp(min=1)
    variance = (scores[2] / scores[0].clamp(min=1) - mean.square()).clamp(min=0)
    spread = {"conf_var": variance, "conf_std": variance.sqrt()}.get(settings.criterion or "")
    centres = F.normalize(memory["prototypes"][FUSED])
    splits = 0
    for cluster in range(number):
        members = (labels == cluster).nonzero().flatten()
        if spread is None:
            children = _divide(rows, members, centres[cluster], settings)
        else:
            children = _halve(rows, members, settings.least) if spread[cluster] > settings.threshold else [members]
        splits += len(children) > 1
        for child in children[1:]:
            labels = labels.index_fill(0, child, len(origin))
            origin.append(cluster)
    source = torch.tensor(origin, dtype=torch.int64, device=labels.device)
    halves = Pair(*labels.split([len(fused.vis), len(fused.ir)]))
    fresh = bootstrap(views, fused, halves)
    if len(fresh["counts"]) < len(source):  # the last clusters have no image
        raise ValueError("memory must have an image in every cluster")
    changed = torch.bincount(source, minlength=number)[source] > 1
    kept = {name: memory[name].index_select(-1, source) for name in ("counts", "scores", "groups", "split")}
    events = memory["events"].clone()
    events[EVENTS.index("splits")] += splits
    events[EVENTS.index("births")] += len(source) - number
    return {
        "prototypes": torch.where(changed.view(1, -1, 1), fresh["prototypes"], memory["prototypes"][:, source]),
        "counts": torch.where(changed, fresh["counts"], kept["counts"]),
        "scores": torch.where(changed, 0, kept["scores"]),
        "groups": kept["groups"],
        "split": kept["split"] | changed,
        "labels.vis": halves.vis,
        "labels.ir": halves.ir,
        "events": events,
    }


def dispersion(rows: Tensor, centre: Tensor) -> Tensor:
    """`mean(1 - cos(f, p))` of unit rows `[n, D]` and a unit prototype `[D]`."""
    return 1 - (rows @ centre).mean()


def _divide(rows: Tensor, members: Tensor, centre: Tensor, settings: Split) -> list[Tensor]:
    """The members of a cluster in as many parts as it takes for none to be too wide, or too small to be cut."""
    if len(members) < 2 * settings.least or dispersion(rows[members], centre) <= settings.threshold:
        return [members]
    children = _halve(rows, members, settings.least)
    if len(children) == 1:
        return children
    return [
        part for child in children for part in _divide(rows, child, F.normalize(rows[child].mean(0), dim=0), settings)
    ]


def _halve(rows: Tensor, members: Tensor, least: int) -> list[Tensor]:
    """Two parts by Ward's criterion, or the whole where one would be smaller than `least`."""
    if len(members) < 2 * least:
        return [members]
    found = AgglomerativeClustering(2, linkage="ward").fit_predict(rows[members].cpu().numpy())
    side = torch.from_numpy(found).to(members.device) == 1
    children = [members[~side], members[side]]
    return children if min(map(len, children)) >= least else [members]


def _alike(one: Tensor, other: Tensor, has: Tensor, others: Tensor, limits: Tensor) -> Tensor:
    """`[K, L]` cosine in the fused view, -inf where a view that both have is not above its limit."""
    cosines = F.normalize(one, dim=2) @ F.normalize(other, dim=2).transpose(1, 2)
    both = has.unsqueeze(2) & others.unsqueeze(1)
    return torch.where(((cosines > limits) | ~both).all(0) & both[FUSED], cosines[FUSED], -torch.inf)


def _all_labels(memory: Memory) -> Tensor:
    return torch.cat([memory["labels.vis"], memory["labels.ir"]])


def _renumber(memory: Memory, number: Tensor, kept: Tensor) -> Memory:
    """Only the clusters `kept` `[K]` bool; `number` `[K]` is what each old one is called now."""
    moved = {name: memory[name][..., kept] for name in ("counts", "scores", "split")}
    moved["prototypes"] = memory["prototypes"][:, kept]
    moved["groups"] = memory["groups"][kept].unique(return_inverse=True)[1]
    for modality in ("vis", "ir"):
        old = memory[f"labels.{modality}"]
        moved[f"labels.{modality}"] = torch.where(old >= 0, F.pad(number, (0, 1))[old], -1)
    return memory | moved
