"""Retrieval scores: CMC, mAP, mINP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops import _check, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype

PROTOCOLS = ("plain", "sysu", "llcm")
BLOCK_ENTRIES = 1 << 21
"""Distances ranked at a time."""


@dataclass(frozen=True)
class Ranking:
    """Scores of a retrieval, means over the valid queries (0 when there is none).

    Attributes:
        cmc: `[max_rank]` float64 on the CPU, `cmc[r]` = share of queries with a hit among the first r + 1.
        mAP: mean average precision (precision averaged over the hits).
        mINP: mean inverse negative penalty (hits / rank of the last hit; Ye et al., TPAMI 2021).
        valid_queries: queries with at least one match in their gallery.
    """

    cmc: Tensor
    mAP: float
    mINP: float
    valid_queries: int


@torch.no_grad()
def rank(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    protocol: str = "plain",
    max_rank: int = 20,
) -> Ranking:
    """Rank the gallery for every query by ascending distance, the lower index first among equals, and score it.

    Protocols: `plain` (RegDB) ranks all images. `sysu`: a query of camera 3 never sees gallery camera 2 (same place).
    `llcm`: images of the query's identity from the query's own camera are removed. For `sysu` and `llcm` the CMC counts
    identities (an identity stands where its first image does), mAP and mINP count images.

    Args:
        distance: `[Q, G]` float32, float16, bfloat16 or float64, without NaN (checked under `ENGINE_DEBUG=1`).
        query_ids: `[Q]` int64; gallery_ids: `[G]` int64.
        query_cams: `[Q]` int64; gallery_cams: `[G]` int64; needed by `sysu` and `llcm`.
        protocol: one of the above.
        max_rank: length of the CMC, which stays at its last value beyond the end of the gallery.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> distance = torch.tensor([[0.1, 0.2, 0.3]])
        >>> found = ops.rank(distance, torch.tensor([7]), torch.tensor([7, 3, 7]), max_rank=2)
        >>> found.cmc.tolist(), round(found.mAP, 4), round(found.mINP, 4)  # hits at ranks 1 and 3
        ([1.0, 1.0], 0.8333, 0.6667)
    """
    _check.tensor("distance", distance, "Q G")
    _check.choice("protocol", protocol, PROTOCOLS)
    max_rank = _check.count("max_rank", max_rank, 1)
    if protocol != "plain" and (query_cams is None or gallery_cams is None):
        missing = "query_cams" if query_cams is None else "gallery_cams"
        raise TypeError(f"{missing} must be a tensor for protocol {protocol!r}, got None")
    for name, value, dim in (
        ("query_ids", query_ids, 0),
        ("gallery_ids", gallery_ids, 1),
        ("query_cams", query_cams, 0),
        ("gallery_cams", gallery_cams, 1),
    ):
        if value is not None:
            _check.indices(name, value, "QG"[dim])
            _check.like(name, value, "distance", distance, dtype=False)
            _check.size(name, value, 0, distance.shape[dim], ("the rows of distance", "the columns of distance")[dim])
    _check.no_nan("distance", distance)
    function = pick("rank", distance)
    return function(distance, query_ids, gallery_ids, query_cams, gallery_cams, protocol=protocol, max_rank=max_rank)


def reference(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    protocol: str = "plain",
    max_rank: int = 20,
) -> Ranking:
    """Blocks of queries, each sorted at once."""
    gallery_count = distance.shape[1]
    identities = None if protocol == "plain" else gallery_ids.unique(return_inverse=True)[1]
    scores = []
    block_rows = max(1, BLOCK_ENTRIES // max(gallery_count, 1))
    for rows in torch.arange(len(distance), device=distance.device).split(block_rows) if gallery_count else ():
        same = query_ids[rows].unsqueeze(1) == gallery_ids
        removed = hidden(same, None if query_cams is None else query_cams[rows], gallery_cams, protocol)
        order = distance[rows].sort(dim=1, stable=True).indices
        ranked = None if identities is None else identities[order]
        scores.append(_score(same.gather(1, order), removed.gather(1, order), ranked))
    return _average(scores, max_rank)


def hidden(same: Tensor, query_cams: Tensor | None, gallery_cams: Tensor | None, protocol: str) -> Tensor:
    """Which gallery images a protocol hides from each query, `[Q, G]` bool.

    Args:
        same: `[Q, G]` bool, whether an image is of the query's identity; the others as for `rank`.
    """
    if query_cams is None or gallery_cams is None or protocol == "plain":
        return torch.zeros_like(same)
    cams = query_cams.unsqueeze(1)
    return (cams == 3) & (gallery_cams == 2) if protocol == "sysu" else same & (cams == gallery_cams)


def cpu(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    protocol: str = "plain",
    max_rank: int = 20,
) -> Ranking:
    """csrc/rank.cpp: the place of a hit is how many images stand before it, so nothing is sorted."""
    from engine import _C

    distance = distance.to(accumulation_dtype(distance)).contiguous()
    query_ids, gallery_ids = query_ids.contiguous(), gallery_ids.contiguous()
    query_cams, gallery_cams = (None if cams is None else cams.contiguous() for cams in (query_cams, gallery_cams))
    before = torch.empty(len(distance), dtype=torch.int64)
    precision, penalty = (torch.empty(len(distance), dtype=torch.float64) for _ in range(2))
    run = _C.rank_float64 if distance.dtype == torch.float64 else _C.rank_float32
    run(
        distance.data_ptr(),
        query_ids.data_ptr(),
        gallery_ids.data_ptr(),
        0 if query_cams is None else query_cams.data_ptr(),
        0 if gallery_cams is None else gallery_cams.data_ptr(),
        distance.shape[0],
        distance.shape[1],
        PROTOCOLS.index(protocol),
        before.data_ptr(),
        precision.data_ptr(),
        penalty.data_ptr(),
        torch.get_num_threads(),
    )
    valid = before >= 0
    return _average([(before[valid], precision[valid], penalty[valid])], max_rank)


def cuda(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    protocol: str = "plain",
    max_rank: int = 20,
) -> Ranking:
    """csrc/rank.cu: a block per query puts its hits in order and counts what stands before them. Waits for the device
    once, for the means.
    """
    query_count, gallery_count = distance.shape
    if gallery_count > torch.iinfo(torch.int32).max:
        return reference(
            distance, query_ids, gallery_ids, query_cams, gallery_cams, protocol=protocol, max_rank=max_rank
        )
    distance, query_ids, gallery_ids = distance.contiguous(), query_ids.contiguous(), gallery_ids.contiguous()
    query_cams, gallery_cams = (None if cams is None else cams.contiguous() for cams in (query_cams, gallery_cams))
    ids, order = gallery_ids.sort(stable=True)
    # The number of an identity is the place of its first image in this order.
    identities, begins = (torch.searchsorted(ids, wanted, out_int32=True) for wanted in (gallery_ids, query_ids))
    ends = torch.searchsorted(ids, query_ids, out_int32=True, right=True)
    found = torch.zeros(max_rank + 1, dtype=torch.int64, device=distance.device)
    scores = torch.empty(2, query_count, dtype=torch.float64, device=distance.device)
    gallery = order, begins, ends, identities, query_cams, gallery_cams, gallery_count
    arguments = distance, *gallery, PROTOCOLS.index(protocol), max_rank, found, scores
    _cuda.launch("rank", f"rank_{_cuda.name_of(distance.dtype)}_kernel", query_count, 256, arguments)
    totals = torch.cat([found.cumsum(0).double(), scores.sum(dim=1)]).cpu()
    valid_count = int(totals[max_rank])
    means = totals / max(valid_count, 1)
    return Ranking(means[:max_rank], float(means[-2]), float(means[-1]), valid_count)


def _score(same: Tensor, hidden: Tensor, identities: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries that have a hit: what stands before the first one, average precision, inverse negative penalty.

    Args:
        same, hidden: `[B, G]` bool in ranked order: of the query's identity; not to be seen by it.
        identities: `[B, G]` int64 in ranked order, from 0, where the first hit is preceded by identities, not images.
    """
    hit = same & ~hidden
    valid = hit.any(dim=1)
    hit, hidden = hit[valid], hidden[valid]
    place = (~hidden).cumsum(dim=1)
    hits = hit.cumsum(dim=1)
    hit_count = hits[:, -1]
    precision = (hits.double() / place).masked_fill(~hit, 0).sum(dim=1) / hit_count
    penalty = hit_count.double() / place.masked_fill(~hit, 0).amax(dim=1)
    unseen = hit.shape[1] + 1
    first_place = place.masked_fill(~hit, unseen).amin(dim=1)
    if identities is None:
        return first_place - 1, precision, penalty
    seen = place.masked_fill(hidden, unseen)
    first_seen = torch.full_like(seen, unseen).scatter_reduce(1, identities[valid], seen, "amin")  # by identity
    return (first_seen < first_place.unsqueeze(1)).sum(dim=1), precision, penalty


def _average(scores: list[tuple[Tensor, Tensor, Tensor]], max_rank: int) -> Ranking:
    """Means over the queries of all blocks."""
    valid_count = sum(len(before) for before, _, _ in scores)
    if valid_count == 0:
        return Ranking(torch.zeros(max_rank, dtype=torch.float64), 0.0, 0.0, 0)
    before, precision, penalty = (torch.cat(parts) for parts in zip(*scores, strict=True))
    found = torch.bincount(before.clamp(max=max_rank), minlength=max_rank + 1)[:max_rank].cumsum(0)
    return Ranking(found.double().cpu() / valid_count, float(precision.mean()), float(penalty.mean()), valid_count)
