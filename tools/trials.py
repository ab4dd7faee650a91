"""Train one configuration several times, and print means and standard deviations: RegDB's splits, or seeds.

python tools/trials.py --cfg regdb.yaml [--seeds 10] [--jobs 2] [--out runs/trials] [--set a.b=c ...] [--latex | --csv]

On RegDB the runs are those of its splits 1 to 10, whose mean is what papers print; on other data sets they have seeds, from
`seed` on. Every run is an ordinary run folder in --out. The same command again keeps finished runs and goes on with interrupted
ones; one that fails is named and the others go on.

The rows of the last epoch are the result. Those of the best epoch stand apart: each run's was chosen by its test scores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import experiments
import score_table
from ablate_tables import FIRM, SALCR, Numbers
from experiments import Run
from score_table import Line, markdown, published

from engine import config, data
from engine.config import Config
from engine.errors import UserError, run_tool
from engine.evaluate import Score

PAPERS: Mapping[str, tuple[str, Mapping[str, Numbers]]] = {
    "salcr": ("SALCR, Cheng et al., IJCV 2025", SALCR),
    "firm": (
        "FIRM, Rong et al., ACML 2025",
        {"sysu": FIRM.rows[-1].paper["sysu"], "regdb": (90.1, 84.2, None, 87.6, 81.2, None)},
    ),
}
"""Whose numbers, and the numbers as `ablate_tables.Row.paper` has them, by method."""
BEST = "best epoch, chosen on test scores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = score_table.parse(parser, "runs/trials", 10, "runs; of RegDB its first N splits")
    base = config.load(arguments.cfg, arguments.set)
    wanted = plan(base, arguments.cfg, arguments.set, arguments.seeds, Path(arguments.out))
    dataset = data.read(wanted[0].config.data)  # the demo is drawn here, once for all runs
    if dataset.test is None:
        raise UserError(f"{dataset.name}: has no query/ and gallery/ to score on")
    protocols = [protocol.name for protocol in dataset.protocols if "multi-shot" not in protocol.name]
    try:
        failed = experiments.train(wanted, arguments.jobs)
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on with it", file=sys.stderr)
        return getattr(stop, "code", 130)
    lines = collect([run for run in wanted if run.folder not in failed], protocols, *_paper(base))
    if arguments.form:
        print(arguments.form(lines, protocols))
    elif lines:
        print(f"{_explain(base, arguments.cfg, len(wanted) - len(failed), lines)}\n\n{markdown(lines, protocols)}")
    for folder, reason in failed.items():
        print(f"failed: {folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def plan(base: Config, name: str, overrides: Sequence[str], count: int, out: Path) -> list[Run]:
    """The runs: of RegDB's splits, or of seeds.

    Raises:
        UserError: RegDB has not so many splits.
    """
    if base.data.name == "regdb":
        if count > 10:
            raise UserError(f"--seeds: RegDB has 10 splits, got {count}")
        changes = {f"split{split}": f"data.trial={split}" for split in range(1, count + 1)}
    else:
        changes = {f"seed{seed}": f"seed={seed}" for seed in range(base.seed, base.seed + count)}
    stem = Path(name).stem
    return [Run(out / f"{stem}-{end}", config.load(name, [*overrides, change])) for end, change in changes.items()]


def collect(runs: Sequence[Run], protocols: Sequence[str], data_set: str, paper: Mapping[str, Numbers]) -> list[Line]:
    """The lines of the table: the last epoch plain and re-ranked, with the paper's numbers, then the best epochs likewise."""
    lines = []
    which: dict[str, Callable[[Run], list[Score]]] = {"last epoch": experiments.scores, BEST: experiments.best_scores}
    for label, scores in which.items() if runs else ():
        means = [score for score in experiments.average([scores(run) for run in runs]) if score.protocol in protocols]
        for rerank in dict.fromkeys(score.rerank for score in means):
            printed = paper.get(f"{data_set} {rerank.split(' ')[0]}".strip(), ()) if label != BEST else ()
            shown = [score for score in means if score.rerank == rerank]
            lines.append(Line(label + (f" + {rerank}" if rerank else ""), shown, printed))
    return lines


def _paper(base: Config) -> tuple[str, Mapping[str, Numbers]]:
    """The data set, and the published numbers of the method on it, if any."""
    data_set = published(base)
    return data_set, PAPERS.get(base.method.name, ("", {}))[1] if data_set else {}


def _explain(base: Config, name: str, count: int, lines: Sequence[Line]) -> str:
    """What the numbers are."""
    what = "splits of RegDB" if base.data.name == "regdb" else "seeds"
    text = f"{Path(name).name}: mean ± standard deviation over {count} {what}, percent"
    if any(line.paper for line in lines):
        text += f"; in brackets what is published ({PAPERS[base.method.name][0]})"
    if any(score.rerank for line in lines for score in line.scores):
        text += ". Re-ranked rows mostly look at all queries at once: compare them with each other only"
    return f"{text}."


if __name__ == "__main__":
    run_tool(main)
