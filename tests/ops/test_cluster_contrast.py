from __future__ import annotations

from pathlib import Path

import contrast_checks as checks
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.ops import cluster_contrast

pytestmark = pytest.mark.usefixtures("backend")

BANK = checks.unit_rows(9, 7, seed=2)
LABELS = torch.tensor([0, 3, -1, 8, 3])


def test_is_cross_entropy_over_the_rows_with_a_label():
    features = checks.unit_rows(5, 7, seed=1)
    expected = F.cross_entropy(features @ BANK.T / 0.1, LABELS, ignore_index=-1, reduction="none")
    torch.testing.assert_close(cluster_contrast(features, BANK, LABELS, 0.1, reduction="none"), expected)
    torch.testing.assert_close(cluster_contrast(features, BANK, LABELS, 0.1, reduction="sum"), expected.sum())
    torch.testing.assert_close(cluster_contrast(features, BANK, LABELS, 0.1), expected.sum() / 4)


def test_gives_the_loss_and_gradient_of_the_release():
    data = np.load(Path(__file__).parents[1] / "data" / "e2_memory_cross_true.npz")
    inputs = torch.from_numpy(data["x"]).requires_grad_()
    features = F.normalize(inputs)
    loss = cluster_contrast(
        features, torch.from_numpy(data["memory_before"]), torch.from_numpy(data["labels"]), float(data["temp"])
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(float(data["loss"])), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad, torch.from_numpy(data["grad_x"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("row_count", "cluster_count"), [(1, 1), (17, 5), (300, 41)])
def test_stays_in_the_error_budget(row_count, cluster_count, dtype, monkeypatch):
    labels = torch.arange(row_count) % (cluster_count + 1) - 1
    checks.check_error_budget("cluster_contrast", dtype, labels, cluster_count, monkeypatch)


def test_gradient_is_that_of_the_value():
    checks.check_gradient("cluster_contrast", LABELS, BANK.double())


def test_is_a_proper_operator_and_compiles():
    checks.check_operator("cluster_contrast", LABELS, BANK)


def test_problems_have_the_losses_they_have_alone():
    checks.check_problems("cluster_contrast", LABELS, BANK)
    features, banks = torch.stack([checks.unit_rows(5, 7, seed) for seed in (3, 4)]), torch.stack([BANK, BANK.flip(0)])
    one_for_all, one_each = (cluster_contrast(features, banks, labels, 0.1) for labels in (LABELS, LABELS.expand(2, 5)))
    assert torch.equal(one_for_all, one_each)


def test_is_the_same_under_autocast():
    checks.check_autocast("cluster_contrast", LABELS, BANK)


def test_refuses_bad_arguments():
    checks.check_refusals("cluster_contrast", LABELS, BANK)


def test_no_labelled_row_is_no_loss_and_no_gradient():
    features = checks.unit_rows(5, 7, seed=1)
    for labels in (torch.full((5,), -1), torch.full((5,), 9)):  # 9: beyond the bank, never read
        value, gradient = checks.value_and_gradient(cluster_contrast, features, BANK, labels, 0.1)
        assert value == 0 and not gradient.any()
    for rows in (features[:0], features):
        value, gradient = checks.value_and_gradient(
            cluster_contrast, rows, BANK[:0], torch.full(rows.shape[:1], -1), 0.1
        )
        assert value == 0 and not gradient.any()


def test_labels_out_of_range_are_reported_in_debug_mode(monkeypatch):
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[-1, 9\), got values from -1 to 12"):
        cluster_contrast(checks.unit_rows(5, 7, seed=1), BANK, LABELS + torch.tensor([0, 0, 0, 4, 0]), 0.1)


@pytest.mark.parametrize(("row_count", "bank_count", "width"), [(1, 1, 1), (65, 96, 300), (130, 700, 49), (3, 5000, 7)])
def test_native_paths_stay_in_the_error_budget(isa, row_count, bank_count, width):
    checks.check_native("cluster_contrast", torch.arange(row_count) * 7 % (bank_count + 1) - 1, bank_count, width)


def test_thread_count_does_not_show():
    row_count, bank_count = 130, 301
    checks.check_thread_counts("cluster_contrast", torch.arange(row_count) * 7 % (bank_count + 1) - 1, bank_count)


def test_extremes_are_neither_lost_nor_spread():
    checks.check_extremes("cluster_contrast", LABELS, BANK)
