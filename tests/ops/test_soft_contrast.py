from __future__ import annotations

import contrast_checks as checks
import pytest
import torch
from torch.nn import functional as F

from engine.ops import soft_contrast

pytestmark = pytest.mark.usefixtures("backend")

BANK = checks.unit_rows(9, 7, seed=2)
WEIGHTS = torch.rand(5, 9, generator=torch.Generator().manual_seed(4))


def test_is_cross_entropy_with_soft_targets():
    features = checks.unit_rows(5, 7, seed=1)
    expected = F.cross_entropy(features @ BANK.T / 0.1, WEIGHTS, reduction="none")
    torch.testing.assert_close(soft_contrast(features, BANK, WEIGHTS, 0.1, reduction="none"), expected)
    torch.testing.assert_close(soft_contrast(features, BANK, WEIGHTS, 0.1, reduction="sum"), expected.sum())
    torch.testing.assert_close(soft_contrast(features, BANK, WEIGHTS, 0.1), expected.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("row_count", "cluster_count"), [(1, 1), (17, 5), (100, 301)])
def test_stays_in_the_error_budget(row_count, cluster_count, dtype, monkeypatch):
    weights = torch.rand(row_count, cluster_count, generator=torch.Generator().manual_seed(0))
    checks.check_error_budget("soft_contrast", dtype, weights, cluster_count, monkeypatch)


def test_gradient_is_that_of_the_value():
    checks.check_gradient("soft_contrast", WEIGHTS.double(), BANK.double())


def test_is_a_proper_operator_and_compiles():
    checks.check_operator("soft_contrast", WEIGHTS, BANK)


def test_problems_have_the_losses_they_have_alone():
    checks.check_problems("soft_contrast", WEIGHTS, BANK)


def test_is_the_same_under_autocast():
    checks.check_autocast("soft_contrast", WEIGHTS, BANK)


def test_refuses_bad_arguments():
    checks.check_refusals("soft_contrast", WEIGHTS, BANK)
    with pytest.raises(ValueError, match="weights must be a constant"):
        soft_contrast(checks.unit_rows(5, 7, seed=1), BANK, WEIGHTS.clone().requires_grad_(), 0.1)


def test_no_weight_or_no_row_is_no_loss_and_no_gradient():
    features = checks.unit_rows(5, 7, seed=1)
    for rows, bank in ((features, BANK), (features, BANK[:0]), (features[:0], BANK)):
        weights = torch.zeros(rows.shape[0], bank.shape[0])
        value, gradient = checks.value_and_gradient(soft_contrast, rows, bank, weights, 0.1)
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize(("row_count", "bank_count", "width"), [(1, 1, 1), (65, 96, 300), (130, 700, 49), (3, 5000, 7)])
def test_native_paths_stay_in_the_error_budget(isa, row_count, bank_count, width):
    checks.check_native(
        "soft_contrast",
        torch.rand(row_count, bank_count, generator=torch.Generator().manual_seed(0)),
        bank_count,
        width,
    )


def test_thread_count_does_not_show():
    row_count, bank_count = 130, 301
    checks.check_thread_counts(
        "soft_contrast", torch.rand(row_count, bank_count, generator=torch.Generator().manual_seed(0)), bank_count
    )


def test_extremes_are_neither_lost_nor_spread():
    checks.check_extremes("soft_contrast", WEIGHTS, BANK)
