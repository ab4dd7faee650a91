"""The cooperative kernel of Sinkhorn's iteration on the emulator."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from emulated import cuda_backend
from ops.graph_checks import people, unit_rows
from ops.sinkhorn_checks import check_solution, drawn_cost

from engine.ops import _cuda, ot_assign, sinkhorn, use_backend
from engine.ops.sinkhorn import Sinkhorn, reference

FIELDS = ("log_u", "log_v", "iterations", "error")


def on_the_emulator(cost: torch.Tensor, reg: float, **options) -> Sinkhorn:
    """The result, which is the same for another order of threads."""
    with cuda_backend(), use_backend("cuda"):
        result = sinkhorn(cost, reg, **options)
    with cuda_backend(descending=True), use_backend("cuda"):
        again = sinkhorn(cost, reg, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(again, name), getattr(result, name), rtol=0, atol=0, equal_nan=True)
    return result


def check(cost: torch.Tensor, reg: float, **options) -> None:
    check_solution(on_the_emulator(cost, reg, **options), cost, reg, **options)


@pytest.mark.parametrize("shape", [(1, 1), (33, 50), (3, 17, 5), (2, 1, 300), (70, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_solves_what_the_reference_solves(shape, dtype):
    check(drawn_cost(*shape, dtype=dtype), 0.1, max_iter=15)


def test_rows_too_wide_for_registers_are_read_again():
    cost = drawn_cost(20, 2100)
    cost[3, :1500] = torch.inf
    check(cost, 0.1, max_iter=4)


def test_marginals_and_a_relaxed_one():
    a, b = drawn_cost(20), drawn_cost(9)
    a[3] = b[2] = 0
    check(drawn_cost(20, 9), 0.1, a=a / a.sum(), b=b / b.sum(), max_iter=20)
    check(drawn_cost(20, 9), 0.05, relax=0.5, max_iter=40)


def test_forbidden_pairs_rows_and_columns():
    cost = drawn_cost(12, 7)
    cost[3], cost[:, 2], cost[5, 5] = torch.inf, torch.inf, torch.inf
    check(cost, 0.1, max_iter=8)


@pytest.mark.parametrize("relax", [None, 3.0])
def test_columns_too_far_for_the_plan_are_summed_anew(relax):
    cost = drawn_cost(70, 40)
    cost[:, 5:] += 2000
    cost[:, 20] = torch.inf
    check(cost, 1.0, relax=relax, max_iter=3, tol=0)


@pytest.mark.parametrize("reg", [1e-4, 1e4, 1e39])
def test_extreme_regularisation(reg):
    check(drawn_cost(20, 6), reg, max_iter=7)


def test_neither_the_batch_nor_the_number_of_blocks_shows():
    cost = drawn_cost(5, 60, 40) * torch.tensor([1.0, 20, 3, 0.1, 9]).view(5, 1, 1)
    whole = on_the_emulator(cost, 0.1, max_iter=12)
    assert len(set(whole.iterations.tolist())) > 2
    for index in range(5):
        with cuda_backend():
            single = sinkhorn(cost[index], 0.1, max_iter=12)
        assert all(torch.equal(getattr(single, name), getattr(whole, name)[index]) for name in FIELDS)
    for count in (1, 5):
        with cuda_backend(), patch.object(_cuda, "multiprocessors", lambda device, count=count: count):
            other = sinkhorn(cost, 0.1, max_iter=12)
        assert all(torch.equal(getattr(other, name), getattr(whole, name)) for name in FIELDS)


@pytest.mark.parametrize("relax", [None, 0.3])
@pytest.mark.parametrize("spoil", [torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_nan_ends_its_problem_alone(where, spoil, relax):
    problem = {"cost": drawn_cost(3, 40, 21), "a": torch.ones(3, 40) / 40, "b": torch.ones(3, 21) / 21}
    problem["cost"][:, 5] = torch.inf
    for entry in (0, -1):
        problem[where][entry].view(-1)[17] = spoil
    options = {"reg": 0.2, "relax": relax, "max_iter": 8, "tol": 1e-5}
    result, expected = on_the_emulator(**problem, **options), reference(**problem, **options)
    assert result.error.isnan().tolist() == [True, False, True]
    assert torch.equal(result.iterations, expected.iterations)
    for name in ("log_u", "log_v"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assignments_are_solved_by_the_kernel(dtype):
    features, prototypes = people(90, 16, 3).to(dtype), unit_rows(11, 16, 4, dtype)
    weights = {"a": torch.linspace(1, 2, 90) / 135, "b": torch.linspace(1, 3, 11) / 22}
    with cuda_backend(), patch.object(_cuda, "launch", wraps=_cuda.launch) as launched:
        labels = ot_assign(features, prototypes, 0.05, **weights)
        assert launched.call_count == 1
        assert ot_assign(features, prototypes[:0], 0.05).tolist() == [-1] * 90
    with use_backend("reference"):
        assert torch.equal(labels, ot_assign(features, prototypes, 0.05, **weights))
