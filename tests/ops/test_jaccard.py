from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graph_checks import fixture, people, same_bits_for_any_thread_count, stored, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops.jaccard import reference


def set_by_set(features, k1, k2):
    """The rules with Python sets, in float64."""
    count = len(features)
    squared = (features[:, None] - features[None]).square().sum(2).tolist()
    rank = [sorted(range(count), key=lambda other, row=row: (squared[row][other], other)) for row in range(count)]

    def reciprocal(row, k):
        return {other for other in rank[row][:k] if row in rank[other][:k]}

    weights = np.zeros((count, count))
    for row in range(count):
        near = reciprocal(row, k1)
        members = set(near)
        for other in near:
            half = reciprocal(other, min(k1, round(k1 / 2) + 1))
            if 3 * len(half & near) > 2 * len(half):
                members |= half
        for other in members:
            weights[row, other] = math.exp(-squared[row][other])
        if members:
            weights[row] /= weights[row].sum()
    weights = np.stack([weights[rank[row][: min(k1, k2)]].mean(0) for row in range(count)])
    shared = np.minimum(weights[:, None], weights[None]).sum(2)
    np.fill_diagonal(shared, 1)
    return torch.from_numpy(1 - shared / (2 - shared))


def test_reproduces_the_numpy_loops_of_the_field():
    arrays = fixture("g1_jaccard_k20")
    distance = ops.jaccard(arrays["X"], int(arrays["k1"]), int(arrays["k2"]))
    torch.testing.assert_close(stored(distance, otherwise=1.0), arrays["jaccard"], rtol=0, atol=1e-5)
    for name in ("03", "05", "06"):
        labels = ops.dbscan(distance, int(name) / 10, 4)
        assert torch.equal(labels, arrays[f"dbscan_eps{name}"])


@pytest.mark.parametrize("k1, k2", [(1, 1), (2, 6), (3, 2), (5, 1), (9, 4), (10, 6), (30, 6), (100, 100)])
def test_equals_the_rules_with_sets(k1, k2):
    features = people(40, 16, k1, group_size=8).double()
    distance = ops.jaccard(features, k1, k2)
    assert distance.dtype == torch.float64
    torch.testing.assert_close(stored(distance, otherwise=1.0), set_by_set(features, k1, k2), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 14), k1=st.integers(1, 16), k2=st.integers(1, 7), seed=st.integers(0, 1000))
def test_ties_go_to_the_lower_index_and_rows_of_any_length_are_taken(count, k1, k2, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-1, 2, (count, 3), generator=generator).double()  # small integers: exact, many ties
    distance = stored(ops.jaccard(features, k1, k2), otherwise=1.0)
    torch.testing.assert_close(distance, set_by_set(features, k1, k2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_symmetric_to_the_bit_with_the_diagonal_and_without_ones(dtype):
    distance = ops.jaccard(people(150, 24, 2).to(dtype), 12, 4)
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dense = stored(distance, otherwise=1.0)
    assert torch.equal(dense, dense.T)
    rows = torch.arange(150).repeat_interleave(distance.crow_indices().diff())
    diagonal = distance.values()[rows == distance.col_indices()]
    assert diagonal.tolist() == [0.0] * 150
    assert distance.values().min() == 0 and distance.values().max() < 1


def test_a_single_row_and_none():
    assert stored(ops.jaccard(torch.ones(1, 3))).tolist() == [[0.0]]
    nothing = ops.jaccard(torch.ones(0, 3))
    assert nothing.shape == (0, 0) and ops.dbscan(nothing, 0.5).shape == (0,)


def test_equal_rows_have_distance_0():
    features = torch.tensor([[0.0, 1.0]]).repeat(30, 1)
    assert torch.equal(stored(ops.jaccard(features, 8, 3), otherwise=1.0), torch.zeros(30, 30))


def test_blocks_of_rows_change_nothing(monkeypatch):
    features = people(200, 16, 3)
    expected = stored(ops.jaccard(features, 10, 4), otherwise=1.0)
    monkeypatch.setitem(reference.__globals__, "BLOCK_ENTRIES", 3000)
    assert torch.equal(stored(ops.jaccard(features, 10, 4), otherwise=1.0), expected)
    monkeypatch.setitem(reference.__globals__, "BLOCK_ENTRIES", 1)
    assert torch.equal(stored(ops.jaccard(features, 10, 4), otherwise=1.0), expected)


def test_reads_any_layout_and_any_thread_count():
    features = people(400, 32, 4)

    def run():
        distance = ops.jaccard(features.T.contiguous().T, 15, 6)
        return distance.crow_indices(), distance.col_indices(), distance.values()

    same_bits_for_any_thread_count(run)
    expected = stored(ops.jaccard(features, 15, 6), otherwise=1.0)
    torch.testing.assert_close(stored(ops.jaccard(features.T.contiguous().T, 15, 6), otherwise=1.0), expected)


def test_wrong_arguments_are_named(monkeypatch):
    rows = unit_rows(5, 3, 0)
    with pytest.raises(TypeError, match="features must be a tensor"):
        ops.jaccard(rows.numpy())
    with pytest.raises(ValueError, match="features must be a dense tensor of shape"):
        ops.jaccard(rows[0])
    with pytest.raises(ValueError, match="k1 must be an integer of at least 1, got int 0"):
        ops.jaccard(rows, 0)
    with pytest.raises(ValueError, match="k2 must be an integer of at least 1, got float 2.0"):
        ops.jaccard(rows, 3, 2.0)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match="features must be without NaN"):
        ops.jaccard(rows / 0 - rows / 0)
