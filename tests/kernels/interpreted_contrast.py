"""The Triton losses on the interpreter; test_triton.py runs this file in a process of its own."""

from __future__ import annotations

import importlib

import pytest
import torch
from ops import contrast_checks as checks

from engine.ops import use_backend

CASES = [
    (1, 1, 1, torch.float32),
    (70, 150, 67, torch.float32),
    (2, 4100, 5, torch.float32),
    (3, 150, 7, torch.float16),
    (3, 150, 7, torch.bfloat16),
    (4, 0, 3, torch.float32),
    (0, 4, 3, torch.float32),
]


def target_of(name: str, row_count: int, bank_count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "soft_contrast":
        return torch.rand(row_count, bank_count, generator=generator)
    shape = (row_count,) if name == "cluster_contrast" else (row_count, 40)
    return torch.randint(-1, max(1, bank_count + 1), shape, generator=generator)  # bank_count: beyond it


@pytest.mark.parametrize("name", ["cluster_contrast", "neighbor_contrast", "soft_contrast"])
@pytest.mark.parametrize(("row_count", "bank_count", "width", "dtype"), CASES)
def test_stays_in_the_error_budget(name, row_count, bank_count, width, dtype):
    features = checks.unit_rows(row_count, width, seed=1, dtype=dtype)
    bank = checks.unit_rows(bank_count, width, seed=2, dtype=dtype)
    arguments = (target_of(name, row_count, bank_count), checks.TEMPERATURE)
    module = importlib.import_module(f"engine.ops.{name}")
    operator = getattr(importlib.import_module("engine.ops"), name)
    truth = checks.value_and_gradient(module.reference, features.double(), bank.double(), *arguments, reduction="none")
    plain = checks.value_and_gradient(module.reference, features, bank, *arguments, reduction="none")
    with use_backend("triton"):
        ours = checks.value_and_gradient(operator, features, bank, *arguments, reduction="none")
        value = operator(features, bank, *arguments, reduction="none")
    torch.testing.assert_close(value, ours[0], rtol=0, atol=0)
    for actual, expected, exact in zip(ours, plain, truth, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == exact.shape
        if exact.numel():
            budget = 2 * (expected.double() - exact).abs().max() + 1e-6 * exact.abs().max() + 5e-6
            assert (actual.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("name", ["cluster_contrast", "neighbor_contrast", "soft_contrast"])
def test_problems_have_the_losses_they_have_alone(name, monkeypatch):
    """In two chunks of two tiles."""
    monkeypatch.setattr(importlib.import_module("engine.kernels._contrast"), "CHUNK_ROWS", 256)
    with use_backend("triton"):
        checks.check_problems(name, target_of(name, 5, 300), checks.unit_rows(300, 7, seed=2), ("mean",))


@pytest.mark.parametrize("name", ["cluster_contrast", "neighbor_contrast", "soft_contrast"])
def test_extremes_are_neither_lost_nor_spread(name):
    target = target_of(name, 5, 8)
    target[1] = 1  # the row that is spoiled has a target
    with use_backend("triton"):
        checks.check_extremes(name, target, checks.unit_rows(8, 7, seed=2))
