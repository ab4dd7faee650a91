"""Times the back ends of engine.ops against each other and against what the field runs.

    python tools/bench_kernels.py [--quick] [--op NAME ...] [--size NAME] [--backend NAME ...] [--dtype NAME ...]
        [--memory] [--scale] [--json FILE] [--markdown FILE] [--plot FILE]

Without an option it measures every operator at the sizes of SYSU-MM01, beside all peers that are installed
(`pip install -e .[bench]`), in about twenty minutes on two cores; `--quick` in two. A row gives the median and the
quartiles, counted work over time, and how many times faster the engine is. `--scale` fits how cost grows instead.
`--device cuda` times the same on a GPU, the engine and torch with TF32 and without; `--keep-going` lets nobody stop it.

The pages of the repository are made by

    python tools/bench_kernels.py --json docs/benchmarks.json --markdown docs/benchmarks.md --plot docs/benchmarks.png
    python tools/bench_kernels.py --readme
    python tools/bench_kernels.py --scale --json docs/benchmarks_growth.json --markdown docs/benchmarks_growth.md

where `--readme` measures nothing: it writes the README's table from docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when OpenMP is loaded: threads that wait leave the core

import readme_part
import torch
from bench_cases import CASES, SIZES, grown
from bench_measure import (
    AUTOMATIC,
    Ceiling,
    Row,
    Settings,
    contenders,
    described,
    gate,
    measure_ceiling,
    run_case,
    sample,
)
from bench_report import Growth, cells, growth_lines, line, markdown, plot, summary, title_line, write_json

from engine import info
from engine.ops._backend import BACKENDS

DTYPES = ("float32", "float64", "bfloat16", "float16")
PEER_PACKAGES = ("faiss-cpu", "pot", "geomloss")
POLICIES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "ENGINE_ISA")
GROWING = ("topk", "jaccard", "dbscan", "cmfp", "sinkhorn", "neighbor_contrast", "propagate", "segment_mean", "rank")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.json"
COUNTS = tuple(1000 * 2**power for power in range(1, 7))
PATIENCE = 30.0
"""Seconds that a call of `--scale` may take."""


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run and agree?")
    parser.add_argument("--op", nargs="+", choices=sorted(CASES), metavar="NAME", help="operators; all by default")
    parser.add_argument("--size", choices=tuple(SIZES), help="whose shapes; sysu by default")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=(*BACKENDS, AUTOMATIC),
        metavar="NAME",
        help=f"only these of {', '.join(BACKENDS)}, {AUTOMATIC}",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="NAME", help=", ".join(DTYPES)
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of every contender; all cores by default")
    parser.add_argument("--no-peers", action="store_true", help="back ends alone")
    parser.add_argument("--memory", action="store_true", help="measure the memory of all contenders")
    parser.add_argument("--budget", type=float, help="seconds for the rounds of a case")
    parser.add_argument("--keep-going", action="store_true", help="leave out what is wrong or fails, and say so")
    parser.add_argument("--scale", action="store_true", help=f"how cost grows, N = {COUNTS[0]} ... {COUNTS[-1]}")
    parser.add_argument("--json", type=Path, help="write header and rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the page")
    parser.add_argument("--plot", type=Path, help="draw the speed-ups")
    parser.add_argument("--readme", action="store_true", help="only write the README's table from docs/benchmarks.json")
    return parser.parse_args(given)


def header(given: list[str], device: str, ceiling: Ceiling) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    facts = {
        "command": shlex.join(["python", "tools/bench_kernels.py", *given]),
        "commit": info.commit() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": info.cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": str(os.cpu_count()),
        "instructions": instructions(),
        "threads": str(torch.get_num_threads()),
        "load at start": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "torch.mm": f"{ceiling.gflops:.0f} GFLOP/s",
        **({"torch.mm in TF32": f"{ceiling.tf32_gflops:.0f} GFLOP/s"} if ceiling.tf32_gflops else {}),
        "copy": f"{ceiling.gbytes:.1f} GB/s",
        **info.versions(),
        **{name: version(name) for name in PEER_PACKAGES},
    }
    return facts | {name: os.environ[name] for name in POLICIES if name in os.environ}


def instructions() -> str:
    """Which vector instructions the C++ back end uses here."""
    try:
        from engine import _C
    except ImportError:
        return "C++ back end not built"
    return _C.isa()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def settings_of(arguments: argparse.Namespace, dtype: str) -> Settings:
    size = SIZES["quick" if arguments.quick else arguments.size or "sysu"]
    budget = arguments.budget or (1.0 if size.name == "quick" else 30.0)
    return Settings(
        size=size,
        device=arguments.device,
        dtype=getattr(torch, dtype),
        threads=torch.get_num_threads(),
        backends=tuple(arguments.backend) if arguments.backend else None,
        peers=not arguments.no_peers,
        budget=budget,
        memory=arguments.memory,
        keep_going=arguments.keep_going,
    )


def compare(arguments: argparse.Namespace, ceiling: Ceiling, save: Callable[[list[Row]], None]) -> list[Row]:
    """Every case of every operator, shown and saved as it is done."""
    print(title_line(), flush=True)
    rows: list[Row] = []
    for dtype in arguments.dtype:
        settings = settings_of(arguments, dtype)
        for op in arguments.op or sorted(CASES):
            for found in rows_of(op, settings, ceiling):
                print(*map(line, map(cells, found)), sep="\n", flush=True)
                rows += found
                save(rows)
    return rows


def rows_of(op: str, settings: Settings, ceiling: Ceiling) -> Iterator[list[Row]]:
    """Case after case of an operator; where the settings are to keep going, its last row may say what ended them."""
    try:
        for index, case in enumerate(CASES[op](settings.size, settings.make)):
            yield run_case(case, index, settings, ceiling)
    except Exception as error:
        if not settings.keep_going:
            raise
        dtype = str(settings.dtype).removeprefix("torch.")
        yield [Row(op, "", settings.size.name, dtype, "all", missing=described(error), failed=True)]


def grow(arguments: argparse.Namespace) -> list[Growth]:
    """Every form of every operator at growing sizes; results are compared with the reference at the smallest."""
    growths = []
    settings = replace(settings_of(arguments, arguments.dtype[0]), peers=False)
    for op in arguments.op or GROWING:
        points: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for count in COUNTS:
            for case in CASES[op](grown(count), settings.make):
                for contender in contenders(case, settings)[: None if arguments.backend else 1]:
                    times = points.setdefault((case.form, contender.name), [])
                    if count == COUNTS[0]:
                        gate(case, [contender], settings)
                    elif (
                        5 * times[-1][1] * case.steps > 1e3 * PATIENCE
                    ):  # doubling N makes up to four times as many pairs
                        continue
                    seconds = typical(contender.call, case.inputs(), settings.device)
                    times.append((count, 1e3 * seconds / case.steps))
        found = [Growth(op, form, name, times, exponent(times)) for (form, name), times in points.items()]
        print(*growth_lines(found), sep="\n", flush=True)
        growths += found
    return growths


def typical(call: Callable[..., Any], arguments: tuple[Any, ...], device: str) -> float:
    """Seconds of a call: the median of five samples after a first one, or the first where it is long."""
    times = [sample(call, arguments, 1, device)]
    if times[0] < 5:
        times = [sample(call, arguments, max(1, int(0.02 / times[0])), device) for _ in range(5)]
    return sorted(times)[len(times) // 2]


def exponent(points: list[tuple[int, float]]) -> float | None:
    """The slope of log time over log N by least squares."""
    if len(points) < 2:
        return None
    x, y = zip(*((math.log(count), math.log(milliseconds)) for count, milliseconds in points), strict=True)
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def main(given: list[str]) -> None:
    arguments = parse(given)
    if arguments.readme:
        readme_part.write("bench_kernels", summary(json.loads(PAGE.read_text())))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    if arguments.plot and find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install -e .[bench]")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    ceiling = measure_ceiling(arguments.device, side=1024 if arguments.quick else 4096)

    def save(rows: list[Row], growths: list[Growth] | None = None) -> None:
        facts["duration"] = f"{(time.perf_counter() - start) / 60:.1f} minutes"
        if arguments.json:
            write_json(arguments.json, facts, ceiling, rows, growths or [])

    facts = header(given, arguments.device, ceiling)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", end="\n\n")
    try:
        rows, growths = ([], grow(arguments)) if arguments.scale else (compare(arguments, ceiling, save), [])
    except AssertionError as error:
        sys.exit(str(error))
    save(rows, growths)
    if arguments.plot:
        plot(arguments.plot, facts, rows)
    if arguments.markdown:
        picture = os.path.relpath(arguments.plot, arguments.markdown.parent) if arguments.plot else None
        arguments.markdown.write_text(markdown(facts, rows, growths, picture))
    if failed := [row for row in rows if row.failed]:
        sys.exit("\n".join(f"{row.op} {row.form}, {row.size}: {row.contender} {row.missing}" for row in failed))


if __name__ == "__main__":
    main(sys.argv[1:])
