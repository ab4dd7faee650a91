"""Several processes on one run, as torchrun starts them. Each holds the whole plan and does its share of the rows.

A share is a run of consecutive rows. What shares give is gathered on every process, in order; then all go on alike, with
equal memories, labels and weights. One process alone does all rows, and nothing here costs it anything.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import UserError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""
MUCH_PATIENCE = timedelta(days=7)
"""How long it waits for the one of its machine that decodes a data set for the first time."""
T = TypeVar("T")
_sharing = False


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process works with the others that torchrun started, if it did.

    Whoever fails inside ends without a farewell: NCCL takes that of all, and others may be waiting for this one. They
    notice, or torchrun ends them.

    Raises:
        UserError: they cannot be reached, or can no longer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} cannot reach the others ({error}); start "
            "all of them with torchrun, which says to each where they meet"
        ) from error
    if rank():
        warnings.simplefilter("ignore")  # the main process says it
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and "gloo" in str(error)
        code = getattr(error, "code", 2 if lost or isinstance(error, UserError) else 1)
        atexit.register(_end, code, 1.0 * lost)  # torchrun is to notice first who failed first
        if lost:
            reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
            raise UserError(
                f"the other processes are out of reach ({reason}); the one that failed first says why"
            ) from error
        raise
    _groups.cache_clear()
    _patient.cache_clear()
    dist.destroy_process_group()


def _end(code: int, seconds: float) -> None:
    """End this process with all that PyTorch would still wait for."""
    with suppress(OSError):  # nobody may be reading
        sys.stdout.flush()
    time.sleep(seconds)
    os._exit(code)


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Its number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether it is the one that writes files and speaks."""
    return rank() == 0


def from_main(value: T) -> T:
    """The plain `value` that the main process gives."""
    if world() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def one_first() -> Iterator[None]:
    """Inside, one process of each machine is done before its others begin, which find what it has made."""
    if world() == 1:
        yield
        return
    everyone = _patient()
    if local_rank() > 0:
        dist.barrier(everyone)
    yield
    if local_rank() == 0:
        dist.barrier(everyone)


def cut(count: int, parts: int) -> list[slice]:
    """`parts` runs of `count` consecutive rows, the first of them one row longer where they cannot be equal."""
    length, longer = divmod(count, parts)
    starts = [length * i + min(i, longer) for i in range(parts + 1)]
    return [slice(*ends) for ends in pairwise(starts)]


def shares(count: int, block: int = 1) -> list[slice]:
    """The run of rows of each process, of whole blocks of `block` rows, so that what is done by blocks stays as it is."""
    runs = cut(-(-count // block), world())
    return [slice(min(run.start * block, count), min(run.stop * block, count)) for run in runs]


@contextmanager
def sharing(alike: bool = True) -> Iterator[None]:
    """Inside, all processes call the same operators with the same arguments, or do not; those may share out the rows of their
    results.
    """
    global _sharing
    before, _sharing = _sharing, alike
    try:
        yield
    finally:
        _sharing = before


def is_sharing() -> bool:
    """Whether all of several processes are inside of `sharing`."""
    return _sharing and world() > 1


def gather(rows: Tensor, counts: Sequence[int], dim: int = 0) -> Tensor:
    """The rows of all processes, one after the other, on each of them.

    Every process is to make the same of them: the gradient of its own rows is then that of the whole, and the only one that
    comes back.

    Args:
        rows: `counts[rank]` of them along `dim`, alike in all else on all processes.
    """
    if world() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows.movedim(dim, 0), tuple(counts))
    return gathered.movedim(0, dim)


def gather_shares(rows: Tensor, runs: Sequence[slice], dim: int = 0) -> Tensor:
    """`gather` of what processes made of their `shares`."""
    return gather(rows, [run.stop - run.start for run in runs], dim)


def add_gradients(network: nn.Module) -> None:
    """Replace each gradient by the sum of those of all processes, equal to the bit on each.

    All at once, in one order: DistributedDataParallel divides its buckets anew after the first step, so that a resumed run
    would add in another order than one that was never interrupted, and must be told of parameters that a stage leaves out.
    """
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        total = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(total)
        for gradient, part in zip(alike, total.split([gradient.numel() for gradient in alike]), strict=True):
            gradient.copy_(part.view_as(gradient))


def check_terms(terms: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raise a `UserError` for a loss term that reaches a weight by another way than the gathered outputs: every process has all
    of its gradient, which `add_gradients` would count once for each.
    """
    if world() == 1:
        return
    names = {parameter: name for name, parameter in network.named_parameters()}
    for term, value in terms.items():
        nodes, seen = [value.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen or isinstance(node, _Gather._backward_cls):
                continue
            seen.add(node)
            if (weight := getattr(node, "variable", None)) in names:
                raise UserError(
                    f"loss term '{term}' uses the weight '{names[weight]}', which several processes cannot: let the network's "
                    "forward use it, which may return an Output with more fields, or train in one process"
                )
            nodes += [following for following, _ in node.next_functions]


def check_equal(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` where processes hold other bits than the main one, which would spread unseen.

    Args:
        tensors: of the same names and shapes on all processes.
    """
    if world() == 1:
        return
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors.values()]
    found = gather_equal(torch.stack(sums))
    differ = (found != found[0]).any(0).tolist()
    if any(differ):
        names = [name for name, other in zip(tensors, differ, strict=True) if other]
        raise UserError(
            f"the processes no longer hold the same {', '.join(names[:3])}{' ...' * (len(names) > 3)}: are their devices and "
            "versions alike? Set deterministic=true, and go on with --resume"
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().contiguous().view(torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8)


def largest(number: int) -> int:
    """The largest of the processes' numbers, by way of their CPUs: nothing waits for a GPU."""
    if world() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@cache
def _groups(size: int) -> Any:
    return dist.new_subgroups(size, timeout=PATIENCE)[0]


@cache
def _patient() -> Any:
    return dist.new_group(timeout=MUCH_PATIENCE, backend="gloo")


def neighbours(size: int) -> Any:
    """The process group of this process and those beside it, `size` in all; all processes must ask for it at once."""
    return dist.group.WORLD if size == world() else _groups(size)


def gather_equal(rows: Tensor, group: Any = None) -> Tensor:
    """`[processes, ...]` what each one of a process group holds, of one shape, without gradient."""
    if world() == 1:
        return rows.unsqueeze(0)
    rows = rows.contiguous()
    gathered = rows.new_empty(dist.get_world_size(group), *rows.shape)
    dist.all_gather(list(gathered), rows, group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        start = sum(counts[: rank()])
        ctx.own = slice(start, start + len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(gather_equal(padded), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None
