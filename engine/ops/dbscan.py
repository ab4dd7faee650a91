"""Density-based clustering of a sparse distance matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _csr, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype

ROWS_PER_BLOCK = 8
"""Of a block of warps, on the GPU."""


@torch.no_grad()
def dbscan(distance: Tensor, eps: float, min_samples: int = 4) -> Tensor:
    """DBSCAN (Ester et al., KDD 1996) with the labels of scikit-learn's `DBSCAN(metric="precomputed")`, ids included.

    Stored entries <= `eps` are neighbours and every row is its own. A row with at least `min_samples` neighbours is a
    core; cores that are neighbours share a cluster; clusters are numbered by their first core. Another row joins the
    first cluster of which a core has it as a neighbour, or is noise.

    Args:
        distance: `[N, N]` symmetric `torch.sparse_csr` of a floating dtype; what is not stored is too far, and
            `to_sparse_csr` of a dense matrix stores no zeros.
        eps: radius.
        min_samples: neighbours that make a core.

    Returns:
        `[N]` int64 cluster ids, -1 = noise.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> near = torch.tensor([[0.0, 0.2, 0.9], [0.2, 0.0, 0.9], [0.9, 0.9, 0.0]])
        >>> ops.dbscan(near.to_sparse_csr(), eps=0.5, min_samples=2)
        tensor([ 0,  0, -1])
    """
    _check.csr("distance", distance, "N N")
    _check.size("distance", distance, 1, distance.shape[0], "its rows")
    _check.positive("eps", eps)
    min_samples = _check.count("min_samples", min_samples, 1)
    return pick("dbscan", distance)(distance, eps, min_samples)


def reference(distance: Tensor, eps: float, min_samples: int = 4) -> Tensor:
    """Connected components of the cores, then the border."""
    count, device = distance.shape[0], distance.device
    row, column = _csr.row_indices(distance), distance.col_indices()
    near = (distance.values() <= eps) & (row != column) & (column >= 0) & (column < count)
    row, column = row[near], column[near]
    is_core = torch.bincount(row, minlength=count) + 1 >= min_samples
    from_core = is_core[row]
    row, column = row[from_core], column[from_core]
    to_core = is_core[column]
    root = _components(row[to_core], column[to_core], count)
    is_first = is_core & (root == torch.arange(count, device=device))
    cluster = (is_first.cumsum(0) - 1)[root].masked_fill(~is_core, count)
    cluster = cluster.scatter_reduce(0, column[~to_core], cluster[row[~to_core]], "amin")
    return cluster.masked_fill(cluster == count, -1)


def cpu(distance: Tensor, eps: float, min_samples: int = 4) -> Tensor:
    """csrc/dbscan.cpp: threads look for neighbours, one unites the cores."""
    from engine import _C

    dtype = accumulation_dtype(distance)
    run = _C.dbscan_float64 if dtype == torch.float64 else _C.dbscan_float32
    starts, columns = _csr.bounded_starts(distance).contiguous(), distance.col_indices().contiguous()
    values = distance.values()
    radius = torch.tensor(eps, dtype=values.dtype).item()  # as torch and numpy compare with a number
    values = values.to(dtype).contiguous()
    labels = torch.empty(distance.shape[0], dtype=torch.int64)
    run(
        starts.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        labels.data_ptr(),
        distance.shape[0],
        radius,
        min_samples,
        torch.get_num_threads(),
    )
    return labels


def cuda(distance: Tensor, eps: float, min_samples: int = 4) -> Tensor:
    """csrc/dbscan.cu: a warp has a row, and all of them unite the cores."""
    count, device = distance.shape[0], distance.device
    starts, columns = _csr.bounded_starts(distance).contiguous(), distance.col_indices().contiguous()
    graph = starts, columns, distance.values().contiguous() <= eps, count
    labels, parents = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    shape = -(-count // ROWS_PER_BLOCK), 32 * ROWS_PER_BLOCK
    _cuda.launch("dbscan", "dbscan_core_kernel", *shape, (*graph, min_samples, parents))
    _cuda.launch("dbscan", "dbscan_unite_kernel", *shape, (*graph, parents))
    clusters = (parents == torch.arange(count, device=device)).cumsum(0)
    _cuda.launch("dbscan", "dbscan_label_kernel", *shape, (*graph[:3], clusters, count, parents, labels))
    return labels


def _components(row: Tensor, column: Tensor, count: int) -> Tensor:
    """The lowest index of every node's connected component, `[count]`."""
    root = torch.arange(count, device=row.device)
    while row.numel():
        # Every root takes the lowest root across its edges, then all nodes follow the pointers to the end.
        root = root.scatter_reduce(0, root[row], root[column], "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
        apart = root[row] != root[column]
        row, column = row[apart], column[apart]
    return root
