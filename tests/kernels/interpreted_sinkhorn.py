"""Sinkhorn's iteration in Triton on the interpreter; test_triton.py runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch
from ops.sinkhorn_checks import check_solution, drawn_cost

from engine.ops import sinkhorn, use_backend


def check(cost: torch.Tensor, reg: float, **options) -> None:
    with use_backend("triton"):
        ours = sinkhorn(cost, reg, **options)
    check_solution(ours, cost, reg, **options)


@pytest.mark.parametrize("shape", [(1, 1), (33, 50), (3, 17, 5), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_solves_what_the_reference_solves(shape, dtype):
    check(drawn_cost(*shape, dtype=dtype), 0.1, max_iter=30)


def test_marginals_and_a_relaxed_one():
    a, b = drawn_cost(20), drawn_cost(9)
    a[3] = b[2] = 0
    check(drawn_cost(20, 9), 0.1, a=a / a.sum(), b=b / b.sum(), max_iter=20)
    check(drawn_cost(20, 9), 0.05, relax=0.5, max_iter=40)


def test_forbidden_pairs_rows_and_columns():
    cost = drawn_cost(12, 7)
    cost[3], cost[:, 2], cost[5, 5] = torch.inf, torch.inf, torch.inf
    check(cost, 0.1, max_iter=8)


@pytest.mark.parametrize("reg", [1e-4, 1e4])
def test_extreme_regularisation(reg):
    check(drawn_cost(20, 6), reg, max_iter=7)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3)])
def test_nothing_to_transport(shape):
    with use_backend("triton"):
        result = sinkhorn(torch.empty(shape), 0.1)
    assert result.log_u.shape == shape[:-1]
