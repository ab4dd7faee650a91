"""One of the processes of runs in float64, in torchrun's environment.

    python distributed_worker.py ROOT OUT CAPTIONS DEED...

Deeds are "run:NAME", "stop:NAME" (after three steps), "resume:FOLDER" and "die:NAME" (the last process, in the first step).
In float64 nothing but a mistake makes two runs differ by more than 1e-8: neither the order of summation, nor Adam, which
divides even small gradients by their own size, nor a label that hangs on the last bit.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

torch.set_default_dtype(torch.float64)

from small_runs import FIRM, interrupted_after, settings
from torch import Tensor

from engine import distributed
from engine.data import transforms
from engine.trainer import Trainer

SHORT = (
    *(f"train.stages.{i}.{setting}" for i in range(2) for setting in ("epochs=1", "iterations=2")),
    *("train.warm_up.iterations=1", "train.checkpoint_steps=1"),
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
            chosen = (*SHORT, *RUNS[name.partition("-")[0]], sys.argv[3])
            folder = out / (name if resume else f"{name}-{deed}-{distributed.world()}")
            run = Trainer(settings(root, out / "cache", *chosen), folder, resume=resume)
            ends = {"stop": interrupted_after(3), "die": mock.patch.object(Trainer, "_step", die)}
            with suppress(KeyboardInterrupt), ends.get(deed, nullcontext()):
                run.run()
            torch.save(run.network.state_dict() | run.state.memories, folder / f"process{distributed.rank()}.pt")


def planes(images: Tensor) -> Tensor:
    """`transforms._to_planes` in float64."""
    return images.permute(0, 3, 1, 2).to(torch.float64, memory_format=torch.contiguous_format).div_(255)


def die(self: Trainer, *arguments: Any) -> dict[str, Tensor]:
    if distributed.rank() == distributed.world() - 1:
        os._exit(7)
    return STEP(self, *arguments)


if __name__ == "__main__":
    main()
