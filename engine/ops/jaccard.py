"""The k-reciprocal Jaccard distance, sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _csr, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision
from engine.ops._reciprocal import ONE, Entries, entries_of, expanded, min_products, query_expansion, reciprocal, stack
from engine.ops.topk import topk

BLOCK_ROWS = 1 << 13
"""Rows whose squares are held at a time."""
WINDOW = 4096
"""Rows whose sums a block keeps in shared memory at a time, on the GPU: 32 for each of its threads at most."""


@torch.no_grad()
def jaccard(features: Tensor, k1: int = 30, k2: int = 6, *, precision: str = "ieee") -> Tensor:
    """How little the neighbourhoods of two rows overlap: k-reciprocal encoding, query expansion, Jaccard distance.

    Zhong et al., *Re-ranking Person Re-identification with k-reciprocal Encoding* (CVPR 2017), with the neighbour
    counts that clustering methods use (k1 includes the row itself):

    - R(i, k): the j among the k nearest of i that have i among their k nearest.
    - R*(i): R(i, k1) and every R(j, round(k1 / 2) + 1), j in R(i, k1), of which more than 2/3 lies in R(i, k1).
    - V_i = softmax over j in R*(i) of -||f_i - f_j||^2, then the mean of V over the k2 nearest of i.
    - J_il = 1 - s / (2 - s), s = sum_j min(V_ij, V_lj).

    Neighbours are ordered by (Euclidean distance ascending, index ascending); `round` is to nearest even.

    Args:
        features: `[N, D]` float32, float16, bfloat16 or float64; no gradient is computed. Unit rows are the usual case,
            in which distance and inner product give one order; rows of other lengths are taken as they are.
        k1: neighbours of the reciprocal sets, the row itself included; where it exceeds N, all rows are used.
        k2: neighbours of the query expansion, the row itself included, k1 at most; 1 = none (of equal rows, the first
            one's V for all).
        precision: of the search for neighbours: "ieee" = float32; "fast" = on a GPU it may be TF32 or bfloat16.

    Returns:
        `[N, N]` `torch.sparse_csr`, columns ascending, symmetric bit for bit; float64 for float64 features, else
        float32. The diagonal is stored, as 0; an entry that is not stored has distance 1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1, 2.2])  # two groups of three
        >>> features = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> distance = ops.jaccard(features, k1=3, k2=1)
        >>> distance.values().numel()  # of 36 entries; all others are 1
        18
        >>> ops.dbscan(distance, eps=0.5, min_samples=2)
        tensor([0, 0, 0, 1, 1, 1])
    """
    _check.tensor("features", features, "N D")
    _check.no_nan("features", features)
    k1 = _check.count("k1", k1, 1)
    k2 = _check.count("k2", k2, 1)
    check_precision(precision)
    return pick("jaccard", features)(features, k1, k2, precision=precision)


def reference(features: Tensor, k1: int = 30, k2: int = 6, *, precision: str = "ieee") -> Tensor:
    """Index sets as sorted keys `row * N + column`; the N x N sums in blocks of rows."""
    dtype = accumulation_dtype(features)
    if len(features) == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=features.device)
        return _csr.build(nothing, nothing, features.new_empty(0, dtype=dtype), 0)
    rank = _nearest(features, min(k1, features.shape[0]), precision)
    members = expanded(reciprocal(rank), reciprocal(rank[:, : _half(k1)]), len(rank))
    weights = query_expansion(_weights(features, members), rank[:, :k2])
    return _distance(weights, full=rank[:, :k2].shape[1] * ONE, dtype=dtype)


def cpu(features: Tensor, k1: int = 30, k2: int = 6, *, precision: str = "ieee") -> Tensor:
    """csrc/jaccard.cpp, after the search for neighbours."""
    from engine import _C

    dtype = accumulation_dtype(features)
    run = _C.jaccard_float64 if dtype == torch.float64 else _C.jaccard_float32
    rows = features.to(dtype).contiguous()
    count, width = rows.shape
    rank = _nearest(features, min(k1, count), precision).contiguous()
    found, threads = rank.shape[1], torch.get_num_threads()
    distances = run(
        rows.data_ptr(),
        rank.data_ptr(),
        count,
        width,
        found,
        min(found, _half(k1)),
        min(found, k2),
        threads,
    )
    starts = torch.empty(count + 1, dtype=torch.int64)
    columns = torch.empty(distances.entry_count(), dtype=torch.int64)
    values = torch.empty(len(columns), dtype=dtype)
    distances.write(starts.data_ptr(), columns.data_ptr(), values.data_ptr(), threads)
    return _csr.from_starts(starts, columns, values, count)


def cuda(features: Tensor, k1: int = 30, k2: int = 6, *, precision: str = "ieee") -> Tensor:
    """csrc/jaccard.cu, after the search for neighbours. Waits for the device where it hangs on the data how much is to
    be stored: twice.
    """
    if len(features) == 0:
        return reference(features, k1, k2)
    rank = _nearest(features, min(k1, len(features)), precision).contiguous()
    k2 = min(rank.shape[1], k2)
    weights = _expanded_on_gpu(features.contiguous(), rank, min(rank.shape[1], _half(k1)), k2)
    return _distance_on_gpu(*weights, full=k2 * ONE)


def _half(k1: int) -> int:
    """Neighbours of the sets that expand others, the row itself included."""
    return round(k1 / 2) + 1


def _nearest(features: Tensor, k: int, precision: str) -> Tensor:
    """The k nearest of every row by Euclidean distance, itself included, `[N, k]`."""
    dtype = accumulation_dtype(features)
    blocks = features.split(BLOCK_ROWS)  # no copy of all of them
    squared = torch.cat([rows.to(dtype).square().sum(dim=1, keepdim=True) for rows in blocks])
    if torch.allclose(squared, torch.ones_like(squared), atol=1e-5):
        return topk(features, features, k, precision=precision)[1]
    rows = features.to(dtype)
    # f_i . f_j - ||f_j||^2 / 2 falls with the distance: an inner product with one more column.
    queries, bank = torch.cat([rows, torch.ones_like(squared)], 1), torch.cat([rows, -squared / 2], 1)
    return topk(queries, bank, k, precision=precision)[1]


def _weights(features: Tensor, members: Tensor) -> Tensor:
    """Softmax of the negative squared distances over each row's members, CSR in fixed point."""
    rows = features.to(accumulation_dtype(features))
    count = len(rows)
    row, column = members // count, members % count
    row_counts = torch.bincount(row, minlength=count)
    pattern = _csr.build(row_counts, column, rows.new_zeros(len(members)), count)
    products = torch.sparse.sampled_addmm(pattern, rows, rows.T, beta=0.0).values()
    squared = rows.square().sum(dim=1)
    # No maximum is subtracted: a row with members has one at distance 0.
    weights = (2 * products - squared[row] - squared[column]).clamp(max=0).exp()
    weights /= torch.segment_reduce(weights, "sum", lengths=row_counts, unsafe=True)[row]
    return _csr.build(row_counts, column, (weights * ONE).round().long(), count)


