from __future__ import annotations

import pytest
import torch
from graph_checks import same_bits_for_any_thread_count, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops.segment_mean import reference

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 4) | st.sampled_from([-(2**63), 5, 2**63 - 1]), max_size=12),
    width=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_is_the_mean_of_each_label(name, labels, width, seed):
    features = unit_rows(len(labels), width, seed, torch.float64)
    with ops.use_backend(name):
        means = ops.segment_mean(features, torch.tensor(labels, dtype=torch.int64), 5)
    assert means.shape == (5, width)
    for label in range(5):
        members = [index for index, other in enumerate(labels) if other == label]
        expected = features[members].mean(0) if members else torch.zeros(width, dtype=torch.float64)
        torch.testing.assert_close(means[label], expected)


def test_no_segment_or_row_at_all(backend):
    nothing = torch.tensor([], dtype=torch.int64)
    assert ops.segment_mean(torch.ones(3, 2), torch.tensor([-1, -1, -1]), 0).shape == (0, 2)
    assert ops.segment_mean(torch.ones(0, 2), nothing, 3).tolist() == [[0.0, 0.0]] * 3
    features = torch.ones(3, 2).requires_grad_()
    ops.segment_mean(features, torch.tensor([0, -1, 2**62]), 0).sum().backward()
    assert features.grad.tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 130])
def test_native_stays_in_the_error_budget(width, dtype):
    features = unit_rows(3000, width, 1, dtype)
    labels = torch.randint(-1, 7, (3000,), generator=torch.Generator().manual_seed(2))
    exact = reference(features.double(), labels, 7)
    budget = 2 * (reference(features, labels, 7).double() - exact).abs().max() + 1e-8
    with ops.use_backend("cpu"):
        assert (ops.segment_mean(features, labels, 7).double() - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(dtype, backend):
    features = (unit_rows(5000, 4, 1) + 1).to(dtype)
    means = ops.segment_mean(features, torch.zeros(5000, dtype=torch.int64), 1)
    assert means.dtype == dtype
    torch.testing.assert_close(means[0].double(), features.double().mean(0), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_segment(dtype, backend):
    features = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 1.0]], dtype=dtype)
    means = ops.segment_mean(features, torch.tensor([0, 1, -1]), 3)
    torch.testing.assert_close(
        means, torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [0.0, 0.0]], dtype=dtype), equal_nan=True
    )


def test_gradient_is_spread_over_the_members(backend):
    features = unit_rows(6, 3, 2, torch.float64).requires_grad_()
    labels = torch.tensor([1, -1, 0, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda rows: ops.segment_mean(rows, labels, 4), features)
    assert torch.autograd.gradgradcheck(lambda rows: ops.segment_mean(rows, labels, 4).square(), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_stays_in_the_error_budget(dtype):
    features, labels = unit_rows(50, 5, 2, dtype).requires_grad_(), torch.arange(50) % 7 - 1
    means = ops.segment_mean(features, labels, 6)
    upstream = unit_rows(6, 5, 3, dtype)
    (gradient,) = torch.autograd.grad(means, features, upstream)
    (exact,) = torch.autograd.grad(reference(features.double(), labels, 6), features, upstream.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, exact)


def test_is_a_proper_operator_and_compiles(backend):
    features, labels = unit_rows(9, 5, 2).requires_grad_(), torch.tensor([1, -1, 0, 1, 1, 3, 4, -2, 9])
    for rows in (features, features.detach(), features.T.contiguous().T):
        torch.library.opcheck(torch.ops.engine.segment_mean.default, (rows, labels, 4))
    compiled = torch.compile(ops.segment_mean, fullgraph=True, backend="aot_eager")
    results = []
    for run in (ops.segment_mean, compiled):
        means = run(features, labels, 4)
        results.append((means.detach(), *torch.autograd.grad(means.square().sum(), features)))
    assert all(map(torch.equal, *results))


def test_is_the_same_under_autocast(backend):
    features, labels = unit_rows(9, 5, 2), torch.arange(9) % 3
    expected = ops.segment_mean(features, labels, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.segment_mean(features, labels, 3), expected)


def test_labels_out_of_range_are_refused_in_debug_and_skipped_without(monkeypatch, backend):
    features, labels = torch.ones(3, 2), torch.tensor([0, 7, -3])
    assert ops.segment_mean(features, labels, 2).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[-1, 2\), got values from -3 to 7"):
        ops.segment_mean(features, labels, 2)


def test_reads_any_layout_and_any_thread_count(backend):
    features = unit_rows(2000, 33, 3)
    labels = torch.randint(-1, 50, (4000,), generator=torch.Generator().manual_seed(3))[::2]
    expected = ops.segment_mean(features, labels.contiguous(), 50)
    assert torch.equal(ops.segment_mean(features.T.contiguous().T, labels, 50), expected)
    same_bits_for_any_thread_count(lambda: [ops.segment_mean(features, labels, 50)])


def test_wrong_arguments_are_named():
    features, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="features must be a tensor"):
        ops.segment_mean([1.0], labels, 2)
    with pytest.raises(ValueError, match="labels must be of dtype int64"):
        ops.segment_mean(features, labels.int(), 2)
    with pytest.raises(ValueError, match="labels must be of size 3 in dimension 0"):
        ops.segment_mean(features, labels[:2], 2)
    with pytest.raises(ValueError, match="count must be an integer of at least 0"):
        ops.segment_mean(features, labels, -1)
