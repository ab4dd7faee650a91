"""Drop-ins for functions that code of this field already has: the same call and the same result, without the loops.

    from engine.compat import ClusterMemory, compute_jaccard_distance, eval_llcm, eval_regdb, eval_sysu, re_ranking

Each docstring names what it replaces and what differs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine import ops
from engine.ops import _check, _csr
from engine.rerank import check_weight, k_reciprocal


class ClusterMemory(nn.Module):
    """`ClusterMemory` of Cluster Contrast (Dai et al., ACCV 2022; `clustercontrast/models/cm.py`) and its descendants.

    `forward(inputs, targets)` is `cross_entropy(normalize(inputs) @ features.T / temp, targets)`. Once a backward pass
    through it has ended, and before `backward()` returns, the buffer `features` has taken in the batch: feature after
    feature in batch order, `features[y] = normalize(momentum * features[y] + (1 - momentum) * f)`; with `use_hard`
    once for every label, with the feature that is least similar to the row. Without a backward nothing is updated.

    What differs:
        - The original updates inside of its backward function. Where several losses of one memory share a backward,
          it takes the gradients of the earlier ones against rows which the later ones have already changed. Here every
          gradient is that of its loss; the updates are the same, in the same order.
        - Inputs stay on their device (the original moves them to the current GPU), and half types are accumulated in
          float32. A target of -1 leaves its row out, and a row of zeros stays one.

    Args:
        num_features: D, the width of a feature.
        num_samples: C, the number of clusters.
        temp: temperature of the softmax.
        momentum: weight of the old row, in [0, 1].
        use_hard: update with the hardest feature of every label only.

    Attributes:
        features: `[C, D]` buffer, zeros at first: assign the L2-normalised cluster centres.
    """

    features: Tensor

    def __init__(
        self, num_features: int, num_samples: int, temp: float = 0.05, momentum: float = 0.2, use_hard: bool = False
    ) -> None:
        super().__init__()
        _check.positive("temp", temp)
        if isinstance(momentum, bool) or not 0 <= momentum <= 1:
            raise _check.fail("momentum", "a number in [0, 1]", momentum)
        self.num_features = num_features
        self.num_samples = num_samples
        self.temp = temp
        self.momentum = momentum
        self.use_hard = use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of `inputs` `[B, D]` float with `targets` `[B]` int64 in [-1, C).

        Raises:
            TypeError, ValueError: an argument is not as described, or `features` requires a gradient.
        """
        bank = self.features
        _check.constant("features", bank)
        _check.tensor("inputs", inputs, "B D")
        _check.size("inputs", inputs, 1, bank.shape[1], "the width of features")
        _check.indices("targets", targets, "B")
        inputs = F.normalize(inputs, dim=1)
        loss = ops.cluster_contrast(inputs, bank, targets, self.temp)
        if loss.requires_grad:
            loss.register_hook(lambda _: _when_backward_ends(lambda: self._update(bank, inputs.detach(), targets)))
        return loss

    def _update(self, bank: Tensor, inputs: Tensor, targets: Tensor) -> None:
        labels = _hardest(bank, inputs, targets) if self.use_hard else targets
        ops.memory_update_(bank, inputs, labels, self.momentum)


def _when_backward_ends(run: Callable[[], None]) -> None:
    """Call `run` at the end of the backward pass that calls this; torch has no public name for it (FSDP uses it too)."""
    torch.autograd.Variable._execution_engine.queue_callback(run)


