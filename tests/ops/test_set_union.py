from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from set_checks import BACKENDS, as_rows, as_sets, check_layout_and_threads, check_rows_beyond_shared_memory, index_sets

from engine.ops import set_union, use_backend


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(sets=index_sets())
def test_is_the_union_ascending_and_padded(name, sets):
    a, b = sets
    expected = [left | right for left, right in zip(as_sets(a), as_sets(b), strict=True)]
    with use_backend(name):
        result = set_union(a, b)
    assert result.dtype == torch.int64 and result.shape == (a.shape[0], a.shape[1] + b.shape[1])
    assert result.tolist() == as_rows(expected, result.shape[1])


def test_layout_and_thread_count_do_not_show():
    check_layout_and_threads(set_union)


def test_rows_may_be_longer_than_shared_memory(monkeypatch):
    check_rows_beyond_shared_memory(set_union, monkeypatch)


def test_refuses_bad_arguments():
    a = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"b must be a tensor \[B, Q\], got list"):
        set_union(a, [[1]])
    with pytest.raises(ValueError, match=r"a must be of dtype int64, got float32 \[2, 3\]"):
        set_union(a.float(), a)
    with pytest.raises(ValueError, match="b must be of size 2 in dimension 0"):
        set_union(a, a[:1])