def _distance(weights: Tensor, full: int, dtype: torch.dtype) -> Tensor:
    """J of the rows of `weights`, of which `full` is the sum of each."""

    def block(first: int, sums: Tensor) -> Entries:
        sums.diagonal(offset=first).fill_(full)
        row_count, row, column, value = entries_of(sums)
        share = value.double() / full
        distance = (1 - share / (2 - share)).clamp(min=0).to(dtype)
        stored = distance < 1
        return row_count, row[stored], column[stored], distance[stored]

    products = min_products(weights, weights.t().to_sparse_csr())
    return stack((block(first, sums) for first, sums in products), len(weights))


def _expanded_on_gpu(features: Tensor, rank: Tensor, half: int, k2: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of the weights of every row's first `k2` neighbours, in fixed point.

    Returns:
        Where each row begins, `[N + 1]` int64, and its number of entries, `[N]`; the columns, ascending, and values.
        There is room between the rows: how many entries are in two of the rows they add up is not known before.
    """
    count, k1 = rank.shape
    near, near_sizes = _reciprocal_on_gpu(rank, k1)
    halves, half_sizes = _reciprocal_on_gpu(rank, half)
    lengths, cursors = _nodes(rank, count, k1), _nodes(rank, count, k1 + 1)
    _launch("accept", count, near, near_sizes, k1, halves, half_sizes, half, lengths)
    sets, sizes = (near, near_sizes, k1, halves, half, lengths, cursors), _nodes(rank, count)
    _launch("members", count, *sets, None, None, sizes, merges=True)
    starts = _csr.starts_of(sizes)
    bounds = _csr.starts_of(sizes[rank[:, :k2].clamp(0, count - 1)].sum(1))
    member_count, bound = torch.stack([starts[-1], bounds[-1]]).tolist()

    members, shares = _nodes(rank, member_count), rank.new_empty(member_count, dtype=torch.float64)
    weights = rank.new_empty(member_count)
    _launch("members", count, *sets, starts, members, sizes, merges=True)
    weigh = f"weights_{_cuda.name_of(features.dtype)}"
    _launch(weigh, count, features, features.shape[1], starts, members, shares, weights)
    columns, values, cursors = _nodes(rank, bound), rank.new_empty(bound), _nodes(rank, count, k2)
    graph = rank, count, k1, k2, starts, members, weights
    _launch("expand", count, *graph, cursors, bounds, columns, values, sizes, merges=True)
    return bounds, sizes, columns, values


def _reciprocal_on_gpu(rank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """R(., k), `[N, k]`, and how many there are of each."""
    sets, sizes = _nodes(rank, len(rank), k), _nodes(rank, len(rank))
    _cuda.launch("jaccard", "jaccard_reciprocal_kernel", len(rank), 32, (rank, *rank.shape, k, sets, sizes))
    return sets, sizes


def _distance_on_gpu(bounds: Tensor, sizes: Tensor, columns: Tensor, values: Tensor, full: int) -> Tensor:
    """J of the rows of weights that `_expanded_on_gpu` gives, of which `full` is the sum of each."""
    count, bound = len(sizes), len(columns)
    column_counts = torch.zeros_like(sizes)
    _launch("count", count, bounds, sizes, columns, column_counts)
    turned_starts, turned_rows, turned_values = (
        _csr.starts_of(column_counts),
        _nodes(bounds, bound),
        torch.empty_like(values),
    )
    turned = turned_starts, turned_rows, turned_values
    _launch("turn", count, bounds, sizes, columns, values, turned_starts, column_counts, turned_rows, turned_values)
    _launch("sort", count, *turned)

    weights = bounds, sizes, columns, values, *turned, full, _nodes(bounds, bound + count)
    counts = torch.empty_like(sizes)
    _launch("distance", count, *weights, None, None, None, counts, merges=True)
    starts = _csr.starts_of(counts)
    neighbors = bounds.new_empty(int(starts[-1]))
    distances = neighbors.new_empty(len(neighbors), dtype=torch.float32)
    _launch("distance", count, *weights, starts, neighbors, distances, counts, merges=True)
    return _csr.from_starts(starts, neighbors, distances, count)


def _launch(name: str, count: int, *arguments: Tensor | int | None, merges: bool = False) -> None:
    """Start a kernel with a block for each row, and with a window of sums where it merges lists."""
    if merges:
        arguments = (*arguments, WINDOW)
    _cuda.launch("jaccard", f"jaccard_{name}_kernel", count, 128, arguments, shared_bytes=8 * WINDOW * merges)


def _nodes(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)
