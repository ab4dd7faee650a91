"""Run an ablation table of the SALCR or the FIRM paper, and print it with mean and standard deviation over seeds.

python tools/ablate.py --table 3 --cfg demo.yaml --seeds 3 [--jobs 2] [--out runs/ablate] [--set a.b=c ...]

Every cell, a row with one seed, is an ordinary run folder in --out. The same command again keeps finished cells and goes on
with interrupted ones; cells that rows or tables have in common are trained once. Stage 1 of SALCR, in which all rows are the
same, is a run of its own that the others start from.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import experiments
from ablate_tables import TABLES, Numbers, Table
from experiments import Run

from engine import config, data, report
from engine.config import Config
from engine.errors import UserError, run_tool
from engine.evaluate import Score

METRICS = ("R1", "mAP", "mINP")


@dataclass(frozen=True)
class Line:
    """One line of the printed table.

    Attributes:
        label: of its row, its re-ranking, and how many seeds it has where some failed.
        scores: one per protocol shown, mean and standard deviation over seeds; none where all failed.
        paper: the paper's numbers, three per protocol.
    """

    label: str
    scores: list[Score]
    paper: Numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = "; ".join(f"{name}: {table.title}" for name, table in TABLES.items())
    parser.add_argument("--table", required=True, choices=TABLES, metavar="TABLE", help=tables)
    parser.add_argument("--cfg", required=True, metavar="NAME", help="a YAML file, or one that comes with the engine")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per row, from `seed` on (default: 3)")
    parser.add_argument("--out", default="runs/ablate", metavar="DIR", help="of the run folders (default: runs/ablate)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting in all rows")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; they share the cores")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--latex", action="store_const", dest="form", const=latex, help="print a LaTeX tabular")
    form.add_argument("--csv", action="store_const", dest="form", const=comma_separated, help="print numbers only")
    arguments = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    table = TABLES[arguments.table]
    base = config.load(arguments.cfg, arguments.set)
    protocols = _check(base, table.method)
    seeds = range(base.seed, base.seed + arguments.seeds)
    rows = plan(table, arguments.cfg, arguments.set, seeds, Path(arguments.out))
    try:
        failed = experiments.train([run for row in rows for run in row], arguments.jobs)
        lines = collect(table, rows, failed, protocols, _papers_data(base))
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on with it", file=sys.stderr)
        return getattr(stop, "code", 130)
    if arguments.form:
        print(arguments.form(lines, protocols))
    else:
        print(f"Table {arguments.table}: {table.title}. {Path(arguments.cfg).name}, {_explain(seeds, lines)}\n")
        print(markdown(lines, protocols))
    for folder, reason in failed.items():
        print(f"failed: {folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def plan(table: Table, name: str, overrides: Sequence[str], seeds: Sequence[int], out: Path) -> list[list[Run]]:
    """The runs of every row, one per seed. Equal settings get the same folder, whichever rows and tables they are of."""

    @functools.cache
    def whole(*changes: str) -> Config:
        return config.load(name, [*overrides, *changes])

    @functools.cache
    def first_stage(*changes: str) -> Config:
        """SALCR's stage 1 is the baseline's."""
        chosen = whole(*changes, "method.name=dcl")
        return replace(chosen, train=replace(chosen.train, stages=chosen.train.stages[:1]))

    def folder(kind: str, make: Callable[..., Config], changes: Sequence[str], seed: int) -> Path:
        """Named by the settings that differ from the configuration's."""
        changed = sorted(change.removeprefix(f"{table.method}.") for change in changes if make(change) != make())
        return out / "-".join([Path(name).stem, *filter(None, [kind]), *changed, f"seed{seed}"])

    def run(changes: Sequence[str], seed: int) -> Run:
        place, chosen = folder("", whole, changes, seed), whole(*changes, f"seed={seed}")
        if chosen.train.start_from or table.method != "salcr":
            return Run(place, chosen)
        first = Run(folder("stage1", first_stage, changes, seed), first_stage(*changes, f"seed={seed}"))
        return Run(place, replace(chosen, train=replace(chosen.train, start_from=str(first.folder))), first)

    return [[run(row.train, seed) for seed in seeds] for row in table.rows]


