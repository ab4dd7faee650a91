from __future__ import annotations

import emulated
import pytest
import torch
from emulated import cuda_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.ops import topk as topk_of
from engine.ops import use_backend
from engine.ops.topk import reference

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=[*BACKENDS, "emulator"])
def backend(request):
    with cuda_backend() if request.param == "emulator" else use_backend(request.param):
        yield request.param


def random_rows(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def sorted_whole(queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    similarity = queries @ bank.T
    if exclude_self:
        similarity.fill_diagonal_(-torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def integer_rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: their products are exact, and many tie."""
    return torch.randint(-2, 3, (count, width), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    query_count=st.integers(0, 7),
    bank_count=st.integers(0, 9),
    k=st.integers(0, 12),
    exclude_self=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_orders_by_similarity_then_index_and_pads(name, query_count, bank_count, k, exclude_self, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (bank_count, 3), generator=generator).float()  # small integers: exact, many ties
    queries = bank if exclude_self else torch.randint(-1, 2, (query_count, 3), generator=generator).float()
    with use_backend(name):
        values, indices = topk_of(queries, bank, k, exclude_self=exclude_self)
    found = max(0, min(k, bank_count - exclude_self))
    expected_values, expected_indices = sorted_whole(queries, bank, found, exclude_self)
    assert torch.equal(values[:, :found], expected_values)
    assert torch.equal(indices[:, :found], expected_indices)
    assert values.shape == indices.shape == (queries.shape[0], k)
    assert (values[:, found:] == -torch.inf).all() and (indices[:, found:] == -1).all()


@pytest.mark.parametrize("exclude_self", [False, True])
def test_blocks_of_queries_change_nothing(exclude_self, monkeypatch):
    rows = torch.randint(-2, 3, (101, 5), generator=torch.Generator().manual_seed(0)).float()
    expected = reference(rows, rows, 7, exclude_self=exclude_self)
    monkeypatch.setitem(reference.__globals__, "BLOCK_ENTRIES", 1000)  # the operator hides its module's name
    assert all(map(torch.equal, reference(rows, rows, 7, exclude_self=exclude_self), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("query_count", "bank_count", "width", "k"),
    [(1, 1, 1, 1), (97, 481, 7, 1), (500, 1100, 259, 30), (3, 990, 16, 990), (2, 479, 3, 600)],
)
def test_native_paths_find_what_the_reference_finds(isa, query_count, bank_count, width, k, dtype):
    queries, bank = integer_rows(query_count, width, 1, dtype), integer_rows(bank_count, width, 2, dtype)
    with use_backend("cpu"):
        assert all(map(torch.equal, topk_of(queries, bank, k), reference(queries, bank, k)))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("count", [1, 95, 480, 1003])
def test_native_self_search_finds_what_the_reference_finds(isa, count, exclude_self):
    rows = integer_rows(count, 9, 1)
    expected = reference(rows, rows, 13, exclude_self=exclude_self)
    with use_backend("cpu"):
        for bank in (rows, rows.clone()):
            assert all(map(torch.equal, topk_of(rows, bank, 13, exclude_self=exclude_self), expected))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("count", "k", "most"), [(1, 3, 9), (63, 1, 9), (130, 13, 99), (101, 120, 101), (90, 30, 20)])
def test_blocks_of_the_gpu_find_what_the_reference_finds(count, k, most, exclude_self, monkeypatch):
    """On the emulator, in blocks of 32; the last of the searches is too wide for a block of threads."""
    monkeypatch.setitem(reference.__globals__, "GPU_BLOCK_ROWS", 32)
    monkeypatch.setitem(reference.__globals__, "GPU_MOST", most)
    rows = integer_rows(count, 9, 1)
    if exclude_self:  # no product is -inf: the reference does not tell them from those that are left out
        rows[:, 3] = rows[:, 3].abs()
    rows[count // 2 :: 20, 2] = torch.nan
    rows[count // 3 :: 20, 3] = torch.inf
    values, indices = reference(rows, rows, k, exclude_self=exclude_self)
    for bank in (rows, rows.clone()):
        for descending in (False, True):
            with cuda_backend(descending=descending):
                found = topk_of(rows, bank, k, exclude_self=exclude_self)
            torch.testing.assert_close(found[0], values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found[1], indices)


@pytest.mark.parametrize("k", [30, 1100, 2048])
@pytest.mark.parametrize("growing", [False, True])
def test_long_rows_on_the_emulator(k, growing):
    """The candidates of a query overflow their list, at every step where each is better than the one before."""
    bank = torch.arange(5000.0)[:, None] if growing else integer_rows(5000, 9, 2)
    queries = torch.ones(2, 1) if growing else integer_rows(2, 9, 1)
    with cuda_backend():
        assert all(map(torch.equal, topk_of(queries, bank, k), reference(queries, bank, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_similarity_of_two_rows_depends_on_nothing_else(isa, dtype):
    rows = torch.randn(1003, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    with use_backend("cpu"):
        values, indices = topk_of(rows, rows, 20)
        for part in (rows.clone(), rows[17:400], rows[1000:]):  # without symmetry, and in other blocks
            first = 0 if len(part) == len(rows) else int((rows == part[0]).all(1).nonzero())
            here = slice(first, first + len(part))
            assert all(map(torch.equal, topk_of(part, rows, 20), (values[here], indices[here])))


def test_thread_count_does_not_show():
    rows = random_rows(2500, 33, 1)
    thread_count = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [topk_of(rows, rows, 30), topk_of(rows, rows.clone(), 30)]
    finally:
        torch.set_num_threads(thread_count)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_native_stays_in_the_error_budget(isa):
    queries, bank = random_rows(130, 1031, 1), random_rows(501, 1031, 2)
    exact = queries.double() @ bank.double().T

    def error(name: str) -> Tensor:
        with use_backend(name):
            values, indices = topk_of(queries, bank, 30)
        return (values - exact.gather(1, indices)).abs().max()

    assert error("cpu") <= 2 * error("reference") + 1e-8


@pytest.mark.parametrize("power", [-60, 60])
def test_scale_changes_nothing_but_the_scale(power, backend):
    rows = random_rows(100, 40, 1)
    values, indices = topk_of(rows, rows, 10)
    scaled, same = topk_of(rows * 2.0**power, rows, 10)
    assert torch.equal(scaled, values * 2.0**power) and torch.equal(same, indices)


def test_equal_rows_are_taken_from_the_first(backend):
    rows = torch.ones(700, 5)
    assert torch.equal(topk_of(rows, rows, 40)[1], torch.arange(40).expand(700, 40))
    assert topk_of(rows, rows, 2, exclude_self=True)[1][:3].tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_nan_is_the_largest_similarity(isa, exclude_self, dtype):
    rows = integer_rows(600, 9, 1, dtype)
    rows[[5, 300, 301], 2] = torch.nan
    rows[7, 3] = torch.inf
    values, indices = reference(rows, rows, 7, exclude_self=exclude_self)
    assert indices[0].tolist()[:3] == [5, 300, 301] and values[0][:3].isnan().all()
    assert indices[5].tolist() == [row for row in range(8) if row != 5 or not exclude_self][:7]
    with use_backend("cpu"):
        for bank in (rows, rows.clone()):
            found = topk_of(rows, bank, 7, exclude_self=exclude_self)
            torch.testing.assert_close(found[0], values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found[1], indices)


def test_zeros_of_both_signs_tie_on_the_emulator():
    """Torch on a CPU multiplies to none below 0."""
    products, entries, values = (
        torch.tensor([[-0.0, 0.0] * 20]),
        torch.zeros(1, 7, dtype=torch.int64),
        torch.empty(1, 7),
    )
    arguments = products, 40, 0, 0, False, 7, 7, entries
    emulated.launch("topk", "topk_select_kernel", 1, 256, arguments, shared_bytes=8 * (2 * 7 + 1024))
    emulated.launch("topk", "topk_write_kernel", 1, 256, (7, entries, values))
    assert entries.tolist() == [list(range(7))] and values.tolist() == [[0] * 7]


def test_each_better_than_the_one_before(backend):
    bank = torch.arange(5000.0)[:, None]
    values, indices = topk_of(torch.ones(2, 1), bank, 3)
    assert values[1].tolist() == [4999, 4998, 4997] and indices[0].tolist() == [4999, 4998, 4997]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_compared_in_float32(dtype, backend):
    queries, bank = random_rows(33, 64, 1).to(dtype), random_rows(500, 64, 2).to(dtype)
    values, indices = topk_of(queries, bank, 10)
    exact = queries.double() @ bank.double().T
    assert values.dtype == dtype
    torch.testing.assert_close(exact.gather(1, indices), exact.topk(10).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, exact.gather(1, indices).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(topk_of(queries, bank, 10)[1], indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_converts_half_types_exactly(isa, dtype):
    queries, bank = random_rows(101, 517, 1).to(dtype), random_rows(503, 517, 2).to(dtype)
    with use_backend("cpu"):
        for rows in (queries, bank):
            values, indices = topk_of(rows.float(), bank.float(), 20)
            assert all(map(torch.equal, topk_of(rows, bank, 20), (values.to(dtype), indices)))
            assert all(map(torch.equal, topk_of(rows.float(), bank, 20), (values, indices)))


def test_problems_have_the_neighbours_they_have_alone(backend):
    queries, bank = (torch.stack([random_rows(count, 9, seed) for seed in range(6)]) for count in (4, 11))
    queries, bank = queries.view(3, 2, 4, 9), bank.view(2, 3, 11, 9).transpose(0, 1)
    for rows, exclude_self in ((queries, False), (bank, True)):
        values, indices = topk_of(rows, bank, 5, exclude_self=exclude_self)
        assert values.shape == indices.shape == (*rows.shape[:-1], 5)
        for i in range(3):
            for j in range(2):
                one = rows[i, j]
                alone = topk_of(one, one if rows is bank else bank[i, j], 5, exclude_self=exclude_self)
                assert torch.equal(values[i, j], alone[0]) and torch.equal(indices[i, j], alone[1])
    values, indices = topk_of(queries[:, :0], bank[:, :0].half(), 5)
    assert values.shape == indices.shape == (3, 0, 4, 5) and values.dtype == torch.float32


def test_carries_no_gradient():
    queries = random_rows(4, 8, 1).requires_grad_()
    assert not ops.topk(queries, random_rows(5, 8, 2), 2)[0].requires_grad


def test_refuses_bad_arguments():
    rows = random_rows(4, 8, 1)
    with pytest.raises(TypeError, match=r"queries must be a tensor \[\.\.\., B, D\], got NoneType"):
        topk_of(None, rows, 1)
    with pytest.raises(ValueError, match=r"bank must be a dense tensor of shape \[\.\.\., N, D\], got float32 \[8\]"):
        topk_of(rows, rows[0], 1)
    with pytest.raises(ValueError, match="bank must be of size 8 in dimension 1"):
        topk_of(rows, rows[:, 1:], 1)
    with pytest.raises(
        ValueError, match=r"bank must be of leading dimensions \[\] like queries, got float32 \[2, 4, 8\]"
    ):
        topk_of(rows, rows.expand(2, -1, -1), 1)
    with pytest.raises(ValueError, match="k must be an integer of at least 0, got int -1"):
        topk_of(rows, rows, -1)
    with pytest.raises(ValueError, match=r"queries must be of size 3 .* as exclude_self is set"):
        topk_of(rows, rows[:3], 1, exclude_self=True)
