"""One call of every operator at odd sizes, the same numbers every time: for tests that draw none."""

from __future__ import annotations

from typing import Any

import torch
from graph_checks import people, unit_rows

from engine.ops import _csr

Arguments = tuple[Any, ...]
ROWS, BANK_ROWS, WIDTH = 37, 151, 67


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4))


def sparse(row_count: int, column_count: int, share: float) -> torch.Tensor:
    """A symmetric pattern where the matrix is square."""
    dense = uniform(row_count, column_count)
    dense = dense.masked_fill(dense > share, 0)
    if row_count == column_count:
        dense = dense + dense.T
    rows, columns = dense.nonzero().unbind(dim=1)
    return _csr.build(rows.bincount(minlength=row_count), columns, dense[rows, columns], column_count)


FEATURES, BANK = unit_rows(ROWS, WIDTH, 1), unit_rows(BANK_ROWS, WIDTH, 2)
TRANSPORT = {"max_iter": 20, "tol": 0.0}  # every iteration is made: at a tolerance, rounding could decide on one more
CALLS: dict[str, tuple[Arguments, dict[str, Any]]] = {
    "affinity": ((FEATURES, BANK, 7), {}),
    "cluster_contrast": ((FEATURES, BANK, integers(-1, BANK_ROWS, ROWS), 0.05), {}),
    "cmfp": ((FEATURES, BANK, 7), {}),
    "dbscan": ((sparse(BANK_ROWS, BANK_ROWS, 0.05), 0.03), {}),
    "jaccard": ((people(BANK_ROWS, WIDTH, 1), 12, 4), {}),
    "knn_intersection": ((unit_rows(2 * ROWS, WIDTH, 1).view(2, ROWS, WIDTH), BANK, 60), {}),
    "memory_update_": ((BANK, FEATURES, integers(-1, 9, ROWS), 0.3), {}),
    "neighbor_contrast": ((FEATURES, BANK, integers(-1, BANK_ROWS, ROWS, 11), 0.05), {}),
    "ot_assign": ((BANK, FEATURES, 0.1), TRANSPORT),
    "propagate": ((sparse(ROWS, BANK_ROWS, 0.1), BANK), {}),
    "rank": (
        (uniform(ROWS, BANK_ROWS), *(integers(0, high, count) for high in (9, 4) for count in (ROWS, BANK_ROWS))),
        {"protocol": "llcm"},
    ),
    "segment_mean": ((BANK, integers(-1, 9, BANK_ROWS), 10), {}),
    "set_intersection": ((integers(-1, 40, ROWS, 17), integers(-1, 40, ROWS, 9)), {}),
    "set_union": ((integers(-1, 40, ROWS, 17), integers(-1, 40, ROWS, 9)), {}),
    "sinkhorn": ((uniform(3, BANK_ROWS, ROWS), 0.1), TRANSPORT),
    "soft_contrast": ((FEATURES, BANK, uniform(ROWS, BANK_ROWS), 0.05), {}),
    "topk": ((FEATURES, BANK, 7), {}),
}


def twice(arguments: Arguments) -> Arguments:
    """Two problems, the second with all rows in another order."""
    return tuple(
        torch.stack([value, value.flip(0)]) if isinstance(value, torch.Tensor) else value for value in arguments
    )


BATCHED = ("cluster_contrast", "memory_update_", "neighbor_contrast", "soft_contrast", "topk")
BATCHES: dict[str, Arguments] = {name: twice(CALLS[name][0]) for name in BATCHED}
"""Of the operators that take batches of problems; the options are those of `CALLS`."""
