from __future__ import annotations

import pytest
import torch
from emulated import cuda_backend
from graph_checks import fixture, people, same_bits_for_any_thread_count, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engine import ops
from engine.ops import use_backend
from engine.ops.cmfp import _cpu, _reference, reference

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=[*BACKENDS, "emulator"])
def backend(request):
    with cuda_backend() if request.param == "emulator" else use_backend(request.param):
        yield request.param


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
def test_reproduces_the_released_propagation(name, backend):
    arrays = fixture(name)
    vis, ir, k = arrays["Fv"], arrays["Fr"], int(arrays["k"])
    for result, expected in zip(ops.cmfp(vis, ir, k), (arrays["out_v"], arrays["out_r"]), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    raw = torch.cat(ops.cmfp(vis, ir, k, normalize=False))
    torch.testing.assert_close(raw, arrays["raw"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(40, 30, 5), (7, 1, 3), (6, 4, 100), (33, 65, 0)])
def test_equals_four_dense_blocks(sizes, normalize, backend):
    vis_count, ir_count, k = sizes
    vis, ir = 3 * unit_rows(vis_count, 8, 1, torch.float64), 0.1 * unit_rows(ir_count, 8, 2, torch.float64)
    expected = four_dense_blocks(vis, ir, k, normalize)
    for result, block in zip(ops.cmfp(vis, ir, k, normalize=normalize), expected, strict=True):
        torch.testing.assert_close(result, block, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_some_rows_in_cpp_are_to_the_bit_those_of_all(dtype):
    vis, ir = (3 * unit_rows(count, 21, count).to(dtype) for count in (150, 67))
    options = {"normalize": True, "precision": "ieee"}
    whole = ops.cmfp(vis, ir, 5)
    for rows in ((slice(0, 150), slice(0, 0)), (slice(3, 70), slice(60, 67)), (slice(149, 150), slice(0, 67))):
        for part, expected, run in zip(_cpu(vis, ir, 5, *rows, **options), whole, rows, strict=True):
            assert torch.equal(part, expected[run])
        for part, expected, run in zip(_reference(vis, ir, 5, *rows, **options), whole, rows, strict=True):
            torch.testing.assert_close(part, expected[run], rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_a_missing_modality_leaves_the_own_block(backend):
    vis = unit_rows(9, 4, 3)
    result, nothing = ops.cmfp(vis, vis[:0], 3)
    assert nothing.shape == (0, 4)
    own = four_dense_blocks(vis, vis[:0], 3, normalize=True)[0]
    torch.testing.assert_close(result, own)
    nothing, turned = ops.cmfp(vis[:0], vis, 3)
    assert nothing.shape == (0, 4) and torch.equal(turned, result)
    assert [rows.shape for rows in ops.cmfp(vis[:0], vis[:0], 3)] == [(0, 4), (0, 4)]
    assert [rows.shape for rows in ops.cmfp(vis[:, :0], vis[:2, :0], 3)] == [(9, 0), (2, 0)]


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(vis_count=st.integers(0, 9), ir_count=st.integers(0, 9), k=st.integers(0, 11), seed=st.integers(0, 1000))
def test_of_equal_similarities_the_lower_index_counts(name, vis_count, ir_count, k, seed):
    generator = torch.Generator().manual_seed(seed)
    # Norms are 0 or a power of 2, so that similarities are exact; many tie.
    rows = torch.randint(-1, 2, (vis_count + ir_count, 4), generator=generator).double()
    rows[rows.abs().sum(1) == 2] = 0
    rows[rows.abs().sum(1) == 3] = 8
    vis, ir = rows.split([vis_count, ir_count])
    expected = four_dense_blocks(vis, ir, k, normalize=False)
    with use_backend(name):
        for result, block in zip(ops.cmfp(vis, ir, k, normalize=False), expected, strict=True):
            torch.testing.assert_close(result, block, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("vis_count", "ir_count", "width", "k"), [(1003, 490, 33, 12), (97, 1, 300, 200)])
def test_native_stays_in_the_error_budget(isa, vis_count, ir_count, width, k, dtype, normalize):
    vis, ir = people(vis_count + ir_count, width, 1).to(dtype).split([vis_count, ir_count])
    exact = reference(vis.double(), ir.double(), k, normalize=normalize)
    plain = reference(vis, ir, k, normalize=normalize)
    with use_backend("cpu"):
        ours = ops.cmfp(vis, ir, k, normalize=normalize)
    for result, expected, truth in zip(ours, plain, exact, strict=True):
        assert (result - truth).abs().max() <= 2 * (expected - truth).abs().max() + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_converts_half_types_exactly(isa, dtype):
    vis, ir = unit_rows(501, 270, 1, dtype), unit_rows(90, 270, 2, dtype)
    with use_backend("cpu"):
        expected = ops.cmfp(vis.float(), ir.float(), 9)
        for result, rows in zip(ops.cmfp(vis, ir, 9), expected, strict=True):
            assert torch.equal(result, rows.to(dtype))


def test_native_takes_rows_of_any_length():
    vis, ir = unit_rows(50, 16, 1), unit_rows(40, 16, 2)
    with use_backend("cpu"):
        expected = ops.cmfp(vis, ir, 5)
        assert all(map(torch.equal, ops.cmfp(vis * 2.0**100, ir * 2.0**-20, 5), expected))


def test_a_row_that_is_no_number_is_no_neighbour():
    vis, ir = unit_rows(50, 16, 1), unit_rows(40, 16, 2)
    spoilt, without = vis.clone(), vis.clone()
    spoilt[7, 3], without[7] = torch.nan, 0
    with use_backend("cpu"):
        assert all(map(torch.equal, ops.cmfp(spoilt, ir, 5), ops.cmfp(without, ir, 5)))


def test_reads_any_layout_and_leaves_inputs_alone(backend):
    vis, ir = 3 * unit_rows(50, 16, 1), unit_rows(40, 16, 2)
    copies = vis.clone(), ir.clone()
    expected = ops.cmfp(vis, ir, 5)
    strided = vis.T.contiguous().T, torch.stack([ir, ir], dim=1)[:, 1]
    for result, rows in zip(ops.cmfp(*strided, 5), expected, strict=True):
        torch.testing.assert_close(result, rows)
    assert torch.equal(vis, copies[0]) and torch.equal(ir, copies[1])


def test_rows_without_a_neighbour_are_zero_not_nan(backend):
    vis = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    ir = torch.tensor([[-1.0, 0.0]])
    new_vis, new_ir = ops.cmfp(vis, ir, 2)
    assert new_vis.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert new_ir.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_normalised_in_float32(dtype, backend):
    vis, ir = (60 * unit_rows(50, 32, 4)).to(dtype), (60 * unit_rows(40, 32, 5)).to(dtype)
    exact = ops.cmfp(vis.double(), ir.double(), 5)
    for result, expected in zip(ops.cmfp(vis, ir, 5), exact, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", BACKENDS)
def test_any_thread_count_gives_the_same_bits(name):
    vis, ir = unit_rows(2500, 32, 6), unit_rows(1100, 32, 7)
    with use_backend(name):
        same_bits_for_any_thread_count(lambda: ops.cmfp(vis, ir, 9))


@pytest.mark.parametrize("most", [2048, 20])  # neighbours that the kernel takes, and too few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(70, 33, 40), (64, 32, 7), (1, 65, 3)])
def test_blocks_of_rows_do_not_show_on_the_emulator(sizes, dtype, most, monkeypatch):
    monkeypatch.setitem(reference.__globals__, "GPU_BLOCK_ROWS", 32)
    monkeypatch.setitem(reference.__globals__, "GPU_MOST", most)
    vis_count, ir_count, k = sizes
    vis, ir = people(vis_count + ir_count, 300, 1).to(dtype).split([vis_count, ir_count])
    expected = four_dense_blocks(vis.double(), ir.double(), k, normalize=True)
    results = []
    for descending in (False, True):
        with cuda_backend(descending=descending):
            results.append(ops.cmfp(vis, ir, k))
    assert all(map(torch.equal, *results))
    for result, block in zip(results[0], expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), block, rtol=0, atol=max(4e-6, torch.finfo(dtype).eps / 4))


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
