from __future__ import annotations

import contrast_checks as checks
import pytest
import torch

from engine.ops import neighbor_contrast, use_backend

pytestmark = pytest.mark.usefixtures("backend")

BANK = checks.unit_rows(9, 7, seed=2)
POSITIVES = torch.tensor([[0, 3, -1], [-1, 8, -1], [-1, -1, -1], [5, 4, 0], [2, 2, -1]])


def positives_of(row_count: int, bank_count: int) -> torch.Tensor:
    positives = torch.rand(row_count, bank_count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :6]
    return positives.masked_fill(torch.rand(positives.shape) < 0.4, -1)


def test_is_the_share_of_the_positives_in_the_softmax():
    features = checks.unit_rows(5, 7, seed=1)
    share = (features @ BANK.T / 0.1).softmax(dim=1)
    sets = ((0, 3), (8,), range(9), (5, 4, 0), (2,))  # the third row has no positive: its share counts as 1
    expected = -torch.stack([share[row, list(columns)].sum() for row, columns in enumerate(sets)]).log()
    torch.testing.assert_close(
        neighbor_contrast(features, BANK, POSITIVES, 0.1, reduction="none"), expected, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(neighbor_contrast(features, BANK, POSITIVES, 0.1), expected.sum() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("row_count", "bank_count"), [(1, 1), (17, 50), (100, 301)])
def test_stays_in_the_error_budget(row_count, bank_count, dtype, monkeypatch):
    positives = positives_of(row_count, bank_count)
    checks.check_error_budget("neighbor_contrast", dtype, positives, bank_count, monkeypatch)


def test_gradient_is_that_of_the_value():
    checks.check_gradient("neighbor_contrast", POSITIVES, BANK.double())


def test_is_a_proper_operator_and_compiles():
    checks.check_operator("neighbor_contrast", POSITIVES, BANK)


def test_problems_have_the_losses_they_have_alone():
    checks.check_problems("neighbor_contrast", POSITIVES, BANK)


def test_is_the_same_under_autocast():
    checks.check_autocast("neighbor_contrast", POSITIVES, BANK)


def test_refuses_bad_arguments():
    checks.check_refusals("neighbor_contrast", POSITIVES, BANK)


def test_order_padding_and_repeats_do_not_matter():
    features = checks.unit_rows(5, 7, seed=1)
    expected = neighbor_contrast(features, BANK, POSITIVES, 0.1, reduction="none")
    shuffled = torch.cat([POSITIVES.flip(1), torch.full((5, 2), -1), POSITIVES[:, :1]], dim=1)
    assert torch.equal(neighbor_contrast(features, BANK, shuffled, 0.1, reduction="none"), expected)


@pytest.mark.parametrize("fill", [-1, 9])  # 9: beyond the bank, never read
def test_no_positive_is_no_loss_and_no_gradient(fill):
    features = checks.unit_rows(5, 7, seed=1)
    for rows, bank, width in (
        (features, BANK, 3),
        (features, BANK, 0),
        (features, BANK[:0], 3),
        (features[:0], BANK, 3),
    ):
        positives = torch.full((rows.shape[0], width), fill)
        value, gradient = checks.value_and_gradient(neighbor_contrast, rows, bank, positives, 0.1)
        assert value == 0 and not gradient.any()
        assert not neighbor_contrast(rows, bank, positives, 0.1, reduction="none").any()


@pytest.mark.parametrize(("row_count", "bank_count", "width"), [(1, 1, 1), (65, 96, 300), (130, 700, 49), (3, 5000, 7)])
def test_native_paths_stay_in_the_error_budget(isa, row_count, bank_count, width):
    checks.check_native("neighbor_contrast", positives_of(row_count, bank_count), bank_count, width)


def test_thread_count_does_not_show():
    row_count, bank_count = 130, 301
    checks.check_thread_counts("neighbor_contrast", positives_of(row_count, bank_count), bank_count)


def test_extremes_are_neither_lost_nor_spread():
    checks.check_extremes("neighbor_contrast", POSITIVES, BANK)


def test_indices_beyond_the_bank_are_never_read(isa):
    wild = [-(2**63), 2**63 - 1, -1, 9, 2**40]
    features, positives = checks.unit_rows(2, 7, seed=1), torch.tensor([[4, *wild], [*wild, wild[0]]])
    with use_backend("cpu"):
        loss = neighbor_contrast(features, BANK, positives, 0.1, reduction="none")
    torch.testing.assert_close(loss[0], neighbor_contrast(features, BANK, positives[:, :1], 0.1, reduction="none")[0])
    assert loss[1] == 0
