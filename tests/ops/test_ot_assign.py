from __future__ import annotations

import pytest
import torch
from graph_checks import fixture, people, same_bits_for_any_thread_count, unit_rows

from engine import ops
from engine.ops.ot_assign import reference


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def squared_distance(features, prototypes):
    return (features[:, None] - prototypes[None]).square().sum(2)


def test_reproduces_the_released_labels():
    arrays = fixture("b1_sinkhorn_lambda5")
    labels = ops.ot_assign(arrays["feat_r"], arrays["center_v"], 1 / int(arrays["lambda_sk"]))
    assert torch.equal(labels, arrays["labels"])
    assert not torch.equal(labels, arrays["labels_nearest"])


@pytest.mark.parametrize("options", [{}, {"relax": 0.2}, {"tol": 1e-9, "max_iter": 2000}, {"max_iter": 1}])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_labels_are_those_of_the_plan(options, scale):
    features, prototypes = scale * people(70, 12, 1).double(), scale * unit_rows(9, 12, 2, torch.float64)
    weights = {"a": torch.linspace(1, 2, 70) / 105, "b": torch.linspace(1, 3, 9) / 18}
    labels = ops.ot_assign(features, prototypes, 0.2, **weights, **options)
    plan = ops.sinkhorn(squared_distance(features, prototypes), 0.2, **weights, **options)
    assert torch.equal(labels, plan.labels())


def test_a_cost_that_is_not_kept_gives_the_same_labels(monkeypatch):
    features, prototypes = people(333, 16, 3), unit_rows(21, 16, 4)
    expected = ops.ot_assign(features, prototypes, 0.05)
    made = []

    def scale(cost, reg, original=reference.__globals__["scale"]):
        made.append(cost.shape)
        return original(cost, reg)

    monkeypatch.setitem(reference.__globals__, "COST_BYTES", 16 * 12 * 21 * 4)  # blocks of 12 rows of 21 float32
    monkeypatch.setitem(reference.__globals__, "scale", scale)
    assert torch.equal(ops.ot_assign(features, prototypes, 0.05), expected)
    assert max(rows for rows, _ in made) == 12


def test_nothing_to_assign_or_to_assign_to():
    rows, nothing = torch.ones(3, 4), torch.ones(0, 4)
    assert ops.ot_assign(nothing, rows, 0.2).shape == (0,)
    assert ops.ot_assign(rows, nothing, 0.2).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("relax", [None, 0.3])
def test_nan_gives_the_labels_of_the_reference(relax):
    for spoilt in range(2):
        features, prototypes = people(40, 8, 1), unit_rows(5, 8, 2)
        (features, prototypes)[spoilt][3, 2] = torch.nan
        expected = reference(features, prototypes, 0.2, relax=relax)
        assert torch.equal(ops.ot_assign(features, prototypes, 0.2, relax=relax), expected)


def test_equal_prototypes_go_to_the_lower_index():
    prototypes = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert ops.ot_assign(torch.tensor([[1.0, 0.0]]), prototypes, 0.1, relax=1e-6).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_solved_in_float32(dtype):
    features, prototypes = people(80, 16, 5).to(dtype), unit_rows(7, 16, 6, dtype)
    expected = ops.ot_assign(features.double(), prototypes.double(), 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.ot_assign(features, prototypes, 0.2), expected)


def test_reads_any_layout_and_any_thread_count():
    features, prototypes = people(600, 32, 7), unit_rows(40, 32, 8)
    expected = ops.ot_assign(features, prototypes, 0.1)
    assert torch.equal(ops.ot_assign(features.T.contiguous().T, prototypes.T.contiguous().T, 0.1), expected)
    same_bits_for_any_thread_count(lambda: [ops.ot_assign(features, prototypes, 0.1)])


def test_wrong_arguments_are_named():
    rows = torch.ones(3, 4)
    with pytest.raises(TypeError, match="features must be a tensor"):
        ops.ot_assign([1.0], rows, 0.2)
    with pytest.raises(ValueError, match=r"prototypes must be of size 4 in dimension 1 \(the width of features\)"):
        ops.ot_assign(rows, rows[:, :2], 0.2)
    with pytest.raises(ValueError, match="reg must be a finite number above 0"):
        ops.ot_assign(rows, rows, -0.2)
    with pytest.raises(ValueError, match=r"b must be a float tensor of shape \[3\]"):
        ops.ot_assign(rows, rows, 0.2, b=torch.ones(3, 1))
