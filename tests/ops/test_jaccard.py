from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from graph_checks import fixture, people, same_bits_for_any_thread_count, stored, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.emulated import cuda_backend

from engine import _C, ops
from engine.ops import _reciprocal

MODULE = importlib.import_module("engine.ops.jaccard")
BACKENDS = {"cpu": MODULE.cpu, "reference": MODULE.reference}  # called as such, they search neighbours with one topk


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def jaccard(request):
    return request.param


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


def test_reproduces_the_numpy_loops_of_the_field(jaccard):
    arrays = fixture("g1_jaccard_k20")
    distance = jaccard(arrays["X"], int(arrays["k1"]), int(arrays["k2"]))
    torch.testing.assert_close(stored(distance, otherwise=1.0), arrays["jaccard"], rtol=0, atol=1e-5)
    for name in ("03", "05", "06"):
        labels = ops.dbscan(distance, int(name) / 10, 4)
        assert torch.equal(labels, arrays[f"dbscan_eps{name}"])


@pytest.mark.parametrize("k1, k2", [(1, 1), (2, 6), (3, 2), (5, 1), (9, 4), (10, 6), (30, 6), (100, 100)])
def test_equals_the_rules_with_sets(jaccard, k1, k2):
    features = people(40, 16, k1, group_size=8).double()
    distance = jaccard(features, k1, k2)
    assert distance.dtype == torch.float64
    torch.testing.assert_close(stored(distance, otherwise=1.0), set_by_set(features, k1, k2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("jaccard", BACKENDS.values(), ids=BACKENDS.keys())
@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 14), k1=st.integers(1, 16), k2=st.integers(1, 7), seed=st.integers(0, 1000))
def test_ties_go_to_the_lower_index_and_rows_of_any_length_are_taken(jaccard, count, k1, k2, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-1, 2, (count, 3), generator=generator).double()  # small integers: exact, many ties
    distance = stored(jaccard(features, k1, k2), otherwise=1.0)
    torch.testing.assert_close(distance, set_by_set(features, k1, k2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_symmetric_to_the_bit_with_the_diagonal_and_without_ones(jaccard, dtype):
    distance = jaccard(people(150, 24, 2).to(dtype), 12, 4)
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dense = stored(distance, otherwise=1.0)
    assert torch.equal(dense, dense.T)
    rows = torch.arange(150).repeat_interleave(distance.crow_indices().diff())
    diagonal = distance.values()[rows == distance.col_indices()]
    assert diagonal.tolist() == [0.0] * 150
    assert distance.values().min() == 0 and distance.values().max() < 1


def test_a_single_row_and_none(jaccard):
    assert stored(jaccard(torch.ones(1, 3))).tolist() == [[0.0]]
    nothing = jaccard(torch.ones(0, 3))
    assert nothing.shape == (0, 0) and ops.dbscan(nothing, 0.5).shape == (0,)


def test_equal_rows_have_distance_0(jaccard):
    features = torch.tensor([[0.0, 1.0]]).repeat(30, 1)
    assert torch.equal(stored(jaccard(features, 8, 3), otherwise=1.0), torch.zeros(30, 30))


def test_blocks_of_rows_change_nothing(monkeypatch):
    features = people(200, 16, 3)
    expected = stored(MODULE.reference(features, 10, 4), otherwise=1.0)
    monkeypatch.setattr(_reciprocal, "BLOCK_ENTRIES", 3000)
    assert torch.equal(stored(MODULE.reference(features, 10, 4), otherwise=1.0), expected)
    monkeypatch.setattr(_reciprocal, "BLOCK_ENTRIES", 1)
    assert torch.equal(stored(MODULE.reference(features, 10, 4), otherwise=1.0), expected)


def assert_same_entries(one, other):
    assert torch.equal(one.crow_indices(), other.crow_indices())
    assert torch.equal(one.col_indices(), other.col_indices())
    assert torch.equal(one.values(), other.values())


def test_native_gives_the_bits_of_the_reference_where_the_weights_are_the_same(monkeypatch):
    # Groups of 6 equal rows, so far apart that the weight of another's is 0: no rounding but that of 1 / n.
    count, group_size = 9000, 6
    row = torch.arange(count).unsqueeze(1)
    features = 100.0 * (row // group_size).double()
    group = row // group_size * group_size + (row + torch.arange(group_size)) % group_size
    strangers = (row + torch.tensor([100, count - 100, 4100])) % count
    monkeypatch.setattr(MODULE, "_nearest", lambda features, k, precision: torch.cat([group, strangers], 1)[:, :k])
    for k1, k2 in [(9, 8), (5, 3), (1, 1)]:
        assert_same_entries(MODULE.cpu(features, k1, k2), MODULE.reference(features, k1, k2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1e-3, 40])
def test_native_stays_in_the_error_budget(dtype, scale):
    features = (scale * people(300, 65, 6)).to(dtype)
    truth = stored(MODULE.reference(features.double(), 20, 6), otherwise=1.0)
    plain = stored(MODULE.reference(features, 20, 6), otherwise=1.0)
    native = stored(MODULE.cpu(features, 20, 6), otherwise=1.0)
    assert (native - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_native_agrees_on_all_instruction_sets(monkeypatch, instructions, dtype):
    features = people(200, 77, 7).to(dtype)
    expected = stored(MODULE.reference(features, 12, 4), otherwise=1.0)
    monkeypatch.setenv("ENGINE_ISA", instructions)
    try:
        _C.isa()
    except ValueError as error:
        pytest.skip(str(error))
    native = stored(MODULE.cpu(features, 12, 4), otherwise=1.0)
    torch.testing.assert_close(native, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_native_skips_neighbours_that_are_no_rows(monkeypatch):
    features = people(90, 8, 8)
    rank = MODULE._nearest(features, 10, "ieee")
    rank[:, 7:] = torch.tensor([-1, 90, 2**40])
    monkeypatch.setattr(MODULE, "_nearest", lambda features, k, precision: rank)
    distance = MODULE.cpu(features, 10, 10)
    monkeypatch.setattr(MODULE, "_nearest", lambda features, k, precision: rank[:, :7])
    members = MODULE.cpu(features, 10, 7)
    assert torch.equal(distance.col_indices(), members.col_indices())  # the sums are the same, shares of 10 not of 7
    rank[:] = -1
    assert torch.equal(stored(MODULE.cpu(features, 7, 3), otherwise=1.0), 1 - torch.eye(90))


def test_native_ends_on_features_that_are_no_numbers():
    features = people(100, 8, 9)
    features[3], features[4, 2], features[5] = torch.nan, torch.inf, 3e38
    distance = MODULE.cpu(features, 10, 4)
    dense = stored(distance, otherwise=1.0)
    assert torch.equal(dense, dense.T) and not dense.diagonal().any()
    assert not dense.isnan().any()


def on_the_emulator(features, k1, k2, descending=False):
    with cuda_backend(descending=descending):
        return MODULE.cuda(features, k1, k2)


@pytest.mark.parametrize("k1, k2", [(1, 1), (2, 6), (9, 4), (30, 6), (100, 100)])
@pytest.mark.parametrize("window", [7, 4096])
def test_cuda_gives_the_entries_of_native_code(monkeypatch, window, k1, k2):
    monkeypatch.setattr(MODULE, "WINDOW", window)
    features = people(40, 16, k1, group_size=8)
    distance, expected = on_the_emulator(features, k1, k2), MODULE.cpu(features, k1, k2)
    assert torch.equal(distance.crow_indices(), expected.crow_indices())
    assert torch.equal(distance.col_indices(), expected.col_indices())
    torch.testing.assert_close(distance.values(), expected.values(), rtol=0, atol=2e-7)
    assert_same_entries(on_the_emulator(features, k1, k2, descending=True), distance)
    assert torch.equal(stored(distance), stored(distance).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1e-3, 40])
def test_cuda_stays_in_the_error_budget(dtype, scale):
    features = (scale * people(150, 65, 6)).to(dtype)
    truth = stored(MODULE.reference(features.double(), 20, 6), otherwise=1.0)
    plain = stored(MODULE.reference(features, 20, 6), otherwise=1.0)
    found = stored(on_the_emulator(features, 20, 6), otherwise=1.0)
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-7


def test_cuda_gives_the_bits_of_native_code_where_the_weights_are_the_same(monkeypatch):
    row = torch.arange(300).unsqueeze(1)
    features = 100.0 * (row // 6).float()
    group = row // 6 * 6 + (row + torch.arange(6)) % 6
    rank = torch.cat([group, (row + torch.tensor([100, 200, 37])) % 300], 1)
    monkeypatch.setattr(MODULE, "_nearest", lambda features, k, precision: rank[:, :k])
    monkeypatch.setattr(MODULE, "WINDOW", 50)
    for k1, k2 in [(9, 8), (5, 3), (1, 1)]:
        assert_same_entries(on_the_emulator(features, k1, k2), MODULE.cpu(features, k1, k2))


def test_cuda_reads_no_neighbours_that_are_no_rows(monkeypatch):
    features = people(90, 8, 8)
    rank = MODULE._nearest(features, 10, "ieee")
    rank[:, 7:] = torch.tensor([-1, 90, 2**40])
    rank[::9, 1] = rank[::9, 0]
    monkeypatch.setattr(MODULE, "_nearest", lambda features, k, precision: rank)
    distance = on_the_emulator(features, 10, 10)
    assert_same_entries(on_the_emulator(features, 10, 10, descending=True), distance)
    assert torch.equal(stored(distance), stored(distance).T)
    rank[:] = -1
    assert torch.equal(stored(on_the_emulator(features, 10, 3), otherwise=1.0), 1 - torch.eye(90))


def test_cuda_ends_on_features_that_are_no_numbers():
    features = people(60, 8, 9)
    features[3], features[4, 2], features[5] = torch.nan, torch.inf, 3e38
    dense = stored(on_the_emulator(features, 10, 4), otherwise=1.0)
    assert torch.equal(dense, dense.T) and not dense.diagonal().any()
    assert not dense.isnan().any()


def test_reads_any_layout_and_any_thread_count(jaccard):
    features = people(400, 32, 4)

    def run():
        distance = jaccard(features.T.contiguous().T, 15, 6)
        return distance.crow_indices(), distance.col_indices(), distance.values()

    same_bits_for_any_thread_count(run)
    expected = stored(jaccard(features, 15, 6), otherwise=1.0)
    torch.testing.assert_close(stored(jaccard(features.T.contiguous().T, 15, 6), otherwise=1.0), expected)


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
