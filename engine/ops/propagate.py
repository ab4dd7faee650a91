"""Features averaged over a graph."""

from __future__ import annotations

from torch import Tensor

from engine.ops import _check
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, no_autocast


def propagate(csr: Tensor, features: Tensor) -> Tensor:
    """`F'_i = sum_j A_ij F_j` with a sparse graph A: one block of SALCR (Cheng et al., IJCV 2025) Eq. 29.

    Args:
        csr: `[B, N]` `torch.sparse_csr` of a floating dtype.
        features: `[N, D]` float32, float16, bfloat16 or float64.

    Returns:
        `[B, D]` in the dtype of `features`; a row without an entry is zero.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check.csr("csr", csr, "B N")
    _check.tensor("features", features, "N D")
    _check.like("features", features, "csr", csr, dtype=False)
    _check.size("features", features, 0, csr.shape[1], "the columns of csr")
    return pick("propagate", features.device)(csr, features)


def reference(csr: Tensor, features: Tensor) -> Tensor:
    """The sparse matrix product, in float32 at least."""
    dtype = accumulation_dtype(csr, features)
    with no_autocast(features.device):
        return (csr.to(dtype) @ features.to(dtype)).to(features.dtype)
