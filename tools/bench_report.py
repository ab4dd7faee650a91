"""What `bench_kernels.py` shows and writes: lines in the terminal, Markdown, JSON, a picture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_measure import Ceiling, Row

from engine import checkpoint

COLUMNS = {
    "operator": 36,
    "size": 28,
    "dtype": 9,
    "contender": 22,
    "calls": 6,
    "median ms": 11,
    "quartiles": 22,
    "GFLOP/s": 9,
    "GB/s": 8,
    "of ceiling": 11,
    "extra MB": 9,
    "engine": 9,
    "goal": 10,
}
"""Width in the terminal by name."""
INTRODUCTION = """\
Made by the command below, as a whole; nothing here is typed in. Every contender's result was compared with the
operator's reference before it was timed."""
GROWTH = """\
Milliseconds of a call by N, and the exponent fitted to them: time ~ N^exponent. Rows are narrow (256), so that what is
not a product of matrices shows. N = visible images (half as many infrared ones), rows of the searched set, queries."""
LEGEND = """\
- **calls**: samples that the median is of, each the mean of as many calls as fill 20 ms; those of all contenders
  alternate. Who takes long has fewer; after 20 seconds there is no second call. `*` = in a process of its own, not in
  turn with the others: what takes minutes (once), and what needs a variable set before it is loaded.
- **GFLOP/s, GB/s**: counted over measured. Counted is the least that the operator must do: no product twice (of a matrix
  with itself each pair once), inputs read and outputs written once. Who does more shows less.
- **of ceiling**: time that the counted work takes at the rates of one large float32 `torch.mm` and one large copy, over
  the time measured. The first of these is no limit of the processor: vector code may be better than the BLAS that torch
  brings, and caches faster than memory, so that more than 100 % can be seen.
- **extra MB**: most memory in use during the second call of a fresh process (of what takes minutes, the first), less what
  was in use before and what is returned.
- **engine**: how many times faster the engine's own choice of back end is.
- **goal**: what that, or in the engine's own row its memory or on a GPU its time, is to reach.
"""
ON_A_GPU = """\
- **on this GPU** times are those of events on the stream around a call, with a second-level cache that was emptied before
  it; memory is what torch's allocator gave out beyond inputs and results, at most. Products are in float32 but for
  contenders with "TF32" or "fast" in their names; the ceiling of all is the product in TF32, as float32 can be made of it.
"""


@dataclass(frozen=True)
class Growth:
    """How the time of a back end grows.

    Attributes:
        points: (N, milliseconds), N doubling; it ends before a call that would take too long.
        exponent: slope of log time over log N, by least squares; None with a single point.
    """

    op: str
    form: str
    contender: str
    points: list[tuple[int, float]]
    exponent: float | None


# Cells


def cells(row: Row) -> dict[str, str]:
    """Text by column."""
    known = {"operator": f"{row.op} {row.form}".strip(), "size": row.size, "dtype": row.dtype}
    if row.missing:
        return dict.fromkeys(COLUMNS, "") | known | {"contender": row.contender, "median ms": row.missing}
    goal = f"{row.goal:g}x" if row.goal else ""
    if row.memory_goal:
        goal = f"< {row.memory_goal / 1e6:.3g} MB"
    if row.time_goal:
        goal = f"< {row.time_goal:g} ms"
    return known | {
        "contender": row.contender,
        "calls": f"{row.samples}{'*' if row.apart else ''}",
        "median ms": number(row.median),
        "quartiles": f"{number(row.low)} - {number(row.high)}" if row.samples > 1 else "",
        "GFLOP/s": number(row.gflops) if row.gflops else "",
        "GB/s": number(row.gbytes),
        "of ceiling": f"{row.ceiling:.0%}",
        "extra MB": "" if row.memory is None else f"{row.memory / 1e6:.1f}",
        "engine": "itself" if row.ours else f"{row.speedup:.2f}x" if row.speedup else "",
        "goal": goal,
    }


