"""A batch computed in slices, by several processes and by each of them part after part, with the result of the whole.

Each slice has the same part of each kind of image. Their outputs are joined to that of the whole batch, on which every process
computes the same losses; so losses and memories know nothing of slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine import distributed
from engine.config import Config
from engine.distributed import cut
from engine.errors import UserError
from engine.model import norm
from engine.model.network import Output

Inputs = Mapping[str, Tensor | Sequence[Tensor]]
KINDS = ("vis", "aug", "ir")


class Slices:
    """How the batches of a run are cut.

    Args:
        network: whose BatchNorm layers are to take their statistics of groups of `model.bn_group` images.
        config: `train.accumulate` is the number of slices of each process.

    Raises:
        UserError: see `groups`.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        self.norms = norm.layers(network)
        self.bn_group, self.parts = config.model.bn_group, config.train.accumulate
        self.count = distributed.world() * self.parts
        kinds = 3 if config.augment.channels else 2
        self.batches = [[stage.labels * stage.images] * kinds for stage in config.train.stages]
        for sizes in self.batches:  # noticed before anything long begins
            self.groups(sizes)

    def compute(self, forward: Callable[..., Output], inputs: Inputs) -> Output:
        """The output of the whole batch, on every process; its map is empty where there is more than one slice.

        With several parts only outputs are kept of each, and it is computed again when the gradient comes to it.

        Args:
            forward: a network in training mode.
            inputs: what it is called with, for the whole batch; a sequence is cut piece by piece and joined.

        Raises:
            UserError: see `groups`.
        """
        sizes = [len(inputs[kind]) for kind in KINDS if kind in inputs]
        groups = self.groups(sizes)
        own = range(self.count)[distributed.rank() * self.parts :][: self.parts]
        slices = [_slice(inputs, i, self.count) for i in own]

        def one(images: dict[str, Tensor]) -> Output:
            norm.set_groups(self.norms, *groups)  # also for the gradient, before which another batch may have come
            return forward(**images)

        if self.count == 1:
            return one(*slices)
        norm.wait(self.norms)
        outputs = [checkpoint(one, images, use_reentrant=False) if self.parts > 1 else one(images) for images in slices]
        norm.settle(self.norms, self.parts)
        return _whole(outputs, sizes, self.count)

    def groups(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Into how many groups each slice falls, and over how many processes a group is spread.

        Args:
            sizes: images of each kind in a batch.

        Raises:
            UserError: the batch cannot be divided into so many slices, or these not into such groups.
        """
        if min(sizes) < self.count:
            raise UserError(
                f"a batch of {_sum(sizes)} images cannot be computed in {self._slices}: there must be an image of each kind "
                "for each; take fewer, or larger batches (train.stages)"
            )
        if not self.norms:
            return 1, 1
        total = sum(sizes)
        group = self.bn_group if 0 < self.bn_group < total else total
        count = total // group
        if total % group or any(size % count for size in sizes):
            raise UserError(
                f"model.bn_group: a batch of {_sum(sizes)} images cannot be divided into groups of {self.bn_group} with "
                f"equal parts of each kind; {self._remedy(sizes)}"
            )
        if count % self.count == 0:
            return count // self.count, 1
        if self.parts > 1:
            raise UserError(
                f"train.accumulate={self.parts}: BatchNorm takes its statistics of {total // count} images of a batch of "
                f"{total} at once, which are not computed at once; {self._remedy(sizes)}"
            )
        even = not any(size % self.count for size in sizes)
        if self.count % count or (count > 1 and not even):
            fits = f"{total // self.count}, a divisor or a multiple of it, " if even else ""
            raise UserError(
                f"model.bn_group: groups of {self.bn_group} of {_sum(sizes)} images do not fit {self._slices}; choose {fits}0 "
                "for the whole batch, or another number of processes"
            )
        return 1, self.count // count

    def _remedy(self, sizes: Sequence[int]) -> str:
        """Which groups lie within a slice of this batch and of all others of the run."""
        batches = [*self.batches, sizes]

        def fits(group: int) -> bool:
            counts = [sum(batch) // group for batch in batches]
            return all(
                sum(batch) == count * group and not count % self.count and not any(size % count for size in batch)
                for batch, count in zip(batches, counts, strict=True)
            )

        found = [str(group) for group in range(min(map(sum, batches)), 0, -1) if fits(group)]
        if found:
            *more, last = found
            return f"set model.bn_group to {', '.join(more)}{' or ' * bool(more)}{last}, which fit all stages"
        if self.parts == 1:
            return "set model.bn_group to 0 for the whole batch"
        common, world = math.gcd(*(size for batch in batches for size in batch)), distributed.world()
        parts = [str(count) for count in range(1, common + 1) if not common % (count * world)]
        return (
            f"no model.bn_group fits all stages; set train.accumulate to one of {', '.join(parts)}"
            if parts
            else "no model.bn_group fits all stages; choose other batches (train.stages) or another number of processes"
        )

    @property
    def _slices(self) -> str:
        processes = distributed.world()
        each = ", each" if processes > 1 else ","
        parts = f"{each} in {self.parts} parts (train.accumulate)" if self.parts > 1 else ""
        return f"{processes} process{'es' * (processes > 1)}{parts}"


def _slice(inputs: Inputs, number: int, count: int) -> dict[str, Tensor]:
    def own(value: Tensor) -> Tensor:
        return value[cut(len(value), count)[number]]

    return {
        name: own(value) if isinstance(value, Tensor) else torch.cat([own(piece) for piece in value])
        for name, value in inputs.items()
    }


def _whole(outputs: list[Output], sizes: Sequence[int], count: int) -> Output:
    """The output of the whole batch from those of this process's slices."""
    by_kind = [
        [run.stop - run.start for run in runs] for runs in zip(*(cut(size, count) for size in sizes), strict=True)
    ]

    def join(name: str, dim: int) -> Any:
        found = [getattr(output, name) for output in outputs]
        if found[0] is None:
            return None
        # Part features are of all kinds at once; other rows come kind after kind.
        runs = [kinds[:1] for kinds in by_kind] if name == "parts" else by_kind
        per_process = [sum(map(sum, runs[i : i + len(found)])) for i in range(0, count, len(found))]
        rows = distributed.gather(torch.cat(found, dim), per_process, dim)
        pieces = rows.split([length for kinds in runs for length in kinds], dim)
        kinds = len(runs[0])
        return torch.cat([piece for kind in range(kinds) for piece in pieces[kind::kinds]], dim)

    names = [field.name for field in fields(outputs[0]) if field.name != "map"]  # a method's own ones among them
    joined = {name: join(name, {"parts": 3, "classes": 1}.get(name, 0)) for name in names}
    return replace(outputs[0], map=joined["features"].new_empty(0), **joined)


def _sum(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))
