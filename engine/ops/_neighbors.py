"""The order of neighbours, in plain torch."""

from __future__ import annotations

from torch import Tensor


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, ordered by (value descending, index ascending); NaN is largest."""
    values, indices = similarity.topk(k, dim=1)
    # torch.topk takes any of the entries that tie at the k-th place: such rows are sorted whole.
    tied = ((similarity < values[:, -1:]).sum(dim=1) < similarity.shape[1] - k).nonzero().squeeze(1)
    if tied.numel():
        ordered, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = ordered[:, :k], order[:, :k]
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)