def number(value: float | None) -> str:
    """Three digits at least, none of them idle."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


# The terminal


def line(texts: Mapping[str, str]) -> str:
    return " ".join(f"{texts[name]:<{width}}" for name, width in COLUMNS.items()).rstrip()


def title_line() -> str:
    return line({name: name for name in COLUMNS})


def growth_lines(growths: Iterable[Growth]) -> list[str]:
    """N and milliseconds in turn."""
    return [
        f"{growth.op} {growth.form}".strip()
        + f" ({growth.contender}): ~ N^{exponent_text(growth)}; "
        + ", ".join(f"{count}: {number(milliseconds)} ms" for count, milliseconds in growth.points)
        for growth in growths
    ]


def exponent_text(growth: Growth) -> str:
    return "?" if growth.exponent is None else f"{growth.exponent:.2f}"


# The README

SHOWN = (
    (
        "clustering {size}: k-NN, Jaccard, DBSCAN",
        ("jaccard", "+ dbscan with the k-NN", "22258 x 2048"),
        {"field's loops": "{time}, {memory}: loops in numpy, dense scikit-learn DBSCAN"},
    ),
    (
        "30 nearest neighbours, {size}",
        ("topk", "self, k 30", "22258 x 2048"),
        {
            "faiss": "FAISS {time}",
            "faiss, AVX-512 BLAS": "FAISS with an AVX-512 BLAS {time}",
            "torch chunked": "PyTorch {time}",
            "scikit-learn": "scikit-learn {time}",
        },
    ),
    (
        "CMFP, {size}",
        ("cmfp", "k 30", "(22258 + 11909) x 2048"),
        {"dense sort + matmul": "{time}, {memory}: four dense blocks"},
    ),
    (
        "contrast of 256 features with 34,167 instances, forward and backward",
        ("neighbor_contrast", "fwd + bwd", "256 x 34167 x 2048"),
        {"torch eager": "PyTorch {time}, {memory}", "torch.compile": "torch.compile {time}"},
    ),
    (
        "contrast of 256 features with 800 clusters, and memory update",
        ("cluster_contrast", "fwd + bwd + update", "256 x 800 x 2048"),
        {"torch + Python loop": "PyTorch and a Python loop {time}"},
    ),
    (
        "Sinkhorn, {size}, an iteration",
        ("sinkhorn", "an iteration of 20", "11909 x 800"),
        {
            "torch linear": "PyTorch {time}",
            "torch log": "PyTorch in the log domain, as safe as ours, {time}",
            "POT": "POT {time}",
            "GeomLoss": "GeomLoss {time}",
        },
    ),
    (
        "evaluation, 3,803 queries, 301 in the gallery",
        ("rank", "", "3803 x 301"),
        {"field's Python": "{time}: loops in Python"},
    ),
)
"""Lines of the README's table: its words, the case by operator, form and size, and the words for others by contender."""


def summary(content: Mapping[str, Any]) -> str:
    """The README's table, from what `write_json` wrote; values in float32."""
    rows = [row for row in content["rows"] if row["dtype"] == "float32"]
    body = []
    for words, (op, form, size), others in SHOWN:
        found = [row for row in rows if (row["op"], row["form"], row["size"]) == (op, form, size)]
        own = next(row for row in found if row["ours"])
        timed = {row["contender"]: row for row in found if row["median"] is not None}
        engine = f"**{duration(own['median'])}**" + (f", {amount(own['memory'])}" if own["memory"] is not None else "")
        cell = "; ".join(
            text.format(time=duration(timed[name]["median"]), memory=amount(timed[name]["memory"] or 0))
            for name, text in others.items()
            if name in timed
        )
        body.append((words.format(size=re.sub(r"(\d{2})(\d{3})\b", r"\1,\2", size)), engine, cell))
    return table(("", "engine", "others"), body) + "\n"


def duration(milliseconds: float) -> str:
    if milliseconds < 999.5:
        return f"{milliseconds:.{0 if milliseconds >= 99.95 else 1}f} ms"
    return f"{milliseconds / 1e3:.{0 if milliseconds >= 99950 else 1}f} s"


def amount(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.0f} MB" if count < 999.5e6 else f"{count / 1e9:.1f} GB"


# Files


def write_json(path: Path, header: Mapping[str, str], ceiling: Ceiling, rows: list[Row], growths: list[Growth]) -> None:
    content = {
        "header": dict(header),
        "ceiling": asdict(ceiling),
        "rows": [asdict(row) for row in rows],
        "growth": [asdict(growth) for growth in growths],
    }
    checkpoint.write(path, (json.dumps(content, indent=1) + "\n").encode())


