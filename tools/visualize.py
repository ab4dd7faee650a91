"""Pictures of runs: what their networks find and where they look, their pseudo-labels, curves and times.

python tools/visualize.py RUN [--only rankings,curves] [--format svg] [--rerank cmfp] [--set data.root=PATH]
python tools/visualize.py RUN RUN ... --out DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from engine import analysis, checkpoint, folders, pictures, runs
from engine.analysis import Bars, Chart, Subject
from engine.errors import UserError, run_tool
from engine.runs import Record


@dataclass(frozen=True)
class Choice:
    """What of the test images is shown.

    Attributes:
        checkpoint: its name in the run folder.
        overrides: "a.b=c" changes of settings.
        rerank: of the ranking lists, as `engine.rerank.Rerank.parse` takes it; "" = none.
        protocol: whose ranking lists; "" = the main one.
        queries: ranking lists; identities: in an embedding.
    """

    checkpoint: str = "last"
    overrides: tuple[str, ...] = ()
    rerank: str = ""
    protocol: str = ""
    queries: int = 6
    identities: int = 12
    seed: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*TOGETHER, *NETWORK, *LOGGED)
    add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="of the pictures (default, of one run: RUN/pictures)")
    parser.add_argument("--only", metavar="NAMES", default="", help=f"with commas; default: all of {', '.join(known)}")
    parser.add_argument("--format", choices=pictures.FORMATS, default="png", help="of the files (default: png)")
    parser.add_argument("--dpi", type=int, default=150, help="pixels per inch of png and webp (default: 150)")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else known
    if set(wanted) - set(known):
        parser.error(f"--only: expected some of {', '.join(known)}, got {arguments.only}")
    if arguments.dpi < 1:
        parser.error(f"--dpi: expected at least 1, got {arguments.dpi}")
    if not arguments.out and len(arguments.runs) > 1:
        parser.error("--out: name a folder for the pictures of several runs")
    pictures.demand_matplotlib()  # rather now than after the work
    records, choice = runs.read([Path(run) for run in arguments.runs]), chosen(parser, arguments)
    out = Path(arguments.out or records[0].folder / "pictures")
    made = 0
    for name, run, found in collect(records, choice, wanted):
        if isinstance(found, UserError):
            if arguments.only:
                raise UserError(f"{name} of {run}: {found}")
            print(f"left out: {name} of {run}: {found}")
            continue
        prefix = f"{run.replace('/', '-')}-" if name not in TOGETHER and len(records) > 1 else ""
        file = out / f"{prefix}{name}.{arguments.format}"
        folders.make(out)
        content = pictures.encode(pictures.draw(found), arguments.format, arguments.dpi)
        checkpoint.write(file, content, "make room or choose another folder by --out")
        print(file)
        made += 1
    if not made:
        raise UserError("no picture could be made, for the reasons above")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all tools that draw runs are told; `chosen` reads it."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder")
    add("--checkpoint", default="last", metavar="NAME", help="last (default), best, stage1, ...")
    add(
        "--set", metavar="A.B=C", action="append", default=[], help="change one setting, such as data.root, of all runs"
    )
    add(
        "--rerank",
        metavar="NAME[:K,...]",
        default="",
        help="re-rank the ranking lists: cmfp, cmrr:25, aim, k-reciprocal",
    )
    add("--protocol", metavar="NAME", default="", help="of the ranking lists (default: the main one)")
    add("--queries", type=int, default=6, metavar="N", help="ranking lists; up to half are failures (default: 6)")
    add("--identities", type=int, default=12, metavar="N", help="in the embedding (default: 12)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn by lot (default: 0)")


def chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Choice:
    """The choice that the command line makes."""
    for name, least in (("queries", 1), ("identities", 2), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(arguments, name)}")
    return Choice(
        arguments.checkpoint,
        tuple(arguments.set),
        arguments.rerank,
        arguments.protocol,
        arguments.queries,
        arguments.identities,
        arguments.seed,
    )


def collect(records: Sequence[Record], choice: Choice, wanted: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Name, run and content of every picture, or a `UserError` that says why there is none; the common ones first."""
    for name, find in TOGETHER.items():
        if name in wanted:
            yield name, ", ".join(record.name for record in records), _attempt(find, records)
    for record in records:
        subject = Subject(record.folder, choice.checkpoint, choice.overrides)
        for name, show in (NETWORK | LOGGED).items():
            if name in wanted:
                yield name, record.name, _attempt(show, record, subject, choice)


def _attempt(find: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return find(*arguments)
    except UserError as error:
        return error


TOGETHER: dict[str, Callable[[Sequence[Record]], list[Chart]]] = {
    "curves": analysis.curves,
    "labels": analysis.labels,
    "sizes": lambda records: [analysis.sizes(records)],
}
NETWORK: dict[str, Callable[[Record, Subject, Choice], Any]] = {
    "rankings": lambda _, subject, choice: analysis.rankings(
        subject, choice.rerank, choice.protocol, choice.queries, seed=choice.seed
    ),
    "embedding": lambda _, subject, choice: analysis.embedding(subject, choice.identities, choice.seed),
    "distances": lambda _, subject, choice: analysis.distances(subject),
    "attention": lambda _, subject, choice: analysis.attention(subject, seed=choice.seed),
}
LOGGED: dict[str, Callable[[Record, Subject, Choice], list[Bars]]] = {
    "events": lambda record, *_: analysis.events(record),
    "phases": lambda record, *_: [analysis.phases(record)],
}


if __name__ == "__main__":
    run_tool(main)
