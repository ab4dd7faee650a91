"""Tables of scores over several runs, with a paper's numbers beside them: Markdown, LaTeX, CSV; and how to ask for them."""

from __future__ import annotations

import csv
import io
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from ablate_tables import Numbers

from engine import report
from engine.config import Config
from engine.evaluate import Score

METRICS = ("R1", "mAP", "mINP")


def parse(parser: ArgumentParser, out: str, seeds: int, what: str) -> Namespace:
    """The command line of a tool that trains several runs and prints a table of them.

    Args:
        out: where the run folders go unless told; seeds: how many runs; what: which these are.
    """
    parser.add_argument("--cfg", required=True, metavar="NAME", help="a YAML file, or one that comes with the engine")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"{what} (default: {seeds})")
    parser.add_argument("--out", default=out, metavar="DIR", help=f"of the run folders (default: {out})")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting in all runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; they share the cores")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--latex", action="store_const", dest="form", const=latex, help="print a LaTeX tabular")
    form.add_argument("--csv", action="store_const", dest="form", const=comma_separated, help="print numbers only")
    arguments = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    return arguments


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


def published(base: Config) -> str:
    """The data set whose published numbers may stand beside ours, or ""."""
    return "" if base.data.also or base.data.split != "test" else base.data.name


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