def markdown(header: Mapping[str, str], rows: list[Row], growths: list[Growth], picture: str | None) -> str:
    """The page, made of nothing but this run."""
    parts = [
        "# Benchmarks of the operators",
        INTRODUCTION,
        table(("of this run", ""), [(name, f"`{value}`") for name, value in header.items()]),
    ]
    goals = [row for row in rows if row.goal or row.memory_goal or row.time_goal]
    if goals:
        parts += ["## Goals", table(("operator", "size", "against", "goal", "measured", "reached"), goal_lines(goals))]
    if picture:
        parts += [f"![How many times faster the engine is than each contender]({picture})"]
    if rows:
        body = [tuple(cells(row).values()) for row in rows]
        legend = LEGEND + ON_A_GPU if "torch.mm in TF32" in header else LEGEND
        parts += ["## All contenders", legend.strip(), table(tuple(COLUMNS), body)]
    if growths:
        parts += [
            "## How cost grows",
            GROWTH,
            growth_table(growths),
        ]
    return "\n\n".join(parts) + "\n"


def goal_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line for every goal."""
    lines = []
    for row in rows:
        name = f"{row.op} {row.form}".strip()
        if row.goal and row.speedup:
            reached = "yes" if row.speedup >= row.goal else "no"
            lines.append((name, row.size, row.contender, f"{row.goal:g}x", f"{row.speedup:.2f}x", reached))
        if row.memory_goal and row.memory is not None:
            reached = "yes" if row.memory <= row.memory_goal else "no"
            goal, found = f"< {row.memory_goal / 1e6:.3g} MB", f"{row.memory / 1e6:.1f} MB"
            lines.append((name, row.size, "extra memory", goal, found, reached))
        if row.time_goal and row.median:
            reached = "yes" if row.median <= row.time_goal else "no"
            lines.append((name, row.size, "time", f"< {row.time_goal:g} ms", f"{number(row.median)} ms", reached))
    return lines


def growth_table(growths: list[Growth]) -> str:
    counts = sorted({count for growth in growths for count, _ in growth.points})
    body = []
    for growth in growths:
        points = {count: number(milliseconds) for count, milliseconds in growth.points}
        name = f"{growth.op} {growth.form}".strip()
        body.append((name, growth.contender, *(points.get(count, "") for count in counts), exponent_text(growth)))
    return table(("operator", "back end", *map(str, counts), "exponent"), body)


def table(titles: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    titles = list(titles)
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (titles, ["---"] * len(titles), *body))


# The picture

COLOURS = (
    ("reference", "#b0b0b0"),
    ("torch", "#e07b39"),
    ("faiss", "#3a6ea5"),
    ("scikit-learn", "#6fa8a0"),
    ("POT", "#8e6bb0"),
    ("GeomLoss", "#b98fc9"),
    ("", "#4c9f50"),
)
"""By beginning of the contender's name; the last one is of loops and dense matrices."""


def plot(path: Path, header: Mapping[str, str], rows: list[Row]) -> None:
    """Bars of speed-ups, one block per case, with the goals as marks."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    shown = [row for row in rows if row.speedup and not row.ours]
    cases = list(dict.fromkeys((row.op, row.form, row.size, row.dtype) for row in shown))
    several_dtypes = len({row.dtype for row in shown}) > 1
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.24 * len(shown) + 0.3 * len(cases)), layout="constrained")
    height = 0.0
    places, names = [], []
    for op, form, size, dtype in cases:
        block = [row for row in shown if (row.op, row.form, row.size, row.dtype) == (op, form, size, dtype)]
        block.sort(key=lambda row: row.speedup or 0.0)
        title = f"{op} {form}".strip() + f"\n{size}" + (f" {dtype}" if several_dtypes else "")
        places.append(height - 0.5 * (len(block) - 1))
        names.append(title if len(block) > 1 else title.replace("\n", ", "))
        for row in block:
            axes.barh(height, row.speedup - 1, left=1, height=0.85, color=colour(row.contender))
            end = max(row.speedup, row.goal or 0, 1)
            axes.text(end * 1.06, height, f"{row.contender}  {row.speedup:.3g}x", va="center", fontsize=8)
            if row.goal:
                axes.plot([row.goal] * 2, [height - 0.45, height + 0.45], color="black", linewidth=1.6)
            height -= 1
        axes.axhline(height + 0.35, color="#dddddd", linewidth=0.6)
        height -= 0.3
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = min(row.speedup for row in shown), max(max(row.speedup, row.goal or 0) for row in shown)
    axes.set_xlim(min(0.8, low / 1.3), high * 12)
    axes.set_ylim(height + 0.4, 0.8)
    axes.set_xlabel("times faster than the contender (log scale); a black mark is the goal")
    axes.set_title(
        f"engine.ops on {header['machine']}, {header['threads']} threads, commit {header['commit']}", size=10
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def colour(contender: str) -> str:
    return next(found for beginning, found in COLOURS if contender.startswith(beginning))
