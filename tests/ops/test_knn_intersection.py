from __future__ import annotations

import pytest
import torch
from graph_checks import same_bits_for_any_thread_count

from engine.ops import knn_intersection, use_backend


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def padded_row(indices: set[int], width: int) -> list[int]:
    return sorted(indices) + [-1] * (width - len(indices))


@pytest.mark.parametrize("view_count", [1, 2, 3])
@pytest.mark.parametrize("k", [0, 1, 8, 50])
def test_keeps_what_is_near_to_every_view(view_count, k, backend):
    generator = torch.Generator().manual_seed(view_count)
    base = torch.randn(1, 13, 6, generator=generator)
    views = base + 0.3 * torch.randn(view_count, 13, 6, generator=generator)
    bank = torch.randn(40, 6, generator=generator)
    nearest = (views @ bank.T).argsort(dim=2, descending=True)[:, :, :k].tolist()
    expected = [
        padded_row(set.intersection(*(set(view[row]) for view in nearest)), k) if k else [] for row in range(13)
    ]
    assert knn_intersection(views, bank, k).tolist() == expected
    assert knn_intersection(views.transpose(0, 2).contiguous().transpose(0, 2), bank, k).tolist() == expected


def test_empty_inputs_give_empty_sets(backend):
    assert knn_intersection(torch.zeros(2, 0, 3), torch.zeros(5, 3), 4).shape == (0, 4)
    assert (knn_intersection(torch.zeros(2, 3, 3), torch.zeros(0, 3), 4) == -1).all()


def test_ties_go_to_the_lower_index(backend):
    assert knn_intersection(torch.ones(2, 1, 3), torch.ones(5, 3), 2).tolist() == [[0, 1]]


def test_thread_count_does_not_show():
    views, bank = torch.randn(3, 400, 6, generator=torch.Generator().manual_seed(1)), torch.eye(6).repeat(20, 1)
    with use_backend("cpu"):
        same_bits_for_any_thread_count(lambda: [knn_intersection(views, bank, 30)])


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"views must be a dense tensor of shape \[V, B, D\]"):
        knn_intersection(torch.zeros(3, 3), torch.zeros(5, 3), 4)
    with pytest.raises(ValueError, match="views must be at least one view"):
        knn_intersection(torch.zeros(0, 3, 3), torch.zeros(5, 3), 4)
    with pytest.raises(ValueError, match="bank must be of size 3 in dimension 1"):
        knn_intersection(torch.zeros(2, 3, 3), torch.zeros(5, 4), 4)
