"""Cross-modality feature propagation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.ops import _check, _native
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision
from engine.ops.affinity import affinity
from engine.ops.propagate import propagate


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
    """
    _check.tensor("vis", vis, "Nv D")
    _check.tensor("ir", ir, "Nr D")
    _check.like("ir", ir, "vis", vis)
    _check.size("ir", ir, 1, vis.shape[1], "the width of vis")
    _check.no_nan("vis", vis)
    _check.no_nan("ir", ir)
    _check.count("k", k)
    check_precision(precision)
    return pick("cmfp", vis, ir)(vis, ir, k, normalize=normalize, precision=precision)


def reference(
    vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """The four blocks one after the other, none of them dense."""
    dtype = accumulation_dtype(vis, ir)
    unit_vis, unit_ir = functional.normalize(vis.to(dtype), dim=1), functional.normalize(ir.to(dtype), dim=1)

    def spread(rows: Tensor) -> Tensor:
        to_vis, to_ir = (affinity(rows, bank, k, precision=precision) for bank in (unit_vis, unit_ir))
        sums = propagate(to_vis, unit_vis) + propagate(to_ir, unit_ir)
        return functional.normalize(sums, dim=1) if normalize else sums

    return spread(unit_vis).to(vis.dtype), spread(unit_ir).to(ir.dtype)


def cpu(vis: Tensor, ir: Tensor, k: int, *, normalize: bool = True, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """csrc/cmfp.cpp: every similarity is computed once and serves both of its rows; no normalised copy is made."""
    dtype = accumulation_dtype(vis, ir)
    vis, ir = vis.contiguous(), ir.contiguous()
    new_vis, new_ir = vis.new_zeros(vis.shape, dtype=dtype), ir.new_zeros(ir.shape, dtype=dtype)
    _native.function("cmfp", dtype)(
        *_native.rows(vis),
        *_native.rows(ir),
        vis.shape[0],
        ir.shape[0],
        vis.shape[1],
        k,
        normalize,
        new_vis.data_ptr(),
        new_ir.data_ptr(),
        torch.get_num_threads(),
    )
    return new_vis.to(vis.dtype), new_ir.to(ir.dtype)
