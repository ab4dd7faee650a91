"""Where the time of a training step goes, and what the part branch of the network adds.

    python tools/profile_step.py --cfg sysu.yaml [--set A.B=C] [--images 22258 11909] [--clusters 450 400] [--steps N]
        [--threads N] [--clock cpu] [--json FILE]

Runs steps of the configuration's last stage as the trainer does: network, losses, backward, optimiser, update of the
memories. It needs no data set and no weights: images are drawn, people of one pattern each, and memories of the sizes asked
for are built around the features that the untrained network gives them, so that rows have the neighbours that real ones have.

Every moment of a step belongs to one row of the table; a row that stands under another is part of it. Medians over the steps,
after one that is not counted. On a GPU events on the stream take the time; on the CPU the clock does, or `--clock cpu` the
time that the process had a core, which other processes disturb less and which adds up over threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when OpenMP is loaded: threads that wait leave the core

import torch
from gpu_check import step_table, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine import checkpoint, config, info, ops, report, seeds, trainer
from engine.cluster import Labels
from engine.config import Config
from engine.data.loader import Batch
from engine.errors import UserError, run_tool
from engine.features import Features
from engine.pair import Pair
from engine.trainer import Trainer

MODULES = {"backbone": "backbone", "pool": "pooling", "neck": "neck", "parts": "part head"}
"""Rows of the table that are modules of the network."""
TERMS = {
    "_dagl": "DAGL",
    "_fgsal": "FGSAL",
    "_gpcr": "GPCR",
    "_global_refinement": "global",
    "_part_refinement": "parts",
    "update": "memory update",
}
"""Those that are functions of the method."""
BACKBONE, REST = ("backbone",), ("between them",)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SPREAD = 0.5
"""Length of what sets an image's feature apart from the mean of its person, which has length 1."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A part of the step, with all that stands under it.

    Attributes:
        path: its name, after those of what it is part of.
        forward, backward: milliseconds, medians over the steps.
        share: of the step.
        rest: its share of what is not the backbone; None for the backbone and for the step.
    """

    path: Names
    forward: float
    backward: float
    share: float
    rest: float | None


@dataclass(frozen=True)
class Cost:
    """What one forward pass takes of the network.

    Attributes:
        parameters: numbers that the network holds, those that do not learn (biases of BatchNorm necks) too.
        macs: multiply-accumulates of convolutions and matrix products; sums, norms and activations are not counted.
    """

    what: str
    parameters: int
    macs: int


class Clock:
    """Gives every moment to the part of the step that runs.

    Args:
        tell: seconds, where there is no GPU.

    Attributes:
        path, direction: what runs, "forward" or "backward".
    """

    def __init__(self, device: torch.device, tell: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.tell = device, tell
        self.marks: list[tuple[tuple[Names, str], Any]] = []
        self.switch((), "forward")

    def switch(self, path: Names, direction: str) -> None:
        """From now on it is this part."""
        self.path, self.direction = path, direction
        if self.device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.tell()
        self.marks.append(((path, direction), moment))

    def read(self) -> dict[tuple[Names, str], float]:
        """Milliseconds by place since the last reading, of each path with all that is under it."""
        self.switch((), "forward")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent: dict[tuple[Names, str], float] = {}
        for ((path, direction), begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds = 1e-3 * begin.elapsed_time(end) if self.device.type == "cuda" else end - begin
            for length in range(len(path) + 1):
                place = path[:length], direction
                spent[place] = spent.get(place, 0.0) + 1e3 * seconds
        self.marks = self.marks[-1:]
        return spent

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose moments and those of its backward are given to `name`, under what it is called from.

        The backward of a step goes through its operations in the reverse order of the forward. So it enters this part
        when it has the gradient of a result, and leaves it when it has that of an argument.
        """

        def watched(*arguments: Any, **options: Any) -> Any:
            outer = self.path if self.direction == "forward" else ()  # a backward ends where something else begins
            path = (*outer, name)
            arguments, options = _marked((arguments, options), lambda: self.switch(outer, "backward"))
            self.switch(path, "forward")
            result = _marked(call(*arguments, **options), lambda: self.switch(path, "backward"))
            self.switch(outer, "forward")
            return result

        return watched