def collect(
    table: Table, rows: Sequence[Sequence[Run]], failed: dict[Path, str], protocols: Sequence[str], data_set: str
) -> list[Line]:
    """The lines of the table: all rows plain, then all rows re-ranked, as far as the table shows them."""
    found = []
    for row, cells in zip(table.rows, rows, strict=True):
        good = [experiments.scores(cell, table.rerank) for cell in cells if cell.folder not in failed]
        missing = f" ({len(good)} of {len(cells)} seeds)" if len(good) < len(cells) else ""
        found.append((row, missing, experiments.average(good) if good else []))
    lines = []
    for shown in table.shows:
        for row, missing, means in found:
            scores = [
                score
                for score in means
                if score.protocol in protocols and f"{score.rerank} ".startswith(f"{row.rerank or shown} ")
            ]
            if scores or not means:
                label = row.label + (f" + {shown}" if shown and not row.rerank else "") + missing
                lines.append(Line(label, scores, row.paper.get(f"{data_set} {shown}".strip(), ())))
    return lines


def markdown(lines: Sequence[Line], protocols: Sequence[str]) -> str:
    """The table in the paper's layout."""
    return report.markdown([["", *_columns(protocols)], *([line.label, *_cells(line, protocols)] for line in lines)])


def latex(lines: Sequence[Line], protocols: Sequence[str]) -> str:
    """A `tabular` in the style of booktabs."""
    heads = " & ".join(f"\\multicolumn{{{len(METRICS)}}}{{c}}{{{protocol}}}" for protocol in protocols)
    rows = [[line.label, *_cells(line, protocols)] for line in lines]
    body = [" & ".join(row).replace("_", r"\_").replace("^", r"\^{}").replace("±", r"$\pm$") + r" \\" for row in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * len(METRICS) * len(protocols)}}}",
            r"\toprule",
            rf" & {heads} \\",
            rf" & {' & '.join(METRICS * len(protocols))} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def comma_separated(lines: Sequence[Line], protocols: Sequence[str]) -> str:
    """One number per line, for programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "protocol", "metric", "mean", "std", "runs", "paper"])
    for line in lines:
        for i, score in enumerate(line.scores):
            for name, paper in zip(METRICS, _paper(line, i), strict=True):
                numbers = score.values[name], score.spread[name], score.trials, paper
                writer.writerow([line.label, score.protocol, name, *numbers])
    return text.getvalue().rstrip()


def _check(base: Config, method: str) -> list[str]:
    """The protocols that the tables show, or a `UserError` where nothing could be trained or scored."""
    if base.method.name != method:
        raise UserError(
            f"method.name: this table varies the settings of {method}, got {base.method.name}; give a configuration of {method}"
        )
    if method == "salcr" and len(base.train.stages) < 2:
        raise UserError("train.stages: one stage trains the baseline alone; give a second one, in which SALCR begins")
    dataset = data.read(base.data)  # the demo is drawn here, once for all runs
    if dataset.test is None:
        raise UserError(f"{dataset.name}: has no query/ and gallery/ to score on")
    return [protocol.name for protocol in dataset.protocols if "multi-shot" not in protocol.name]


def _papers_data(base: Config) -> str:
    """The data set whose published numbers may stand beside ours."""
    return "" if base.data.also or base.data.split != "test" else base.data.name


def _explain(seeds: range, lines: Sequence[Line]) -> str:
    """What the numbers are."""
    if len(seeds) > 1:
        text = f"mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}, percent"
    else:
        text = f"seed {seeds[0]}, percent"
    if any(line.paper for line in lines):
        text += "; in brackets the paper's numbers"
    if any("CMFP(te)" in line.label for line in lines):
        text += ". CMFP(te) looks at all queries at once: compare such rows with each other only"
    return f"{text}."


def _columns(protocols: Sequence[str]) -> list[str]:
    return [f"{protocol} {METRICS[0]}" if i == 0 else name for protocol in protocols for i, name in enumerate(METRICS)]


def _paper(line: Line, protocol: int) -> Numbers:
    begin = len(METRICS) * protocol
    return tuple(line.paper[i] if i < len(line.paper) else None for i in range(begin, begin + len(METRICS)))


def _cells(line: Line, protocols: Sequence[str]) -> list[str]:
    if not line.scores:
        return ["failed"] * (len(METRICS) * len(protocols))
    return [
        f"{score.values[name]:.2f}"
        + (f" ± {score.spread[name]:.2f}" if score.trials > 1 else "")
        + (f" ({paper:.2f})" if paper is not None else "")
        for i, score in enumerate(line.scores)
        for name, paper in zip(METRICS, _paper(line, i), strict=True)
    ]


if __name__ == "__main__":
    run_tool(main)
