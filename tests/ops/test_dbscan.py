from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from graph_checks import people, same_bits_for_any_thread_count
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.emulated import cuda_backend, launch
from sklearn.cluster import DBSCAN

from engine import ops
from engine.ops import _cuda

BACKENDS = ("cpu", "cuda", "reference")


def running_on(name):
    return cuda_backend() if name == "cuda" else ops.use_backend(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running_on(request.param):
        yield request.param


def random_distances(count, density, seed, diagonal=True):
    """A symmetric sparse matrix with distances on a grid, so that some equal eps."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((count, count)) < density, 1)
    rows, columns = np.nonzero(upper)
    values = rng.integers(0, 10, len(rows)) / 10
    own = np.arange(count if diagonal else 0)
    matrix = scipy.sparse.coo_array(
        (
            np.concatenate([values, values, 0.0 * own]),
            (np.concatenate([rows, columns, own]), np.concatenate([columns, rows, own])),
        ),
        shape=(count, count),
    ).tocsr()
    matrix.sort_indices()
    return matrix


def as_torch(matrix, dtype=torch.float32):
    bounds, columns = torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long()
    values = torch.from_numpy(matrix.data).to(dtype)
    return torch.sparse_csr_tensor(bounds, columns, values, matrix.shape, check_invariants=True)


def by_sklearn(matrix, eps, min_samples):
    # Of a sparse matrix scikit-learn reads what is stored, zeros included.
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(matrix).labels_.tolist()


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 40),
    density=st.floats(0, 0.4),
    eps=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    min_samples=st.integers(1, 6),
    diagonal=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_labels_are_those_of_scikit_learn(name, count, density, eps, min_samples, diagonal, seed):
    matrix = random_distances(count, density, seed, diagonal)
    with running_on(name):
        labels = ops.dbscan(as_torch(matrix), eps, min_samples)
    assert labels.dtype == torch.int64
    assert labels.tolist() == by_sklearn(matrix, eps, min_samples)


def test_a_border_row_joins_the_first_of_its_clusters(backend):
    # Cores 1 and 5, each with two rows of its own, share the border row 0; row 8 is alone.
    edges = [(1, 2), (1, 3), (1, 0), (5, 6), (5, 7), (5, 0)]
    dense = torch.zeros(9, 9)
    for row, column in edges:
        dense[row, column] = dense[column, row] = 0.2
    labels = ops.dbscan(dense.to_sparse_csr(), 0.2, 4)
    assert labels.tolist() == [0, 0, 0, 0, -1, 1, 1, 1, -1]


def test_a_long_chain_is_one_cluster(backend):
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).numpy()
    ends = order[:-1], order[1:]
    rows, columns = np.concatenate(ends), np.concatenate(ends[::-1])
    matrix = scipy.sparse.csr_array((np.full(len(rows), 0.5), (rows, columns)), shape=(3000, 3000))
    matrix.sort_indices()
    assert ops.dbscan(as_torch(matrix), 0.5, 2).tolist() == [0] * 3000


def test_agrees_with_scikit_learn_on_jaccard_distances():
    distance = ops.jaccard(people(600, 32, 1, noise=0.9), 15, 4)
    shape = tuple(distance.shape)
    parts = (distance.values().numpy(), distance.col_indices().numpy(), distance.crow_indices().numpy())
    for eps in (0.2, 0.4, 0.6):
        labels = ops.dbscan(distance, eps).tolist()
        assert labels == by_sklearn(scipy.sparse.csr_array(parts, shape=shape), eps, 4)
        assert max(labels) > 0


def test_nothing_stored_is_noise_or_a_cluster_of_its_own(backend):
    nothing = torch.zeros(3, 3).to_sparse_csr()
    assert ops.dbscan(nothing, 0.5, 2).tolist() == [-1, -1, -1]
    assert ops.dbscan(nothing, 0.5, 1).tolist() == [0, 1, 2]


def test_any_thread_count_gives_the_same_labels(backend):
    distance = as_torch(random_distances(2500, 0.003, 5), torch.float32)
    same_bits_for_any_thread_count(lambda: [ops.dbscan(distance, 0.4, 4)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_eps_is_compared_in_the_dtype_of_the_distances(backend, dtype):
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the GPU back ends do not compute in float64")
    for eps in (0.1, 0.3, 0.6):
        distance = torch.tensor([[0, eps], [eps, 0]], dtype=dtype).to_sparse_csr()
        assert ops.dbscan(distance, eps, 2).tolist() == [0, 0]
        assert ops.dbscan(distance, eps * 0.98, 2).tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_is_no_column_and_no_number_is_no_neighbour(name):
    bounds, columns = torch.tensor([0, 3, 5, 7]), torch.tensor([-1, 1, 2**40, 0, 2, 1, 3])
    values = torch.tensor([0.1, 0.1, 0.1, 0.1, torch.nan, torch.nan, 0.1])
    distance = torch.sparse_csr_tensor(bounds, columns, values, (3, 3), check_invariants=False)
    with running_on(name):
        assert ops.dbscan(distance, 0.5, 2).tolist() == [0, 0, -1]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_row_bounds_outside_the_entries_are_cut(monkeypatch, name):
    columns, values = torch.tensor([1, 0, 2]), torch.tensor([0.1, 0.1, 0.1])
    bounds = torch.tensor([-(2**62), 1, 2**62, 0, 2**63 - 1])
    distance = torch.sparse_csr_tensor(bounds, columns, values, (4, 4), check_invariants=False)
    with running_on(name):
        assert ops.dbscan(distance, 0.5, 2).tolist() == [0, 0, -1, 0]  # of 0: 1; of 1: 0, 2; of 2: none; of 3: all
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"the row bounds of distance must be in \[0, 4\), got values from -46"):
        ops.dbscan(distance, 0.5)


def test_native_gives_the_labels_of_the_reference():
    for seed, density in enumerate((0.0005, 0.002, 0.01)):
        distance = as_torch(random_distances(3000, density, seed))  # in three blocks of rows
        with ops.use_backend("reference"):
            expected = ops.dbscan(distance, 0.5, 4)
        for name in ("cpu", "cuda"):
            with running_on(name):
                assert torch.equal(ops.dbscan(distance, 0.5, 4), expected)


def test_cuda_gives_the_same_labels_however_blocks_race(monkeypatch):
    def at_once(*arguments):
        launch(*arguments, cooperative=True)  # each block on a thread of its own

    for seed in range(3):
        distance = as_torch(random_distances(600, 0.003, seed))
        with ops.use_backend("cpu"):
            expected = ops.dbscan(distance, 0.6, 3)
        with cuda_backend(), monkeypatch.context() as patch:
            patch.setattr(_cuda, "launch", at_once)
            assert torch.equal(ops.dbscan(distance, 0.6, 3), expected)


def test_wrong_arguments_are_named():
    distance = torch.zeros(3, 3).to_sparse_csr()
    with pytest.raises(ValueError, match=r"distance must be a torch.sparse_csr tensor of shape \[N, N\]"):
        ops.dbscan(torch.zeros(3, 3), 0.5)
    with pytest.raises(ValueError, match=r"distance must be of size 3 in dimension 1 \(its rows\)"):
        ops.dbscan(torch.zeros(3, 4).to_sparse_csr(), 0.5)
    parts = distance.crow_indices(), distance.col_indices(), distance.values()
    with pytest.raises(ValueError, match="the row bounds of distance must be of dtype int64"):
        ops.dbscan(
            torch.sparse_csr_tensor(parts[0].int(), parts[1].int(), parts[2], (3, 3), check_invariants=True), 0.5
        )
    for bounds, values, name in ((parts[0][:3], parts[2], "row bounds"), (parts[0], torch.ones(1), "values")):
        damaged = torch.sparse_csr_tensor(bounds, parts[1], values, (3, 3), check_invariants=False)
        with pytest.raises(ValueError, match=f"the {name} of distance must be of size"):
            ops.dbscan(damaged, 0.5)
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        ops.dbscan(distance, 0)
    with pytest.raises(ValueError, match="min_samples must be an integer of at least 1"):
        ops.dbscan(distance, 0.5, 0)