class _Mark(torch.autograd.Function):
    """The identity, which tells when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, passes: Callable[[], None]) -> Tensor:
        ctx.passes = passes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.passes()
        return gradient, None


def _marked(value: Any, passes: Callable[[], None]) -> Any:
    """`value` with a mark on every tensor in it that has a gradient."""
    if isinstance(value, Tensor):
        return _Mark.apply(value, passes) if value.requires_grad else value
    if isinstance(value, (list, tuple)):
        return type(value)(_marked(item, passes) for item in value)
    if isinstance(value, dict):
        return {name: _marked(item, passes) for name, item in value.items()}
    return value


@contextmanager
def watching(run: Trainer, clock: Clock) -> Iterator[None]:
    """Inside the block the clock knows modules, loss terms, operators and the optimiser of the steps of `run`."""
    places: list[tuple[Any, str, str]] = [(run, "_descend", "optimiser")]
    modules = [(getattr(run.network, name, None), title) for name, title in MODULES.items()]
    places += [(module, "forward", title) for module, title in modules if module is not None]
    places += [(run.method, name, title) for name, title in TERMS.items() if hasattr(run.method, name)]
    places += [(ops, name, name) for name in info.operator_names()]
    with ExitStack() as stack:
        for owner, name, title in places:
            stack.enter_context(patch.object(owner, name, clock.watch(title, getattr(owner, name))))
        yield


# What the steps run on


def trainer_without_images(settings: Config) -> Trainer:
    """A trainer that has not read a data set: of its run there are steps only."""
    if settings.train.compile:
        raise UserError("train.compile: a compiled network cannot be looked into; use train.compile=false")
    if not settings.augment.channels:
        raise UserError(
            f"method.name: steps are drawn for methods without captions, dcl and salcr among them, got {settings.method.name}"
        )
    nothing = SimpleNamespace(train=None, test=None)
    with patch.object(trainer.data, "read", lambda _: nothing), patch.object(trainer, "decode", lambda *_: None):
        run = Trainer(settings, Path())
    run.network.train()
    return run


def draw_labels(run: Trainer, images: Pair[int], clusters: Pair[int]) -> tuple[Labels, Pair[Tensor]]:
    """Labels as after the association, if the method has one, and whom each image shows, `[N]` int64.

    Cluster i of one modality is cluster i of the other; clusters that the other has no more go round.
    """
    own = images.map(lambda count, labels: torch.arange(count, device=run.device) % labels, clusters)
    people = own.map(lambda labels: labels % min(clusters))
    paired = len(run.config.train.stages) > 1 and getattr(getattr(run.method.settings, "dagl", None), "enabled", False)
    return Labels(own, own, people if paired else None), people


def draw_batch(run: Trainer, labels: Labels, people: Pair[Tensor]) -> tuple[Batch, Tensor]:
    """A batch of the last stage, and whom each of its rows [vis; aug; ir] shows.

    An image is its person's pattern of a few colours, and noise; an infrared one has no colour.
    """
    generator = torch.Generator().manual_seed(run.config.seed)
    plan = run.method.batches(labels, run.config.train.stages[-1], seeds.random_state(run.config.seed))
    rows = next(plan).map(lambda chosen: torch.from_numpy(chosen).to(run.device))
    patterns = torch.randn(int(max(map(torch.max, people))) + 1, 3, 6, 3, generator=generator).to(run.device)

    def draw(shown: Tensor) -> Tensor:
        pattern = F.interpolate(patterns[shown], run.config.data.size, mode="bilinear")
        return pattern + 0.3 * torch.randn(pattern.shape, generator=generator).to(run.device)

    shown = people.map(lambda all_rows, chosen: all_rows[chosen], rows)
    vis, aug, ir = draw(shown.vis), draw(shown.vis), draw(shown.ir).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    own = labels.own.map(lambda part, chosen: part[chosen], rows)
    cross = labels.cross and labels.cross.map(lambda part, chosen: part[chosen], rows)
    return Batch(vis, aug, ir.contiguous(), own, cross, generator), torch.cat([shown.vis, shown.vis, shown.ir])


@torch.no_grad()
def draw_features(run: Trainer, batch: Batch, shown: Tensor, people: Pair[Tensor]) -> Features:
    """Features of all images: around the mean of what the network gives for their person, or anywhere.

    Args:
        shown: `[3s]` whom the rows of the batch show; people: `[N]` whom the images show.
    """
    stage = len(run.config.train.stages) - 1
    output = run._forward(stage, **run.method.inputs(batch))
    count = int(max(map(torch.max, people))) + 1

    def around(rows: Tensor) -> Pair[Tensor]:
        anywhere = F.normalize(torch.randn(count, rows.shape[1], device=run.device))
        means = F.normalize(ops.segment_mean(rows.float(), shown, count))
        centres = torch.where(means.any(1, keepdim=True), means, anywhere)
        return people.map(lambda who: F.normalize(centres[who] + _noise(len(who), rows)))

    whole = around(output.features)
    if output.parts is None:
        return Features(whole)
    on_own_maps = output.parts.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2).flatten(1, 2)  # [N_p, 3s, D]
    found = [around(rows) for rows in on_own_maps]
    return Features(whole, Pair(torch.stack([rows.vis for rows in found]), torch.stack([rows.ir for rows in found])))


def _noise(count: int, like: Tensor) -> Tensor:
    """Rows of length `SPREAD`, near enough."""
    return torch.randn(count, like.shape[1], device=like.device) * (SPREAD / like.shape[1] ** 0.5)


# The measurement


def profile(run: Trainer, batch: Batch, steps: int, clock: Clock) -> tuple[list[Row], float | None]:
    """Rows of the table, the step itself first, and the share of rows with a positive (None without a loss of sets)."""
    stage = len(run.config.train.stages) - 1
    found: list[Tensor] = []
    contrast = ops.neighbor_contrast

    @wraps(contrast)
    def counted(rows: Tensor, bank: Tensor, positives: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found.append((positives >= 0).any(dim=-1).flatten())
        return contrast(rows, bank, positives, *arguments, **options)

    run._step(batch, stage)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    readings = []
    with patch.object(ops, "neighbor_contrast", counted), watching(run, clock):
        for _ in range(steps):
            clock.read()
            run._step(batch, stage)
            readings.append(clock.read())
    return rows_of(readings), float(torch.cat(found).float().mean()) if found else None


def rows_of(readings: list[dict[tuple[Names, str], float]]) -> list[Row]:
    """The step and its parts, in the order in which they began."""
    directions = ("forward", "backward")

    def spent(path: Names, *which: str) -> float:
        return median(sum(reading.get((path, direction), 0.0) for direction in which) for reading in readings)

    for reading in readings:
        for direction in directions:
            parts = sum(time for (path, way), time in reading.items() if len(path) == 1 and way == direction)
            reading[(REST, direction)] = reading.get(((), direction), 0.0) - parts
    paths = list(dict.fromkeys(path for reading in readings for path, _ in reading))
    step, backbone = spent((), *directions), spent(BACKBONE, *directions)
    return [
        Row(
            path,
            *(spent(path, direction) for direction in directions),
            spent(path, *directions) / step,
            None if path in ((), BACKBONE) else spent(path, *directions) / (step - backbone),
        )
        for path in paths
    ]


@torch.no_grad()
def costs(run: Trainer) -> list[Cost]:
    """Of the network as it is in the first stage and, where it has part features, in the last one."""
    network = run.network.eval()
    stage = len(run.config.train.stages) - 1
    image = torch.zeros(1, 3, *run.config.data.size, device=run.device)
    one, triplet = {"vis": image}, {"vis": image, "aug": image, "ir": image}
    parts = getattr(network, "parts", None)
    without = _numbers(network) - (_numbers(parts) if parts is not None else 0)
    found = [Cost("an image, whole", without, _macs(network, one, 0))]
    if parts is not None:
        found.append(Cost("an image, and its parts", _numbers(network), _macs(network, one, stage)))
        found.append(Cost("v, a and r, whole", without, _macs(network, triplet, 0)))
        found.append(Cost("v, a and r, and parts on all maps", _numbers(network), _macs(network, triplet, stage)))
    network.train()
    return found


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _macs(network: nn.Module, images: dict[str, Tensor], stage: int) -> int:
    with FlopCounterMode(display=False) as counter:
        network(**images, stage=stage)
    return counter.get_total_flops() // 2


# What is shown


def cost_lines(found: list[Cost]) -> str:
    """Every second line adds the parts to the one before."""
    body = []
    for before, cost in zip([None, *found], found, strict=False):
        added = before is not None and cost.parameters > before.parameters
        more = (cost.parameters - before.parameters, cost.macs - before.macs) if added and before else (0, 0)
        texts = [f"{value / unit:.3f}" for value, unit in ((cost.parameters, 1e6), (cost.macs, 1e9))]
        adds = [f" (+{value / unit:.4f})" if added else "" for value, unit in zip(more, (1e6, 1e9), strict=True)]
        body.append((cost.what, texts[0] + adds[0], texts[1] + adds[1]))
    return table(("forward pass of", "parameters (M)", "multiply-accumulates (G)"), body)


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="NAME", required=True, help="a YAML file, or the name of one of the engine's")
    parser.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="change one setting (again for more)"
    )
    two = {"type": int, "nargs": 2, "metavar": ("VIS", "IR")}
    parser.add_argument("--images", default=(22258, 11909), help="that have a cluster; those of SYSU-MM01", **two)
    parser.add_argument("--clusters", default=(450, 400), help="of each modality; 450 400", **two)
    parser.add_argument("--steps", type=int, default=3, help="that are counted; 3")
    parser.add_argument("--threads", type=int, help="of torch and of the engine; all cores by default")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what tells the time on a CPU; wall")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON too")
    arguments = parser.parse_args(given)
    if min(*arguments.images, *arguments.clusters, arguments.steps, arguments.threads or 1) < 1:
        parser.error("--images, --clusters, --steps and --threads must be at least 1")
    if any(images < clusters for images, clusters in zip(arguments.images, arguments.clusters, strict=True)):
        parser.error("--clusters: every cluster must have an image, so there can be no more of them than --images")
    return arguments


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    arguments = parse(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = config.load(arguments.cfg, ["model.weights=none", *arguments.set])
    images, clusters = Pair(*arguments.images), Pair(*arguments.clusters)
    run = trainer_without_images(settings)
    found = costs(run)
    labels, people = draw_labels(run, images, clusters)
    batch, shown = draw_batch(run, labels, people)
    run.state.memories = run.method.memories(draw_features(run, batch, shown, people), labels)
    rows, positive = profile(run, batch, arguments.steps, Clock(run.device, CLOCKS[arguments.clock]))
    on_gpu = run.device.type == "cuda"
    facts = {
        "command": shlex.join(
            ["tools/profile_step.py", *(x for x in given if x not in ("--json", str(arguments.json)))]
        ),
        "machine": torch.cuda.get_device_name(run.device) if on_gpu else info.cpu_name(),
        "threads": str(torch.get_num_threads()),
        "time": "events on the stream" if on_gpu else f"{arguments.clock} clock",
        "load": "" if on_gpu else f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores",
        "commit": info.commit() or "unknown",
        "torch": torch.__version__,
        "precision": settings.train.precision,
        "batch": f"{len(batch.vis)} v + {len(batch.aug)} a + {len(batch.ir)} r, {' x '.join(map(str, settings.data.size))}",
        "memories": f"{images.vis} and {images.ir} images, {clusters.vis} and {clusters.ir} clusters",
        "steps": str(arguments.steps),
        "rows with a positive": "" if positive is None else f"{positive:.1%}",
        "most memory of the " + ("GPU" if on_gpu else "process"): f"{report.peak_memory(run.device):,.0f} MiB",
    }
    facts = {name: value for name, value in facts.items() if value}
    print(table(("of this run", ""), facts.items()), step_table(map(asdict, rows)), cost_lines(found), sep="\n\n")
    if arguments.json:
        content = {"facts": facts, "rows": [asdict(row) for row in rows], "costs": [asdict(cost) for cost in found]}
        checkpoint.write(arguments.json, (json.dumps(content, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_tool(main)
