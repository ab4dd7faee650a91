"""Cross-modality feature propagation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine import distributed
from engine.ops import _check, _cuda, _native
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision, products
from engine.ops.affinity import affinity
from engine.ops.propagate import propagate
from engine.ops.topk import GPU_BLOCK_ROWS, GPU_MOST, found, offer


@torch.no_grad()
def cmfp(vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """Every feature becomes the mean of its neighbours in both modalities.

        [F^v'; F^r'] = [[A(v, v), A(v, r)], [A(r, v), A(r, r)]] [F^v; F^r]

    SALCR (Cheng et al., IJCV 2025) Eq. 28, 29: each block A is the `affinity` of the k nearest, normalised on its own;
    a row is its own neighbour in its own block. A row without a positive neighbour in a block gets zero from it.

    Args:
        vis: `[Nv, D]` float32, float16, bfloat16 or float64; rows need not be unit, they are normalised first. No
            gradient is computed.
        ir: `[Nr, D]`, likewise.
        k: neighbours per block.
        normalize: whether the results are L2-normalised.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        (vis', ir') of the shapes and dtypes given; a zero row has no neighbour and stays zero.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> vis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> ir = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.6, 0.8]])
        >>> (vis @ ir.T).diagonal()  # similarity of each person's two images
        tensor([0.6000, 0.6000])
        >>> vis, ir = ops.cmfp(vis, ir, k=1)
        >>> (vis @ ir.T).diagonal()
        tensor([1.0000, 1.0000])
    """
    _check.tensor("vis", vis, "Nv D")
    _check.tensor("ir", ir, "Nr D")
    _check.like("ir", ir, "vis", vis)
    _check.size("ir", ir, 1, vis.shape[1], "the width of vis")
    _check.no_nan("vis", vis)
    _check.no_nan("ir", ir)
    k = _check.count("k", k)
    check_precision(precision)
    compute = pick("cmfp", vis, ir)
    if not distributed.is_sharing():
        return compute(vis, ir, k, normalize=normalize, precision=precision)
    vis_runs, ir_runs = (distributed.shares(len(part)) for part in (vis, ir))
    own = vis_runs[distributed.rank()], ir_runs[distributed.rank()]
    some = _cpu if compute is cpu else _reference
    with distributed.sharing(False):
        new_vis, new_ir = some(vis, ir, k, *own, normalize=normalize, precision=precision)
    return distributed.gather_shares(new_vis, vis_runs), distributed.gather_shares(new_ir, ir_runs)


def reference(
    vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """The four blocks one after the other, none of them dense."""
    return _reference(vis, ir, k, slice(None), slice(None), normalize=normalize, precision=precision)


def _reference(
    vis: Tensor, ir: Tensor, k: int, vis_rows: slice, ir_rows: slice, *, normalize: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Some rows of each modality."""
    dtype = accumulation_dtype(vis, ir)
    unit_vis, unit_ir = functional.normalize(vis.to(dtype), dim=1), functional.normalize(ir.to(dtype), dim=1)

    def spread(rows: Tensor) -> Tensor:
        to_vis, to_ir = (affinity(rows, bank, k, precision=precision) for bank in (unit_vis, unit_ir))
        sums = propagate(to_vis, unit_vis) + propagate(to_ir, unit_ir)
        return functional.normalize(sums, dim=1) if normalize else sums

    return spread(unit_vis[vis_rows]).to(vis.dtype), spread(unit_ir[ir_rows]).to(ir.dtype)


def cpu(vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """csrc/cmfp.cpp: every similarity is computed once and serves both of its rows; no normalised copy is made."""
    rows = slice(0, len(vis)), slice(0, len(ir))
    return _cpu(vis, ir, k, *rows, normalize=normalize, precision=precision)


def _cpu(
    vis: Tensor, ir: Tensor, k: int, vis_rows: slice, ir_rows: slice, *, normalize: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Some rows of each modality, to the bit those of all, though every similarity then serves one row."""
    dtype = accumulation_dtype(vis, ir)
    vis, ir = vis.contiguous(), ir.contiguous()
    counts = [rows.stop - rows.start for rows in (vis_rows, ir_rows)]
    new_vis, new_ir = (vis.new_zeros(count, vis.shape[1], dtype=dtype) for count in counts)
    _native.function("cmfp", dtype)(
        *_native.rows(vis),
        *_native.rows(ir),
        vis.shape[0],
        ir.shape[0],
        vis_rows.start,
        counts[0],
        ir_rows.start,
        counts[1],
        vis.shape[1],
        k,
        normalize,
        new_vis.data_ptr(),
        new_ir.data_ptr(),
        torch.get_num_threads(),
    )
    return new_vis.to(vis.dtype), new_ir.to(ir.dtype)


def cuda(vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """Both modalities as one list of rows: products of blocks of them by torch, each block serving both of its sides,
    csrc/topk.cu keeps a row's best in each modality, csrc/cmfp.cu adds them up. Nothing waits for the device.
    """
    counts = len(vis), len(ir)
    k = min(k, max(counts))
    if k > GPU_MOST:
        return reference(vis, ir, k, normalize=normalize, precision=precision)
    rows = torch.cat([functional.normalize(part.float(), dim=1) for part in (vis, ir)])
    nearest = torch.zeros(2, len(rows), k, dtype=torch.int64, device=rows.device)
    sides, lists = rows.split(counts), [among.split(counts) for among in nearest]
    blocks = [
        (side, first, sides[side][first:][:GPU_BLOCK_ROWS])
        for side in (0, 1)
        for first in range(0, counts[side] if k else 0, GPU_BLOCK_ROWS)
    ]

    def show(block: Tensor, side: int, first: int, bank: int, first_row: int) -> None:
        offer(block, first, first_row, lists[bank][side], min(k, counts[bank]))

    for place, (side, first, part) in enumerate(blocks):
        for other_side, other_first, other in blocks[place:]:
            with products(rows.device, precision):
                block = part @ other.T
            show(block, side, first, other_side, other_first)
            if other is not part:
                show(block.T.contiguous(), other_side, other_first, side, first)
    values, neighbors = found(nearest)
    neighbors[1] += counts[0]
    weights = torch.where(values > 0, values, 0)
    weights /= weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    sums = torch.empty_like(rows)
    grid = len(rows), -(-rows.shape[1] // 256)
    _cuda.launch("cmfp", "cmfp_collect_kernel", grid, 256, (rows, neighbors, weights, 2, k, rows.shape[1], sums))
    if normalize:
        sums = functional.normalize(sums, dim=1)
    new_vis, new_ir = sums.split(counts)
    return new_vis.to(vis.dtype), new_ir.to(ir.dtype)
