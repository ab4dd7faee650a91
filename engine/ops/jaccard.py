"""The k-reciprocal Jaccard distance, sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _csr
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision
from engine.ops._reciprocal import ONE, Entries, entries_of, expanded, min_products, query_expansion, reciprocal, stack
from engine.ops.topk import topk


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
        k2: neighbours of the query expansion, the row itself included; 1 = none.
        precision: of the search for neighbours: "ieee" = float32; "fast" = on a GPU it may be TF32 or bfloat16.

    Returns:
        `[N, N]` `torch.sparse_csr`, columns ascending, symmetric bit for bit; float64 for float64 features, else
        float32. The diagonal is stored, as 0; an entry that is not stored has distance 1.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check.tensor("features", features, "N D")
    _check.no_nan("features", features)
    _check.count("k1", k1, 1)
    _check.count("k2", k2, 1)
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


def _half(k1: int) -> int:
    """Neighbours of the sets that expand others, the row itself included."""
    return round(k1 / 2) + 1


def _nearest(features: Tensor, k: int, precision: str) -> Tensor:
    """The k nearest of every row by Euclidean distance, itself included, `[N, k]`."""
    rows = features.to(accumulation_dtype(features))
    squared = rows.square().sum(dim=1, keepdim=True)
    if torch.allclose(squared, torch.ones_like(squared), atol=1e-5):
        return topk(features, features, k, precision=precision)[1]
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
