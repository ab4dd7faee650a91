"""Run an ablation table of the SALCR or the FIRM paper, and print it with mean and standard deviation over seeds.

python tools/ablate.py --table 3 --cfg demo.yaml --seeds 3 [--jobs 2] [--out runs/ablate] [--set a.b=c ...]

Every cell, a row with one seed, is an ordinary run folder in --out. The same command again keeps finished cells and goes on
with interrupted ones; cells that rows or tables have in common are trained once. Stage 1 of SALCR, in which all rows are the
same, is a run of its own that the others start from.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import experiments
import score_table
from ablate_tables import TABLES, Table
from experiments import Run
from score_table import Line, markdown, published

from engine import config, data
from engine.config import Config
from engine.errors import UserError, run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = "; ".join(f"{name}: {table.title}" for name, table in TABLES.items())
    parser.add_argument("--table", required=True, choices=TABLES, metavar="TABLE", help=tables)
    arguments = score_table.parse(parser, "runs/ablate", 3, "runs per row, from `seed` on")
    table = TABLES[arguments.table]
    base = config.load(arguments.cfg, arguments.set)
    protocols = _check(base, table.method)
    seeds = range(base.seed, base.seed + arguments.seeds)
    rows = plan(table, arguments.cfg, arguments.set, seeds, Path(arguments.out))
    try:
        failed = experiments.train([run for row in rows for run in row], arguments.jobs)
        lines = collect(table, rows, failed, protocols, published(base))
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


if __name__ == "__main__":
    run_tool(main)
