"""How time and memory of every phase of training grow with the number of images.

    python tools/scale.py [--counts N ...] [--widths D ...] [--patience SECONDS] [--json FILE] [--markdown FILE]

N counts the images of both modalities, two thirds of them visible, 64 of a person: so the number of people grows with N, as
when more footage comes in. Features are drawn, no data set is needed. Every N is a process of its own. A phase is left out at
an N where, by its growth so far, it would take longer than `--patience`. Where nothing else runs on the machine, wall time is
the one to look at; the time that the process had a core is disturbed less.

What is measured is fitted by `c + a N`, or `c + a N + b N^2` where pairs of images, or of images and people, are compared, with
no factor below 0 and least squares of relative errors, and said for a million images. `--markdown` writes the tables between two marks
of that file: docs/scale.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when OpenMP is loaded: threads that wait leave the core

import numpy as np
import torch
from bench_cases import known_neighbours
from bench_measure import forget_peak, resident
from bench_report import number, table
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from engine import checkpoint, config, info, ops, seeds
from engine.associate import associate
from engine.cluster import Labels, quality
from engine.data.loader import Batch
from engine.errors import UserError, run_tool
from engine.evaluate import score_features
from engine.features import Features, extract
from engine.memory import cluster_memory
from engine.methods.salcr import Salcr
from engine.model.network import Network, Output
from engine.pair import Pair

LEAST = 1024
COUNTS = tuple(1000 * 2**power for power in range(1, 6))
IMAGES_PER_PERSON = 64
MILLION = 1_000_000
SETTINGS = ("sysu.yaml", ["data.root=.", "model.weights=none"])
MARKS = "<!-- written by tools/scale.py -->\n", "<!-- end -->\n"
PHASES = (
    "extraction",
    "k-NN",
    "Jaccard",
    "DBSCAN",
    "CMFP",
    "association",
    "label scores",
    "memories",
    "losses of a step",
    "evaluation",
)
SQUARED = ("k-NN", "CMFP", "association", "label scores", "evaluation")
"""Phases whose time grows with pairs: of images, of images and people, of clusters and people."""
BOUNDED = ("association", "evaluation")
"""Phases whose memory grows to a bound, the size of a block: no law of it holds beyond the sizes measured."""


@dataclass(frozen=True)
class Point:
    """A phase at one size.

    Attributes:
        cpu, wall: seconds that the process had a core, and that passed.
        memory: most bytes in use during the phase, less what was before; what it returns counts.
    """

    phase: str
    width: int
    count: int
    cpu: float
    wall: float
    memory: int


@dataclass(frozen=True)
class Law:
    """What a phase costs at N: `constant + linear N + squared N^2`.

    Attributes:
        exponent: slope of log cost over log N by least squares, for comparison.
        residual: largest relative error of the law at a measured N.
        r2: share of the variance of log cost that the law explains.
        million: the law's cost at a million images, extrapolated.
    """

    constant: float
    linear: float
    squared: float
    exponent: float
    residual: float
    r2: float
    million: float


# What is measured


def phases(count: int, width: int, wanted: Sequence[str]) -> Iterator[Point]:
    """The wanted phases, in the order of an epoch; the others are run too where later ones need their results."""
    settings = config.load(*SETTINGS)
    method = Salcr(settings)
    torch.manual_seed(0)
    if "extraction" in wanted:
        yield _extraction(count, width)
    who, features = draw(count, width)
    found: dict[str, Any] = {}

    def run(phase: str, call: Callable[[], Any]) -> Iterator[Point]:
        if phase in wanted:
            before, cpu, wall = forget_peak(), time.process_time(), time.perf_counter()
            found[phase] = call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            yield Point(phase, width, count, cpu, wall, max(0, resident("VmHWM") - (before or 0)))

    k1, k2, eps = settings.cluster.k1.vis, settings.cluster.k2, settings.cluster.eps.vis

    def jaccard(rows: Tensor, near: tuple[Tensor, Tensor]) -> Tensor:
        with known_neighbours(near[1]):
            return ops.jaccard(rows, k1, k2)

    yield from run("k-NN", lambda: features.map(lambda rows: ops.topk(rows, rows, k1)))
    if "k-NN" in found:
        yield from run("Jaccard", lambda: features.map(jaccard, found.pop("k-NN")))
        yield from run("DBSCAN", lambda: found.pop("Jaccard").map(lambda distance: ops.dbscan(distance, eps)))
    clusters = found.get("DBSCAN", who)
    counts = clusters.map(lambda labels: int(labels.max()) + 1)
    yield from run("CMFP", lambda: ops.cmfp(*features, method.settings.cmfp.k))
    found.pop("CMFP", None)
    transport = method.settings.transport
    means = features.map(cluster_memory, clusters, counts)
    yield from run("association", lambda: associate(features, means, transport.reg, transport.tol, transport.max_iter))
    labels = Labels(clusters, clusters, found.get("association", who))
    yield from run("label scores", lambda: quality(labels, who.map(Tensor.numpy)))
    parts = features.map(lambda rows: rows.expand(method.settings.fgsal.parts, -1, -1))
    yield from run("memories", lambda: method.memories(Features(features, parts), labels))
    if "memories" in found:
        yield from run("losses of a step", lambda: _losses(method, found["memories"], labels, width))
        del found["memories"]
    ids, cams = (who.ir, who.vis), (torch.zeros_like(who.ir), torch.zeros_like(who.vis))
    yield from run("evaluation", lambda: score_features(features.ir, features.vis, ids, cams, "plain"))


def draw(count: int, width: int) -> tuple[Pair[Tensor], Pair[Tensor]]:
    """Whom the images show, and unit features as a trained network gives them: a person's, apart by the modality."""
    people = max(2, count // IMAGES_PER_PERSON)
    centres, apart = F.normalize(torch.randn(people, width)), F.normalize(torch.randn(2, width))
    sizes = Pair(count - count // 3, count // 3)
    who = sizes.map(lambda size: torch.arange(size) % people)

    def rows(shown: Tensor, shift: Tensor) -> Tensor:
        return F.normalize(centres[shown] + 0.5 * shift + 0.7 / width**0.5 * torch.randn(len(shown), width))

    return who, who.map(rows, Pair(*apart))


def _extraction(count: int, width: int) -> Point:
    """By the demo's network, which is what a core can do; its width is its own."""
    settings = config.load("demo.yaml")
    network = Network(settings.model, 3)
    with tempfile.TemporaryFile() as file:
        pixels = np.memmap(file, np.uint8, "w+", shape=(count, *settings.data.size, 3))
        for start in range(0, count, 256):
            pixels[start : start + 256] = np.random.default_rng(start).integers(
                0, 255, pixels[start : start + 256].shape
            )
        halves = Pair(pixels[: count - count // 3], pixels[count - count // 3 :])
        before, cpu, wall = forget_peak(), time.process_time(), time.perf_counter()
        extract(network, halves, settings, torch.device("cpu"), stage=1)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Point("extraction", width, count, cpu, wall, max(0, resident("VmHWM") - (before or 0)))


def _losses(method: Salcr, memories: dict[str, Tensor], labels: Labels, width: int) -> None:
    """Losses of a step, their gradients and the update of the memories; the network has no part in it."""
    stage = method.config.train.stages[-1]
    plan = method.batches(labels, stage, seeds.random_state(0))
    rows = next(plan).map(torch.from_numpy)
    size, count = len(rows.vis), method.settings.fgsal.parts
    assert labels.cross is not None
    own, cross = (part.map(lambda all_rows, chosen: all_rows[chosen], rows) for part in (labels.own, labels.cross))
    images = torch.empty(size, 1, 1, 1)
    batch = Batch(images, images, images, own, cross, seeds.generator(0))
    features = F.normalize(torch.randn(3 * size, width)).requires_grad_()
    parts = F.normalize(torch.randn(count, 3, 3, size, width), dim=-1).requires_grad_()
    output = Output(images, features, parts)
    torch.stack(list(method.losses(output, batch, memories).values())).sum().backward()
    with torch.no_grad():
        method.update(output, batch, memories)


# How it grows


def fit(points: Sequence[tuple[int, float]], squared: bool) -> Law:
    """The law of (N, cost), cost > 0."""
    sizes, costs = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    terms = sizes[:, None] ** np.arange(3 if squared else 2)
    factors, _ = nnls(terms / costs[:, None], np.ones(len(costs)))
    said = terms @ factors
    slope = np.polyfit(np.log(sizes), np.log(costs), 1)[0] if len(points) > 1 else math.nan
    spread = ((np.log(costs) - np.log(costs).mean()) ** 2).sum()
    unexplained = ((np.log(costs) - np.log(said)) ** 2).sum()
    constant, linear, of_pairs = np.pad(factors, (0, 3 - len(factors))).tolist()
    return Law(
        constant,
        linear,
        of_pairs,
        float(slope),
        float(np.abs(said / costs - 1).max()),
        float(1 - unexplained / spread) if spread else math.nan,
        constant + linear * MILLION + of_pairs * MILLION**2,
    )


def measure(counts: Sequence[int], widths: Sequence[int], patience: float) -> list[Point]:
    """Every phase at every size, each N in a process of its own."""
    points: list[Point] = []
    for width in widths:
        wanted = list(PHASES if width == widths[0] else PHASES[1:])  # the extraction's network has a width of its own
        last: dict[str, Point] = {}
        for before, count in zip([0, *counts], counts, strict=False):
            growth = (count / before) if before else 1.0
            wanted = [
                phase
                for phase in wanted
                if phase not in last or last[phase].cpu * growth ** (2 if phase in SQUARED else 1) <= patience
            ]
            for point in _in_child(count, width, wanted):
                last[point.phase] = point
                points.append(point)
                print(
                    f"{width} {count} {point.phase}: {point.cpu:.2f} s of a core, {point.wall:.2f} s", file=sys.stderr
                )
    return points


def _in_child(count: int, width: int, wanted: Sequence[str]) -> list[Point]:
    command = [sys.executable, __file__, "--child", str(count), str(width), *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        raise UserError(f"{count} images of width {width}: ended with code {done.returncode} after {len(lines)} phases")
    return [Point(**line) for line in lines]


# What is shown


def tables(facts: dict[str, str], points: Sequence[Point]) -> str:
    """All tables in Markdown."""
    parts = [table(("of this run", ""), [(name, f"`{value}`") for name, value in facts.items()])]
    for width in dict.fromkeys(point.width for point in points):
        own = [point for point in points if point.width == width]
        counts = sorted({point.count for point in own})
        parts.append(f"### Features of width {width}")
        parts.append(_growth("seconds of a core", own, counts, lambda point: point.cpu, duration))
        parts.append(_growth("memory", own, counts, lambda point: float(max(point.memory, 1)), size, in_time=False))
    return "\n\n".join(parts)


def _growth(
    title: str,
    points: Sequence[Point],
    counts: Sequence[int],
    cost: Callable[[Point], float],
    text: Callable[[float], str],
    *,
    in_time: bool = True,
) -> str:
    body = []
    for phase in dict.fromkeys(point.phase for point in points):
        found = {point.count: cost(point) for point in points if point.phase == phase}
        cells = [phase, *(text(found[count]) if count in found else "" for count in counts)]
        if not in_time and phase in BOUNDED:
            body.append([*cells, "", "bounded", "", "", ""])
            continue
        law = fit(list(found.items()), in_time and phase in SQUARED)
        factors = {"": law.constant, " m": law.linear * MILLION, " m^2": law.squared * MILLION**2}
        terms = [text(factor) + power for power, factor in factors.items() if factor]
        fitted = [f"{law.exponent:.2f}", " + ".join(terms), f"{law.r2:.3f}", f"{law.residual:.0%}", text(law.million)]
        body.append([*cells, *fitted])
    heads = (title, *map(str, counts), "exponent", "law, m = N / 10^6", "R^2", "worst", "at 10^6")
    return table(heads, body)


def duration(seconds: float) -> str:
    """In the largest unit that leaves a number above 1."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{number(seconds / unit)} {name}"
    return f"{number(seconds)} s"


def size(byte_count: float) -> str:
    return f"{number(byte_count / 1e9)} GB" if byte_count >= 1e9 else f"{number(byte_count / 1e6)} MB"


def between_marks(text: str, content: str) -> str:
    """`text` with `content` between the marks."""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise UserError(f"--markdown: the file must hold the lines {MARKS[0].strip()!r} and then {MARKS[1].strip()!r}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, metavar="N", help="images; 2000 to 32000")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=(2048, 256), metavar="D", help="of features; 2048, 256"
    )
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS", help="of a core, for a phase; 60")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="measure nothing: fit what this JSON file holds anew"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables between the marks of this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.counts = sorted(set(arguments.counts))
    if not arguments.child and (min(arguments.counts) < LEAST or min(arguments.widths) < 1):
        parser.error(f"--counts and --widths: at least {LEAST} images and a width of 1")
    return arguments


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    arguments = parse(given)
    if arguments.child:
        count, width, *wanted = arguments.child
        for _ in phases(LEAST, int(width), [phase for phase in wanted if phase != PHASES[0]]):
            pass  # what is loaded or begun at the first call does not count
        for point in phases(int(count), int(width), wanted):
            print(json.dumps(asdict(point)), flush=True)
        return 0
    facts = {
        "command": shlex.join(["python", "tools/scale.py", *given]),
        "commit": info.commit() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": info.cpu_name(),
        "threads": str(torch.get_num_threads()),
        "load at start": f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    points: list[Point] = []
    if arguments.again:
        kept = json.loads(arguments.again.read_text())
        facts, points = kept["facts"], [Point(**point) for point in kept["points"]]
    before = arguments.markdown and between_marks(
        arguments.markdown.read_text(), ""
    )  # a file without marks is said now
    if not points:
        points = measure(arguments.counts, arguments.widths, arguments.patience)
        facts["load at end"] = f"{os.getloadavg()[0]:.1f}"
    text = tables(facts, points)
    print(text)
    if arguments.json:
        content = {"facts": facts, "points": [asdict(point) for point in points], "laws": list(_laws(points))}
        checkpoint.write(arguments.json, (json.dumps(content, indent=1) + "\n").encode())
    if before:
        checkpoint.write(arguments.markdown, between_marks(before, text).encode())
    return 0


def _laws(points: Sequence[Point]) -> Iterable[dict[str, Any]]:
    for phase, width in dict.fromkeys((point.phase, point.width) for point in points):
        own = [point for point in points if (point.phase, point.width) == (phase, width)]
        seconds = fit([(point.count, point.cpu) for point in own], phase in SQUARED)
        memory = (
            None if phase in BOUNDED else asdict(fit([(point.count, max(1, point.memory)) for point in own], False))
        )
        yield {"phase": phase, "width": width, "cpu": asdict(seconds), "memory": memory}


if __name__ == "__main__":
    run_tool(main)
