from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.ops import topk as topk_of
from engine.ops.topk import reference


def random_rows(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def sorted_whole(queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    similarity = queries @ bank.T
    if exclude_self:
        similarity.fill_diagonal_(-torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@settings(max_examples=60, deadline=None)
@given(
    query_count=st.integers(0, 7),
    bank_count=st.integers(0, 9),
    k=st.integers(0, 12),
    exclude_self=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_orders_by_similarity_then_index_and_pads(query_count, bank_count, k, exclude_self, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (bank_count, 3), generator=generator).float()  # small integers: exact, many ties
    queries = bank if exclude_self else torch.randint(-1, 2, (query_count, 3), generator=generator).float()
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
    expected = topk_of(rows, rows, 7, exclude_self=exclude_self)
    monkeypatch.setitem(reference.__globals__, "BLOCK_ENTRIES", 1000)  # the operator hides its module's name
    assert all(map(torch.equal, topk_of(rows, rows, 7, exclude_self=exclude_self), expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_compared_in_float32(dtype):
    queries, bank = random_rows(33, 64, 1).to(dtype), random_rows(500, 64, 2).to(dtype)
    values, indices = topk_of(queries, bank, 10)
    exact = queries.double() @ bank.double().T
    assert values.dtype == dtype
    torch.testing.assert_close(exact.gather(1, indices), exact.topk(10).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, exact.gather(1, indices).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(topk_of(queries, bank, 10)[1], indices)


def test_reads_any_layout_and_leaves_inputs_alone():
    queries, bank = random_rows(9, 8, 1), random_rows(20, 8, 2)
    copies = queries.clone(), bank.clone()
    _, indices = topk_of(queries, bank, 3)
    assert torch.equal(topk_of(queries.T.contiguous().T, bank[:, None].expand(-1, 2, -1)[:, 1], 3)[1], indices)
    assert torch.equal(queries, copies[0]) and torch.equal(bank, copies[1])


def test_carries_no_gradient():
    queries = random_rows(4, 8, 1).requires_grad_()
    assert not ops.topk(queries, random_rows(5, 8, 2), 2)[0].requires_grad


def test_refuses_bad_arguments():
    rows = random_rows(4, 8, 1)
    with pytest.raises(TypeError, match=r"queries must be a tensor \[B, D\], got NoneType"):
        topk_of(None, rows, 1)
    with pytest.raises(ValueError, match=r"bank must be a dense tensor of shape \[N, D\], got float32 \[8\]"):
        topk_of(rows, rows[0], 1)
    with pytest.raises(ValueError, match="bank must be of size 8 in dimension 1"):
        topk_of(rows, rows[:, 1:], 1)
    with pytest.raises(ValueError, match="k must be an integer of at least 0, got int -1"):
        topk_of(rows, rows, -1)
    with pytest.raises(ValueError, match=r"queries must be of size 3 .* as exclude_self is set"):
        topk_of(rows, rows[:3], 1, exclude_self=True)
