"""Propagation in Triton on the interpreter; test_triton.py runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch
from ops.graph_checks import unit_rows

from engine import ops
from engine.ops import use_backend
from engine.ops.propagate import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("row_count", "feature_count", "width", "k"), [(1, 1, 1, 1), (9, 30, 517, 5), (0, 3, 2, 1)])
def test_collects_what_the_reference_collects(row_count, feature_count, width, k, dtype):
    features = unit_rows(feature_count, width, 1).to(dtype)
    csr = ops.affinity(unit_rows(row_count, width, 2), features.float(), k)
    with use_backend("triton"):
        result = ops.propagate(csr, features)
    exact = reference(csr.double(), features.double())
    assert result.dtype == dtype and result.shape == exact.shape
    torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_are_those_of_the_reference():
    csr = ops.affinity(unit_rows(7, 6, 1), unit_rows(9, 6, 2), 3)
    features = unit_rows(9, 6, 3)
    gradients = []
    for name in ("triton", "reference"):
        leaf = features.clone().requires_grad_()
        with use_backend(name):
            ops.propagate(csr, leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_indices_outside_are_left_out():
    bounds, columns = torch.tensor([0, 3, 9]), torch.tensor([0, -1, 2**40, 1, 7])
    csr = torch.sparse_csr_tensor(bounds, columns, torch.ones(5), (2, 3), check_invariants=False)
    with use_backend("triton"):
        result = ops.propagate(csr, torch.eye(3))
    assert result.tolist() == [[1, 0, 0], [0, 1, 0]]
