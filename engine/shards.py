"""Memories whose rows the processes share out among themselves, and what is computed against them as against the whole.

A process holds a run of such a memory's rows, and, under the memory's name and ".first", the number of the first of them. All
processes ask about the same features at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine import distributed, ops

Memories = dict[str, Tensor]
_FIRST = ".first"


def own_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[N]` rows those that this process is to hold, and the number of the first of them."""
    run = distributed.shares(len(rows))[distributed.rank()]
    return rows[run], torch.tensor(run.start)


def share(memories: Memories, names: Iterable[str]) -> Memories:
    """The memories; of those of `names`, `[..., N, D]`, the rows that this process is to hold."""
    found = dict(memories)
    for name in names:
        if name in memories:
            rows, found[name + _FIRST] = own_rows(torch.arange(memories[name].shape[-2]))
            found[name] = memories[name].index_select(-2, rows)
    return found


def equal(memories: Memories) -> Memories:
    """Those that are alike on all processes."""
    return {
        name: bank for name, bank in memories.items() if not name.endswith(_FIRST) and name + _FIRST not in memories
    }


def whole(memories: Memories) -> Memories:
    """What `share` was given; shared memories on the CPU of the main process alone."""
    found = equal(memories)
    for name in [name.removesuffix(_FIRST) for name in memories if name.endswith(_FIRST)]:
        rows = memories[name].movedim(-2, 0).cpu()
        counts = distributed.gather_equal(torch.tensor(len(rows))).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts] if distributed.is_main() else None
        if distributed.world() > 1:
            dist.gather(padded, parts)
        else:
            parts = [padded]
        if parts is not None:
            joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
            found[name] = joined.movedim(0, -2).contiguous()
    return found


@dataclass(frozen=True)
class Bank:
    """A memory, or the part of it that this process holds.

    Attributes:
        rows: `[..., N, D]`, or `[..., n, D]`.
        first: the number of the first of them; None = all are here.
    """

    rows: Tensor
    first: Tensor | None

    @staticmethod
    def of(memories: Memories, name: str) -> Bank:
        """The bank of that name."""
        return Bank(memories[name], memories.get(name + _FIRST))

    def __getitem__(self, problems: Any) -> Bank:
        """The bank of some problems, the leading dimension."""
        return Bank(self.rows[problems], self.first)

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`ops.topk` of the whole bank, the same to the bit where each product is."""
        values, indices = ops.topk(queries, self.rows, k)
        if self.first is None:
            return values, indices
        indices = torch.where(indices < 0, -1, indices + self.first)
        # Equal ones are in order in each process and from one to the next, and a stable sort leaves them so.
        values, indices = (distributed.gather_equal(part).movedim(0, -2).flatten(-2) for part in (values, indices))
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values[..., :k], indices.gather(-1, order[..., :k])

    def neighbor_contrast(self, features: Tensor, positives: Tensor, temperature: float) -> Tensor:
        """`ops.neighbor_contrast` with the whole bank.

        Of its own rows a process has `a = log sum_j e^{s_j}` over all and `p` over the positives. Those of the whole bank are
        `log sum_r e^{a_r}` and `log sum_r e^{p_r}` over processes, and the gradients of features add up.
        """
        if self.first is None:
            return ops.neighbor_contrast(features, self.rows, positives, temperature)
        count = self.rows.shape[-2]
        own = positives - self.first
        own = torch.where((positives >= 0) & (own >= 0) & (own < count), own, -1)
        features = _Everywhere.apply(features)
        if count:
            # The operators give a - s_0 and a - p.
            to_first = torch.zeros(features.shape[:-1], dtype=torch.int64, device=features.device)
            a = ops.cluster_contrast(features, self.rows, to_first, temperature, reduction="none")
            a = a + (features * self.rows[..., :1, :]).sum(-1) / temperature
            p = a - ops.neighbor_contrast(features, self.rows, own, temperature, reduction="none")
        else:
            a = p = features.sum(-1)
        known = (own >= 0).any(-1)
        found = torch.where(torch.stack([torch.full_like(known, count > 0), known]), torch.stack([a, p]), -torch.inf)
        every, positive = _LogSumExp.apply(found)
        kept = (positives >= 0).any(-1)
        return torch.where(kept, every - positive, 0).sum(-1) / kept.sum(-1).clamp(min=1)


class _Everywhere(torch.autograd.Function):
    """Features that are the same on all processes, of which each has a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        if distributed.world() > 1:
            dist.all_reduce(total)
        return total


class _LogSumExp(torch.autograd.Function):
    """Over the processes, of which -inf have nothing to add; 0 where none has."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = distributed.gather_equal(own).logsumexp(0)
        total = torch.where(total.isinf(), 0, total)
        ctx.save_for_backward(own, total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own, total = ctx.saved_tensors
        return gradient * (own - total).exp()
