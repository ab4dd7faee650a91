from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graph_checks import same_bits_for_any_thread_count, stored, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops import _csr, use_backend


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def random_graph(rows, columns, dtype=torch.float32, seed=0):
    dense = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (dense * (dense > 0.8)).to(dtype).to_sparse_csr()


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (0, 4, 3), (4, 0, 3), (4, 5, 0), (130, 257, 65)])
def test_is_the_matrix_product(shape, backend):
    rows, columns, width = shape
    graph = random_graph(rows, columns, torch.float64)
    features = unit_rows(columns, width, 1, torch.float64)
    torch.testing.assert_close(ops.propagate(graph, features), stored(graph) @ features, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(dtype, backend):
    graph, features = random_graph(20, 3000), unit_rows(3000, 8, 2, dtype)
    result = ops.propagate(graph, features)
    assert result.dtype == dtype
    exact = stored(graph).double() @ features.double()
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.propagate(graph, features), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 16, 31, 33, 128, 300, 2100])
def test_native_stays_in_the_error_budget(isa, width, dtype):
    graph, features = random_graph(70, 90, dtype), unit_rows(90, width, 1, dtype)
    exact = stored(graph).double() @ features.double()

    def error(name):
        with use_backend(name):
            return (ops.propagate(graph, features) - exact).abs().max()

    assert error("cpu") <= 2 * error("reference") + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_converts_half_types_exactly(isa, dtype):
    graph, features = random_graph(40, 50), unit_rows(50, 131, 1, dtype)
    with use_backend("cpu"):
        assert torch.equal(ops.propagate(graph, features), ops.propagate(graph, features.float()).to(dtype))
        double = ops.propagate(graph.to(torch.float64), features)
        assert torch.equal(double, ops.propagate(graph.to(torch.float64), features.double()).to(dtype))


def test_features_no_entry_names_are_not_read(backend):
    graph = _csr.from_starts(torch.tensor([0, 1, 1, 3]), torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0]), 4)
    features = torch.tensor([[1.0], [torch.nan], [10.0], [torch.inf]])
    assert ops.propagate(graph, features).tolist() == [[10.0], [0.0], [32.0]]
    assert ops.propagate(graph, torch.tensor([[torch.nan], [0.0], [1.0], [0.0]])).isnan().flatten().tolist() == [
        False,
        False,
        True,
    ]


@settings(max_examples=80, deadline=None)
@given(
    starts=st.lists(st.integers(-3, 9), min_size=1, max_size=6),
    ordered=st.booleans(),
    columns=st.lists(st.sampled_from([-(2**62), -1, 0, 1, 2, 3, 4, 2**62]), max_size=6),
)
def test_indices_outside_their_range_are_ignored(starts, ordered, columns):
    starts = sorted(starts) if ordered else starts
    count = len(columns)
    bounds = [min(max(start, 0), count) for start in starts]
    weights = torch.zeros(len(starts) - 1, 4)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        for entry in range(begin, end):
            if 0 <= columns[entry] < 4:
                weights[row, columns[entry]] += entry + 1
    values, features = torch.arange(1.0, 1 + count).requires_grad_(), unit_rows(4, 3, 1).requires_grad_()
    places = torch.tensor(columns, dtype=torch.int64)
    graph = _csr.from_starts(torch.tensor(starts), places, values.detach(), 4)
    for name in ("cpu", "reference"):
        with use_backend(name):
            torch.testing.assert_close(ops.propagate(graph, features), weights @ features)
    # torch itself does not survive the gradient of a CSR matrix with such indices: past it, to the operator inside.
    result = torch.ops.engine.propagate(torch.tensor(bounds), places, values, features, "cpu")
    to_features, to_values = torch.autograd.grad(result.sum(), [features, values])
    if ordered:
        torch.testing.assert_close(to_features, weights.sum(0)[:, None].expand(4, 3))
    assert to_values.isfinite().all() and not to_values[(places < 0) | (places >= 4)].any()


def test_gradient_is_the_transposed_product(backend):
    graph, features = random_graph(6, 9, torch.float64), unit_rows(9, 4, 3, torch.float64).requires_grad_()
    upstream = unit_rows(6, 4, 4, torch.float64)
    ops.propagate(graph, features).backward(upstream)
    torch.testing.assert_close(features.grad, stored(graph).T @ upstream)


def test_gradients_are_right_to_the_second(monkeypatch):
    monkeypatch.setitem(ops.propagate.__globals__, "BLOCK_ENTRIES", 10)  # the operator hides its module's name
    graph, features = random_graph(6, 9, torch.float64), unit_rows(9, 4, 3, torch.float64).requires_grad_()
    values = graph.values().clone().requires_grad_()

    def product(values, features):
        with use_backend("cpu"):
            return ops.propagate(_csr.from_starts(graph.crow_indices(), graph.col_indices(), values, 9), features)

    assert torch.autograd.gradcheck(product, [values, features])
    assert torch.autograd.gradgradcheck(product, [values, features])


def test_gradient_of_a_graph_is_a_graph():
    graph, features = random_graph(5, 7).requires_grad_(), unit_rows(7, 3, 3)
    with use_backend("cpu"):
        ops.propagate(graph, features).sum().backward()
    assert torch.equal(graph.grad.col_indices(), graph.col_indices())
    torch.testing.assert_close(graph.grad.values(), features.sum(1)[graph.col_indices()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_registered_operator_is_what_torch_expects(dtype):
    graph, features = random_graph(5, 7), unit_rows(7, 3, 3, dtype).requires_grad_()
    values = graph.values().clone().requires_grad_()
    arguments = (graph.crow_indices(), graph.col_indices(), values, features, "cpu")
    torch.library.opcheck(torch.ops.engine.propagate.default, arguments)


def test_reads_any_layout_and_any_thread_count(backend):
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
