"""One of the processes of runs in float64, in torchrun's environment.

    python distributed_worker.py ROOT OUT CAPTIONS DEED...

Deeds are "run:NAME", "stop:NAME" (the last process is told to in the third step), "resume:FOLDER", "die:NAME" (the last
process, in the first step), and "check:all". Several processes share out the instance memories of the runs "salcr" and "spread".
In float64 nothing but a mistake makes two runs differ by more than 1e-8: neither the order of summation, nor Adam, which
divides even small gradients by their own size, nor a label that hangs on the last bit.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

torch.set_default_dtype(torch.float64)

from small_runs import FIRM, settings
from torch import Tensor
from torch.nn import functional as F

from engine import checkpoint, distributed, evaluate, ops, shards, stopping
from engine.data import transforms
from engine.errors import UserError
from engine.evaluate import score, trial_distance
from engine.shards import Bank
from engine.trainer import Trainer

SHORT = (
    *(f"train.stages.{i}.{setting}" for i in range(2) for setting in ("epochs=1", "iterations=2")),
    "train.warm_up.iterations=1",
)
EIGHT = ("train.stages.0.images=4", "train.stages.1.images=4", "train.warm_up.iterations=0")  # of each kind, 24 in all
RUNS = {
    "salcr": ("train.stages.0.images=3", "train.stages.1.images=3"),  # six of each kind: one or two for each of four
    "spread": (*EIGHT, "model.bn_group=12"),  # with four processes a group is spread over two
    "parts": (*EIGHT, "model.bn_group=6", "train.accumulate=2"),
    "firm": (*FIRM, *EIGHT),
}
STEP = Trainer._step


def main() -> None:
    root, out = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    double = mock.patch.object(Tensor, "float", Tensor.double)
    with distributed.joined(), double, mock.patch.object(transforms, "_to_planes", planes):
        for deed, _, name in (argument.partition(":") for argument in sys.argv[4:]):
            resume = deed == "resume"
            if deed == "check":
                check_shared_rows()
                check_banks()
                check_drift()
                check_patience()
                continue
            base = name.partition("-")[0]
            shard = f"memory.shard={str(distributed.world() > 1 and base in ('salcr', 'spread')).lower()}"
            chosen = (*SHORT, *RUNS[base], sys.argv[3], shard)
            folder = out / (name if resume else f"{name}-{deed}-{distributed.world()}")
            run = Trainer(settings(root, out / "cache", *chosen), folder, resume=resume)
            ends = {"stop": told_in_step(3), "die": mock.patch.object(Trainer, "_step", die)}
            with suppress(stopping.Stopped), stopping.graceful(), ends.get(deed, nullcontext()):
                run.run()
            if deed == "stop":  # whoever leaves first, the main process has saved
                assert checkpoint.load(folder / "last.pt")["step"] == run.state.step == 1
            state = run.network.state_dict() | shards.equal(run.state.memories)
            torch.save(state, folder / f"process{distributed.rank()}.pt")


def check_shared_rows() -> None:
    """What processes make of their rows is what one makes of all: clusters' distances, CMFP, scores."""
    generator = torch.Generator().manual_seed(1)
    vis, ir = (F.normalize(torch.randn(count, 16, generator=generator)) for count in (31, 9))
    expected = ops.jaccard(vis, 8, 3), *ops.cmfp(vis, ir, 4)
    watched = mock.patch.object(distributed, "gather_shares", wraps=distributed.gather_shares)
    with distributed.sharing(), watched as gathered:
        found = ops.jaccard(vis, 8, 3), *ops.cmfp(vis, ir, 4)
    assert gathered.call_count == 4  # values and numbers of neighbours; visible and infrared features
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())
    ids, cams = (torch.arange(31) % 5, torch.arange(9) % 4), (torch.zeros(31).long(), torch.ones(9).long())
    expected_values, expected_count = score(trial_distance(vis, ir, None), ids, cams, "plain")
    with mock.patch.object(evaluate, "BLOCK_ENTRIES", 4 * len(ir)), watched as gathered:  # four queries a block
        values, count = evaluate.score_features(vis, ir, ids, cams, "plain")
    assert gathered.call_count == 1
    assert count == expected_count and values.keys() == expected_values.keys()
    assert all(abs(values[name] - expected_values[name]) < 1e-9 for name in values)


def check_banks() -> None:
    """Neighbours, losses and gradients with a bank that is shared out are those with the whole."""
    generator = torch.Generator().manual_seed(1)
    for rows, shape in itertools.product((37, 3), ((), (2,))):  # of three rows, one of four processes has none
        bank, features = (
            F.normalize(torch.randn(*shape, count, 16, generator=generator), dim=-1) for count in (rows, 23)
        )
        bank[..., -1, :] = bank[..., 0, :]  # which are equally near
        own = shards.share({"bank": bank}, ["bank"])
        shared = Bank.of(own, "bank")
        for found, expected in zip(shared.topk(features, 10), ops.topk(features, bank, 10), strict=True):
            assert torch.equal(found, expected)
        positives = torch.randint(-1, rows, (*shape, 23, 5), generator=generator)
        positives[..., ::4, :] = -1
        one, other = features.clone().requires_grad_(), features.clone().requires_grad_()
        expected = ops.neighbor_contrast(one, bank, positives, 0.05)
        loss = shared.neighbor_contrast(other, positives, 0.05)
        (expected * torch.arange(1, 1 + expected.numel())).sum().backward()
        (loss * torch.arange(1, 1 + loss.numel())).sum().backward()
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(other.grad, one.grad, atol=1e-12, rtol=0)
        if distributed.is_main():
            assert torch.equal(shards.whole(own)["bank"], bank)
        else:
            assert shards.whole(own) == {}


def check_drift() -> None:
    """Every process says which tensor is no longer the same on all, be it by one bit."""
    alike, drifted = torch.ones(3), torch.ones(3)
    distributed.check_equal({"alike": alike, "drifted": drifted})
    drifted[distributed.world() - distributed.rank() - 1 :] += 2**-52
    try:
        distributed.check_equal({"alike": alike, "drifted": drifted})
    except UserError as error:
        assert "no longer hold the same drifted: are" in str(error)
    else:
        raise AssertionError


def check_patience() -> None:
    """Whoever waits for images to be decoded does so for longer than for anything else."""
    set_timeout = dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    with distributed.one_first():
        time.sleep(1.5 * (distributed.local_rank() == 0))
    set_timeout(distributed.PATIENCE, dist.group.WORLD)


def planes(images: Tensor) -> Tensor:
    """`transforms._to_planes` in float64."""
    return images.permute(0, 3, 1, 2).to(torch.float64, memory_format=torch.contiguous_format).div_(255)


@contextmanager
def told_in_step(number: int) -> Iterator[None]:
    """Inside, the last process gets a signal in the step of this number, and the main one takes its time to save it."""
    steps, save = itertools.count(1), checkpoint.save
    told = False

    def step(self: Trainer, *arguments: Any) -> dict[str, Tensor]:
        nonlocal told
        told = next(steps) == number
        if told and distributed.rank() == distributed.world() - 1:
            signal.raise_signal(signal.SIGTERM)
        return STEP(self, *arguments)

    def slow(*arguments: Any, **named: Any) -> None:
        time.sleep(1.0 * told)
        save(*arguments, **named)

    with mock.patch.object(Trainer, "_step", step), mock.patch.object(checkpoint, "save", slow):
        yield


def die(self: Trainer, *arguments: Any) -> dict[str, Tensor]:
    if distributed.rank() == distributed.world() - 1:
        os._exit(7)
    return STEP(self, *arguments)


if __name__ == "__main__":
    main()
