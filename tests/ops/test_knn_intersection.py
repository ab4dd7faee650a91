from __future__ import annotations

import pytest
import torch

from engine.ops import knn_intersection


def padded_row(indices: set[int], width: int) -> list[int]:
    return sorted(indices) + [-1] * (width - len(indices))


@pytest.mark.parametrize("view_count", [1, 2, 3])
@pytest.mark.parametrize("k", [0, 1, 8, 50])
def test_keeps_what_is_near_to_every_view(view_count, k):
    generator = torch.Generator().manual_seed(view_count)
    base = torch.randn(1, 13, 6, generator=generator)
    views = base + 0.3 * torch.randn(view_count, 13, 6, generator=generator)
    bank = torch.randn(40, 6, generator=generator)
    nearest = (views @ bank.T).argsort(dim=2, descending=True)[:, :, :k].tolist()
    expected = [
        padded_row(set.intersection(*(set(view[row]) for view in nearest)), k) if k else [] for row in range(13)
    ]
    assert knn_intersection(views, bank, k).tolist() == expected


def test_empty_inputs_give_empty_sets():
    assert knn_intersection(torch.zeros(2, 0, 3), torch.zeros(5, 3), 4).shape == (0, 4)
    assert (knn_intersection(torch.zeros(2, 3, 3), torch.zeros(0, 3), 4) == -1).all()


def test_ties_go_to_the_lower_index():
    assert knn_intersection(torch.ones(2, 1, 3), torch.ones(5, 3), 2).tolist() == [[0, 1]]


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"views must be a dense tensor of shape \[V, B, D\]"):
        knn_intersection(torch.zeros(3, 3), torch.zeros(5, 3), 4)
    with pytest.raises(ValueError, match="views must be at least one view"):
        knn_intersection(torch.zeros(0, 3, 3), torch.zeros(5, 3), 4)
    with pytest.raises(ValueError, match="bank must be of size 3 in dimension 1"):
        knn_intersection(torch.zeros(2, 3, 3), torch.zeros(5, 4), 4)
