from __future__ import annotations

import pytest
import torch
from graph_checks import fixture, same_bits_for_any_thread_count, unit_rows
from torch.nn import functional

from engine import ops


def four_dense_blocks(vis, ir, k, normalize):
    """SALCR Eq. 28, 29 with whole matrices, a stable sort and a mask."""

    def block(rows, bank):
        similarity = rows @ bank.T
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
        weights = torch.zeros_like(similarity).scatter(1, order, similarity.gather(1, order).clamp(min=0))
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    vis, ir = functional.normalize(vis), functional.normalize(ir)
    results = [block(rows, vis) @ vis + block(rows, ir) @ ir for rows in (vis, ir)]
    return [functional.normalize(rows) if normalize else rows for rows in results]


@pytest.mark.parametrize("name", ["a1_cmfp_train_clustered", "a2_cmfp_train_negatives_k40"])
def test_reproduces_the_released_propagation(name):
    arrays = fixture(name)
    vis, ir, k = arrays["Fv"], arrays["Fr"], int(arrays["k"])
    for result, expected in zip(ops.cmfp(vis, ir, k), (arrays["out_v"], arrays["out_r"]), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    raw = torch.cat(ops.cmfp(vis, ir, k, normalize=False))
    torch.testing.assert_close(raw, arrays["raw"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(40, 30, 5), (7, 1, 3), (6, 4, 100), (33, 65, 0)])
def test_equals_four_dense_blocks(sizes, normalize):
    vis_count, ir_count, k = sizes
    vis, ir = 3 * unit_rows(vis_count, 8, 1, torch.float64), 0.1 * unit_rows(ir_count, 8, 2, torch.float64)
    expected = four_dense_blocks(vis, ir, k, normalize)
    for result, block in zip(ops.cmfp(vis, ir, k, normalize=normalize), expected, strict=True):
        torch.testing.assert_close(result, block, rtol=1e-12, atol=1e-13)


def test_a_missing_modality_leaves_the_own_block():
    vis = unit_rows(9, 4, 3)
    result, nothing = ops.cmfp(vis, vis[:0], 3)
    assert nothing.shape == (0, 4)
    own = ops.propagate(ops.affinity(vis, vis, 3), vis)
    torch.testing.assert_close(result, functional.normalize(own))


def test_rows_without_a_neighbour_are_zero_not_nan():
    vis = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    ir = torch.tensor([[-1.0, 0.0]])
    new_vis, new_ir = ops.cmfp(vis, ir, 2)
    assert new_vis.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert new_ir.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_normalised_in_float32(dtype):
    vis, ir = (60 * unit_rows(50, 32, 4)).to(dtype), (60 * unit_rows(40, 32, 5)).to(dtype)
    exact = ops.cmfp(vis.double(), ir.double(), 5)
    for result, expected in zip(ops.cmfp(vis, ir, 5), exact, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_any_thread_count_gives_the_same_bits():
    vis, ir = unit_rows(300, 32, 6), unit_rows(200, 32, 7)
    same_bits_for_any_thread_count(lambda: ops.cmfp(vis, ir, 9))


def test_wrong_arguments_are_named():
    rows = torch.ones(3, 4)
    with pytest.raises(TypeError, match="vis must be a tensor"):
        ops.cmfp(None, rows, 2)
    with pytest.raises(ValueError, match="ir must be float32 like vis"):
        ops.cmfp(rows, rows.double(), 2)
    with pytest.raises(ValueError, match=r"ir must be of size 4 in dimension 1 \(the width of vis\)"):
        ops.cmfp(rows, rows[:, :2], 2)
    with pytest.raises(ValueError, match="k must be"):
        ops.cmfp(rows, rows, 1.5)
