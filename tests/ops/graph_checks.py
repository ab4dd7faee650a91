"""What the tests of the sparse and clustering operators share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DATA = Path(__file__).parents[1] / "data"


def fixture(name: str) -> dict[str, Tensor]:
    """The arrays of tests/data/NAME.npz."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


def unit_rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(rows).to(dtype)


def people(count: int, width: int, seed: int, group_size: int = 12, noise: float = 0.5) -> Tensor:
    """Unit rows in groups, as features of identities are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count // group_size + 1, width, generator=generator)
    rows = centres[torch.randint(len(centres), (count,), generator=generator)]
    return functional.normalize(rows + noise * torch.randn(count, width, generator=generator))


def stored(csr: Tensor, otherwise: float = 0.0) -> Tensor:
    """The dense matrix, with what a CSR matrix does not store filled in; checks that its columns ascend."""
    dense = torch.full(csr.shape, otherwise, dtype=csr.dtype)
    starts, columns, values = csr.crow_indices().tolist(), csr.col_indices(), csr.values()
    assert starts[0] == 0 and starts[-1] == len(columns) == len(values)
    for row, (start, end) in enumerate(pairwise(starts)):
        assert (columns[start:end].diff() > 0).all()
        dense[row, columns[start:end]] = values[start:end]
    return dense


def same_bits_for_any_thread_count(run: Callable[[], Any]) -> None:
    """`run` gives tensors; they are the same to the bit on one thread, on two and on three."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)
