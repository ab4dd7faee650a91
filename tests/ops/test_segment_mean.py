from __future__ import annotations

import pytest
import torch
from graph_checks import same_bits_for_any_thread_count, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-1, 4), max_size=12), width=st.integers(0, 3), seed=st.integers(0, 100))
def test_is_the_mean_of_each_label(labels, width, seed):
    features = unit_rows(len(labels), width, seed, torch.float64)
    means = ops.segment_mean(features, torch.tensor(labels, dtype=torch.int64), 5)
    assert means.shape == (5, width)
    for label in range(5):
        members = [index for index, other in enumerate(labels) if other == label]
        expected = features[members].mean(0) if members else torch.zeros(width, dtype=torch.float64)
        torch.testing.assert_close(means[label], expected)


def test_no_segment_at_all():
    assert ops.segment_mean(torch.ones(3, 2), torch.tensor([-1, -1, -1]), 0).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(dtype):
    features = (unit_rows(5000, 4, 1) + 1).to(dtype)
    means = ops.segment_mean(features, torch.zeros(5000, dtype=torch.int64), 1)
    assert means.dtype == dtype
    torch.testing.assert_close(means[0].double(), features.double().mean(0), rtol=torch.finfo(dtype).eps, atol=0)


def test_gradient_is_spread_over_the_members():
    features = unit_rows(6, 3, 2, torch.float64).requires_grad_()
    labels = torch.tensor([1, -1, 0, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda rows: ops.segment_mean(rows, labels, 4), features)


def test_labels_out_of_range_are_refused_in_debug_and_skipped_without(monkeypatch):
    features, labels = torch.ones(3, 2), torch.tensor([0, 7, -3])
    assert ops.segment_mean(features, labels, 2).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[-1, 2\), got values from -3 to 7"):
        ops.segment_mean(features, labels, 2)


def test_reads_any_layout_and_any_thread_count():
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
