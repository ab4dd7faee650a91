"""The density of prototypes."""

from __future__ import annotations

import torch
from torch.distributions import Normal
from torch.nn import functional as F

from engine import density


def rows(count: int, width: int = 6, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def two_lumps() -> torch.Tensor:
    axes = torch.eye(6, dtype=torch.float64)[[0] * 10 + [1] * 30]
    return F.normalize(axes + 0.3 * rows(40))


def expected(statistics, points):
    weights, first, second = statistics.split([1, 6, 6], dim=1)
    mean = first / weights
    deviation = (second / weights - mean.square()).clamp(min=density.FLOOR / 6).sqrt()
    each = torch.stack([Normal(mean[i], deviation[i]).log_prob(points).sum(1) for i in range(2)])
    return -((weights / weights.sum()).log() + each).logsumexp(0).mean() / 6


def test_it_begins_with_the_two_lumps_that_there_are():
    statistics = density.begin(two_lumps())
    assert sorted((statistics[:, 0] * 40).round().int().tolist()) == [10, 30]


def test_it_is_the_likelihood_of_a_mixture_of_diagonal_gaussians():
    points, statistics = two_lumps(), density.begin(two_lumps())
    torch.testing.assert_close(density.negative_log_likelihood(statistics, points), expected(statistics, points))


def test_statistics_move_towards_those_of_the_rows_by_a_moving_average():
    points, statistics = two_lumps(), density.begin(two_lumps())
    assert torch.equal(density.follow(statistics, points, 1.0), statistics)
    moved = density.follow(statistics, points, 0.9)
    torch.testing.assert_close(moved, 0.9 * statistics + 0.1 * density.follow(statistics, points, 0.0))
    torch.testing.assert_close(density.follow(statistics, points, 0.0)[:, 1:7].sum(0), points.mean(0))


def test_few_or_equal_rows_and_none_give_numbers():
    for points in (rows(1), rows(1).repeat(5, 1), rows(2), rows(0)):
        statistics = density.begin(points)
        assert statistics.isfinite().all() and density.follow(statistics, points, 0.99).isfinite().all()
        if len(points):
            points = points.requires_grad_()
            loss = density.negative_log_likelihood(statistics, points)
            loss.backward()
            assert loss.isfinite() and points.grad.isfinite().all()
