from __future__ import annotations

import pytest
import torch
from graph_checks import same_bits_for_any_thread_count, stored, unit_rows

from engine import ops


def random_graph(rows, columns, dtype=torch.float32, seed=0):
    dense = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (dense * (dense > 0.8)).to(dtype).to_sparse_csr()


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (0, 4, 3), (4, 0, 3), (4, 5, 0), (130, 257, 65)])
def test_is_the_matrix_product(shape):
    rows, columns, width = shape
    graph = random_graph(rows, columns, torch.float64)
    features = unit_rows(columns, width, 1, torch.float64)
    torch.testing.assert_close(ops.propagate(graph, features), stored(graph) @ features, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(dtype):
    graph, features = random_graph(20, 3000), unit_rows(3000, 8, 2, dtype)
    result = ops.propagate(graph, features)
    assert result.dtype == dtype
    exact = stored(graph).double() @ features.double()
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.propagate(graph, features), result)


def test_gradient_is_the_transposed_product():
    graph, features = random_graph(6, 9, torch.float64), unit_rows(9, 4, 3, torch.float64).requires_grad_()
    upstream = unit_rows(6, 4, 4, torch.float64)
    ops.propagate(graph, features).backward(upstream)
    torch.testing.assert_close(features.grad, stored(graph).T @ upstream)


def test_reads_any_layout_and_any_thread_count():
    graph, features = random_graph(500, 400), unit_rows(400, 64, 5)
    expected = ops.propagate(graph, features)
    torch.testing.assert_close(ops.propagate(graph, features.T.contiguous().T), expected)
    same_bits_for_any_thread_count(lambda: [ops.propagate(graph, features)])


def test_wrong_arguments_are_named():
    graph, features = random_graph(3, 4), torch.ones(4, 2)
    with pytest.raises(TypeError, match="csr must be a sparse CSR tensor"):
        ops.propagate("graph", features)
    with pytest.raises(ValueError, match="csr must be a torch.sparse_csr tensor"):
        ops.propagate(torch.ones(3, 4), features)
    with pytest.raises(ValueError, match=r"features must be of size 4 in dimension 0 \(the columns of csr\)"):
        ops.propagate(graph, features[:3])


def test_debug_refuses_columns_outside_the_matrix(monkeypatch):
    bounds, columns = torch.tensor([0, 1]), torch.tensor([4])
    graph = torch.sparse_csr_tensor(bounds, columns, torch.ones(1), (1, 4), check_invariants=False)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"the columns of csr must be in \[0, 4\)"):
        ops.propagate(graph, torch.ones(4, 2))
