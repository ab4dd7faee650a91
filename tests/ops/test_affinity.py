from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from emulated import cuda_backend
from graph_checks import fixture, same_bits_for_any_thread_count, stored, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops.affinity import cuda


def row_by_row(queries, bank, k):
    """The definition, in Python: sort by (similarity descending, index ascending), keep the positive, divide."""
    dense = torch.zeros(len(queries), len(bank), dtype=queries.dtype)
    for row, similarity in enumerate((queries @ bank.T).tolist()):
        order = sorted(range(len(bank)), key=lambda column: (-similarity[column], column))[:k]
        kept = [column for column in order if similarity[column] > 0]
        for column in kept:
            dense[row, column] = similarity[column] / sum(similarity[other] for other in kept)
    return dense


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 6), columns=st.integers(0, 8), k=st.integers(0, 10), seed=st.integers(0, 1000))
def test_keeps_the_largest_positive_similarities_and_the_lower_index_on_ties(rows, columns, k, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (rows, 3), generator=generator).double()  # small integers: exact, many ties
    bank = torch.randint(-1, 2, (columns, 3), generator=generator).double()
    graph = ops.affinity(queries, bank, k)
    assert graph.layout == torch.sparse_csr and graph.shape == (rows, columns)
    torch.testing.assert_close(stored(graph), row_by_row(queries, bank, k), rtol=1e-14, atol=0)


def test_long_rows_on_the_emulator(monkeypatch):
    """More neighbours than a warp has lanes, unknown and infinite ones, and more than the kernels are for."""
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randint(-2, 3, (count, 9), generator=generator).float() for count in (21, 150))
    bank[::40, 3], bank[1::40, 2] = torch.nan, torch.inf
    for most, k in ((2048, 140), (2048, 200), (99, 140)):
        monkeypatch.setitem(cuda.__globals__, "GPU_MOST", most)
        with ops.use_backend("reference"):
            expected = ops.affinity(queries, bank, k)
        with cuda_backend():
            graph = ops.affinity(queries, bank, k)
        assert torch.equal(graph.crow_indices(), expected.crow_indices())
        assert torch.equal(graph.col_indices(), expected.col_indices())
        torch.testing.assert_close(graph.values(), expected.values(), equal_nan=True)


def test_any_vector_instructions_give_the_same_graph(isa):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (530, 9), generator=generator).float()  # small integers: exact, many ties
    for bank in (rows, rows[:497]):
        torch.testing.assert_close(stored(ops.affinity(rows, bank, 7)), row_by_row(rows, bank, 7))


@pytest.mark.parametrize("name", ["a1_cmfp_train_clustered", "a2_cmfp_train_negatives_k40"])
@pytest.mark.parametrize("running_on", [nullcontext, cuda_backend])
def test_reproduces_the_blocks_of_the_released_graph(name, running_on):
    arrays = fixture(name)
    sides = {"v": arrays["Fv"], "r": arrays["Fr"]}
    for block in ("vv", "vr", "rv", "rr"):
        with running_on():
            graph = ops.affinity(sides[block[0]], sides[block[1]], int(arrays["k"]))
        torch.testing.assert_close(stored(graph), arrays[f"A_{block}"], rtol=0, atol=1e-5)


def test_a_row_without_a_positive_similarity_stores_nothing():
    graph = ops.affinity(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]), 2)
    assert graph.crow_indices().tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(graph.values(), torch.tensor([1 / 3, 2 / 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_float32_weights(dtype):
    rows = unit_rows(40, 64, 0, dtype)
    graph = ops.affinity(rows, rows, 5)
    assert graph.dtype == torch.float32
    exact = ops.affinity(rows.double(), rows.double(), 5)
    assert torch.equal(graph.col_indices(), exact.col_indices())
    torch.testing.assert_close(graph.values().double(), exact.values(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_reads_any_layout_and_any_thread_count():
    rows = unit_rows(300, 16, 1)
    expected = ops.affinity(rows, rows[:200], 7)
    strided = rows.T.contiguous().T
    assert torch.equal(ops.affinity(strided, strided[:200], 7).col_indices(), expected.col_indices())

    def run():
        graph = ops.affinity(rows, rows[:200], 7)
        return graph.crow_indices(), graph.col_indices(), graph.values()

    same_bits_for_any_thread_count(run)


def test_wrong_arguments_are_named(monkeypatch):
    rows = torch.ones(3, 4)
    with pytest.raises(TypeError, match="queries must be a tensor"):
        ops.affinity([[1.0]], rows, 2)
    with pytest.raises(ValueError, match="bank must be of size 4 in dimension 1"):
        ops.affinity(rows, rows[:, :3], 2)
    with pytest.raises(ValueError, match="k must be an integer of at least 0, got int -1"):
        ops.affinity(rows, rows, -1)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match="bank must be without NaN, got 12 of 12 entries"):
        ops.affinity(rows, rows * torch.nan, 2)