def _hardest(bank: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Labels that only the feature least similar to its bank row keeps, the first among equals; -1 for the others."""
    rows = bank[labels.clamp(0, len(bank) - 1)]
    order = (features * rows).sum(dim=1).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    ordered = labels[order]
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[1:] = ordered[1:] == ordered[:-1]
    return torch.empty_like(labels).scatter_(0, order, ordered.masked_fill(repeated, -1))


def compute_jaccard_distance(
    target_features: Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 0,
    use_float16: bool = False,
) -> NDArray[np.floating]:
    """`compute_jaccard_distance` of SpCL, Cluster Contrast and their descendants (`utils/faiss_rerank.py`).

    The k-reciprocal Jaccard distance of `engine.ops.jaccard`, dense. Where the distances go to DBSCAN, the sparse
    `ops.dbscan(ops.jaccard(features, k1, k2), eps)` gives the same labels and needs no N x N matrix.

    What differs: FAISS is not needed, nothing is printed, and `print_flag` and `search_option` do nothing: there is one
    exact search, on the device of the features. With `use_float16` the result is rounded to float16 once, at the end.
    Equal distances are ordered by index, and where k1 exceeds N all rows are neighbours.

    Args:
        target_features: `[N, D]` float unit rows.
        k1: neighbours of the reciprocal sets, the row itself included.
        k2: neighbours of the query expansion, likewise; 1 = none.

    Returns:
        `[N, N]` float32, or float16 with `use_float16`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check.tensor("target_features", target_features, "N D")
    distance = ops.jaccard(target_features, k1, k2).cpu()
    values = distance.values().to(torch.float16 if use_float16 else torch.float32)
    dense = values.new_ones(distance.shape)
    dense[_csr.row_indices(distance), distance.col_indices()] = values
    return dense.numpy()


def re_ranking(
    q_g_dist: ArrayLike, q_q_dist: ArrayLike, g_g_dist: ArrayLike, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> NDArray[np.float32]:
    """`re_ranking` on distance matrices, k-reciprocal re-ranking (Zhong et al., CVPR 2017; `re_ranking_ranklist.py`).

    With d_ij = squared distance / the largest one of i, over queries and gallery together:

    - R(i, k): the j among the k + 1 nearest of i, i included, that have i among theirs.
    - R*(i): R(i, k1) and every R(j, round(k1 / 2)), j in R(i, k1), of which more than 2/3 lies in R(i, k1).
    - V_i = softmax of -d_ij over j in R*(i), then the mean of V over the k2 nearest of i (k2 = 1: as it is).
    - J_il = 1 - s / (2 - s), s = sum_j min(V_ij, V_lj); the result is (1 - lambda) J + lambda d.

    What differs: equal distances are ordered by index, columns of zeros give no NaN, and of N = Q + G rows one N x N
    matrix is held, where the original holds several. Distances are squared inside, as in the original; releases that
    take similarities start by `2 - 2 * similarity`: give that for each matrix.

    Args:
        q_g_dist, q_q_dist, g_g_dist: `[Q, G]`, `[Q, Q]`, `[G, G]` finite distances.
        k1, k2: at least 1.
        lambda_value: weight of the given distance, in [0, 1].

    Returns:
        `[Q, G]` float32.

    Raises:
        ValueError: an argument is not as described.
    """
    _check.count("k1", k1, 1)
    _check.count("k2", k2, 1)
    check_weight("lambda_value", lambda_value)
    distance = _joint_distance(np.asarray(q_g_dist), np.asarray(q_q_dist), np.asarray(g_g_dist))
    query_count, gallery_count = np.shape(q_g_dist)
    if query_count == 0 or gallery_count == 0:
        return np.empty((query_count, gallery_count), dtype=np.float32)
    return k_reciprocal(distance, query_count, k1, k2, lambda_value).numpy()


def _joint_distance(q_g: NDArray, q_q: NDArray, g_g: NDArray) -> Tensor:
    """d of queries, then gallery, `[Q + G, Q + G]` float32: column i of the squares over its maximum is row i."""
    if q_g.ndim != 2:
        raise ValueError(f"q_g_dist must be of shape [Q, G], got {list(q_g.shape)}")
    query_count, gallery_count = q_g.shape
    for name, square, count in (("q_q_dist", q_q, query_count), ("g_g_dist", g_g, gallery_count)):
        if square.shape != (count, count):
            expected = f"of shape {[count, count]}, as q_g_dist is {list(q_g.shape)}"
            raise ValueError(f"{name} must be {expected}, got {list(square.shape)}")
    rows = np.empty((query_count + gallery_count,) * 2, dtype=np.float32)
    rows[:query_count, :query_count] = np.square(q_q).T
    rows[:query_count, query_count:] = np.square(q_g)
    rows[query_count:, :query_count] = np.square(q_g).T
    rows[query_count:, query_count:] = np.square(g_g).T
    largest = rows.max(axis=1, initial=0, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("q_g_dist, q_q_dist and g_g_dist must be finite, with squares that float32 can hold")
    rows /= np.where(largest > 0, largest, 1)
    return torch.from_numpy(rows)


def eval_sysu(
    distmat: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> tuple[NDArray[np.float32], float, float]:
    """`eval_sysu` of the cross-modality baselines (`eval_metrics.py` of AGW and its descendants): SYSU-MM01.

    A query of camera 3 never sees gallery camera 2. The CMC counts identities, mAP and mINP count images.

    What differs, in all three `eval_*`: equal distances are ordered by gallery index (the original's order is that of
    an unstable sort). Nothing is printed where the gallery is smaller than `max_rank`; the CMC is shorter then, as in
    the original, and a query that sees fewer identities than others is no error.

    Args:
        distmat: `[Q, G]` distances, smaller is more alike.
        q_pids, q_camids: `[Q]` integers; g_pids, g_camids: `[G]` integers.
        max_rank: length of the CMC; at most the number of identities in the gallery.

    Returns:
        (CMC `[max_rank]` float32, mAP, mINP), in [0, 1], means over the queries that have a match.

    Raises:
        TypeError, ValueError: an argument is not as described, or no query has a match.
    """
    return _scores("sysu", distmat, q_pids, g_pids, q_camids, g_camids, max_rank=max_rank)


def eval_regdb(
    distmat: ArrayLike, q_pids: ArrayLike, g_pids: ArrayLike, max_rank: int = 20
) -> tuple[NDArray[np.float32], float, float]:
    """`eval_regdb` of the same files: RegDB. All images are ranked and counted, by the CMC too.

    Args, Returns, Raises, and what differs: as for `eval_sysu`, without cameras; `max_rank` is at most G.
    """
    return _scores("plain", distmat, q_pids, g_pids, max_rank=max_rank)


def eval_llcm(
    distmat: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 20,
) -> tuple[NDArray[np.float32], float, float]:
    """`eval_llcm` of the LLCM release and its descendants: images of the query's identity and camera are removed.

    Args, Returns, Raises, and what differs: as for `eval_sysu`.
    """
    return _scores("llcm", distmat, q_pids, g_pids, q_camids, g_camids, max_rank=max_rank)


def _scores(
    protocol: str, distmat: ArrayLike, q_pids: ArrayLike, g_pids: ArrayLike, *cams: ArrayLike, max_rank: int
) -> tuple[NDArray[np.float32], float, float]:
    distance = np.asarray(distmat)
    if distance.ndim != 2 or not np.issubdtype(distance.dtype, np.number):
        raise ValueError(f"distmat must be numbers [Q, G], got {distance.dtype} {list(distance.shape)}")
    if not np.issubdtype(distance.dtype, np.floating):
        distance = distance.astype(np.float64)
    names = ("q_pids", "g_pids", "q_camids", "g_camids")
    labels = [
        _labels(name, value, distance.shape[position % 2])
        for position, (name, value) in enumerate(zip(names, (q_pids, g_pids, *cams), strict=False))
    ]
    listed = distance.shape[1] if protocol == "plain" else len(labels[1].unique())
    _check.count("max_rank", max_rank, 1)
    ranking = ops.rank(_tensor(distance), *labels, protocol=protocol, max_rank=max(1, min(max_rank, listed)))
    if ranking.valid_queries == 0:
        raise ValueError("q_pids must hold an identity that its query can see in the gallery, got none")
    return ranking.cmc.float().numpy(), ranking.mAP, ranking.mINP


def _labels(name: str, value: ArrayLike, count: int) -> Tensor:
    array = np.asarray(value)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be {count} integers like distmat, got {array.dtype} {list(array.shape)}")
    return _tensor(array.astype(np.int64))


def _tensor(array: NDArray) -> Tensor:
    """The array as a tensor, copied only where torch cannot read it in place."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
