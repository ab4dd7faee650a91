"""Links between the label spaces of the two modalities."""

from __future__ import annotations

from torch import Tensor

from engine import ops
from engine.pair import Pair


def associate(features: Pair[Tensor], prototypes: Pair[Tensor], reg: float, tol: float, max_iter: int) -> Pair[Tensor]:
    """Labels of every image among the other modality's prototypes, by entropic optimal transport (SALCR Eq. 4, 5).

    Both directions are solved on their own: `min <Q, P> - reg H(Q)` with squared Euclidean cost P and uniform marginals
    over images and prototypes; the label is the largest entry of the image's row.

    Args:
        features: `[N, D]` per modality.
        prototypes: `[C, D]` per modality.
        reg: weight of the entropy (SALCR writes lambda = 1 / reg).

    Returns:
        `[N]` int64 per modality: `.vis` among infrared prototypes, `.ir` among visible ones.
    """
    return features.map(
        lambda rows, others: ops.ot_assign(rows, others, reg, tol=tol, max_iter=max_iter), prototypes.swap()
    )
