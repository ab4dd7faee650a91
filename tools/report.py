"""One HTML page about runs, side by side: scores, settings, pictures, times. It opens from disk, without a network.

python tools/report.py RUN [RUN ...] [--out report.html] [--quick] [--rerank cmfp] [--set data.root=PATH]
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import visualize

from engine import checkpoint, folders, pictures, runs
from engine.analysis import Attention, Distances, Rankings
from engine.errors import UserError, run_tool
from engine.evaluate import RANKS
from engine.runs import Record

METRICS = (*(f"R{rank}" for rank in RANKS), "mAP", "mINP")
_TESTED = ("name", "split", "trial", "gallery", "query", "also")
"""Settings of `data` that decide what a score is of."""
_DPI = 110
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --pale: #f2f4f6; --line: #d4d8dc; --mark: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --pale: #23262b; --line: #3d4249; --mark: #7cc4ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
p { max-width: 60rem; }
.note { opacity: .8; font-size: .9rem; }
.missing { border-left: 4px solid var(--line); padding-left: .7rem; font-size: .9rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--pale); white-space: nowrap; }
td { overflow-wrap: normal; white-space: nowrap; }
.words td { min-width: 7rem; white-space: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-size: .85rem; padding: .2rem 0 .6rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.wide img { width: min(100%, var(--width)); min-width: min(44rem, var(--width)); }
summary { cursor: pointer; }
"""
SECTIONS = {
    "curves": ("Scores, losses, learning rate", "A dotted line is the end of a stage."),
    "labels": (
        "Pseudo-labels",
        (
            "Against true identities, which training never sees. ARI and AMI: 1 is perfect, 0 is chance. Of the "
            "visible-infrared pairs that share a label, precision is the part that shares an identity; of those that share "
            "an identity, recall is the part that shares a label."
        ),
    ),
    "sizes": ("Sizes of clusters", "How many images the clusters of the last epoch have."),
    "events": ("Events of the memory", "FIRM's clusters that were born, merged, split and retired, and the updates."),
    "rankings": (
        "Ranking lists",
        (
            "A solid frame and a tick are right answers, a dashed frame and a cross wrong ones; what the protocol hides "
            "from a query is left out. Failures are drawn on purpose, so that their share is larger than in the scores."
        ),
    ),
    "embedding": (
        "Embedding",
        "Test images; circles are visible, crosses infrared, numbers are identities. Distances between groups mean little.",
    ),
    "distances": ("Distances across the modalities", "All visible-infrared pairs of test images."),
    "attention": (
        "Where the network looks",
        (
            "Maps over test images: the length of the whole image's features or the attention of the class token, and the "
            "attention of each part within its stripe."
        ),
    ),
    "phases": (
        "Time",
        "Seconds of the phases of every epoch. An epoch that was resumed within has its second part only.",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    visualize.add_arguments(parser)
    parser.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument("--quick", action="store_true", help=f"leave out {', '.join(visualize.NETWORK)}")
    arguments = parser.parse_args()
    pictures.demand_matplotlib()  # rather now than after the work
    records, choice = runs.read([Path(run) for run in arguments.runs]), visualize.chosen(parser, arguments)
    wanted = [name for name in SECTIONS if not (arguments.quick and name in visualize.NETWORK)]
    shown: dict[str, list[tuple[str, Any]]] = {name: [] for name in wanted}
    for name, run, found in visualize.collect(records, choice, wanted):
        print(f"{name} of {run}{f': left out: {found}' if isinstance(found, UserError) else ''}", file=sys.stderr)
        shown[name].append((run, found))
    out = Path(arguments.out)
    folders.make(out.parent)
    checkpoint.write(out, page(records, shown).encode(), "make room or choose another file by --out")
    print(out)
    return 0


def page(records: Sequence[Record], shown: dict[str, list[tuple[str, Any]]]) -> str:
    """The page, with nothing outside it.

    Args:
        shown: by section, of each run what `visualize.collect` gives.
    """
    title = "Report: " + ", ".join(record.name for record in records)
    parts = {"runs": ("Runs", _glance(records)), "results": ("Results", _results(records))}
    for name, (heading, note) in SECTIONS.items():
        body = _missing(["left out by --quick"])
        if name in shown:
            body = _pictures(shown[name]) + (TABLES[name](shown[name]) if name in TABLES else "")
        parts[name] = (heading, f'<p class="note">{_text(note)}</p>{body}')
    parts["settings"] = ("Settings", _settings(records))
    parts["environment"] = ("Environment", _environment(records))
    links = "".join(f'<a href="#{name}">{_text(heading)}</a>' for name, (heading, _) in parts.items())
    body = "".join(
        f'<section id="{name}"><h2>{_text(heading)}</h2>{content}</section>'
        for name, (heading, content) in parts.items()
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{_text(title)}</h1><nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


def _glance(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        settings = record.settings
        last = record.epochs[-1] if record.epochs else {"epoch": 0, "epochs": "?"}
        seconds = sum(sum(row["seconds"].values()) for row in record.epochs)
        rows.append(
            [
                record.name,
                _at(settings, "method.name"),
                f"{_at(settings, 'data.name')}, {_at(settings, 'data.split')}",
                _at(settings, "model.backbone"),
                settings.get("seed"),
                f"{last['epoch']} of {last['epochs']}" + ("" if last["epoch"] == last["epochs"] else ", unfinished"),
                f"{seconds / 60:.1f}",
                str(record.folder),
            ]
        )
    return table(["run", "method", "data", "backbone", "seed", "epochs", "minutes", "folder"], rows, words=8)


def _results(records: Sequence[Record]) -> str:
    last = {record.name: row for record in records for row in record.epochs if row["scores"]}
    reasons = [f"{record.name}: no epoch has scores" for record in records if record.name not in last]
    data = {record.name: json.dumps([_at(record.settings, f"data.{name}") for name in _TESTED]) for record in records}
    found = [(data[name], name, row["epoch"], score) for name, row in last.items() for score in row["scores"]]
    parts = []
    for heading, chosen in (
        ("Plain", [one for one in found if not one[3]["rerank"]]),
        ("Re-ranked: never to be compared with plain rows", [one for one in found if one[3]["rerank"]]),
    ):
        if chosen:
            parts += [f"<h3>{heading}</h3>", _score_table(chosen)]
    note = (
        '<p class="note">Percent, of the last epoch that was scored; ± is the standard deviation over galleries; bold is the '
        "best of several runs that are tested on the same data.</p>"
    )
    parts += ["<h3>On the way there: main protocol, plain</h3>", _milestones(records)]
    return (note if found else "") + "".join(parts) + _missing(reasons)


def _score_table(found: Sequence[tuple[str, str, int, dict[str, Any]]]) -> str:
    """Rows of one protocol under each other, the best of several runs on the same data bold."""
    groups: dict[tuple[str, str, str], list[tuple[str, int, dict[str, Any]]]] = {}
    for data, run, epoch, score in found:
        groups.setdefault((score["protocol"], score["rerank"], data), []).append((run, epoch, score))
    rows: list[list[Any]] = []
    for (protocol, rerank, _), group in groups.items():
        best = {name: max(score["values"][name] for *_, score in group) for name in METRICS}
        for run, epoch, score in group:
            cells = []
            for name in METRICS:
                value, spread = score["values"][name], score["spread"][name]
                text = f"{value:.2f} ± {spread:.2f}" if score["trials"] > 1 else f"{value:.2f}"
                cells.append(Bold(text) if len(group) > 1 and value == best[name] else text)
            rows.append([f"{protocol} + {rerank}" if rerank else protocol, run, epoch, *cells])
    return table(["protocol", "run", "epoch", *METRICS], rows, words=2)


def _milestones(records: Sequence[Record]) -> str:
    """Scores of the untrained network, of the stages' ends and of the best epoch, which only checkpoints have."""
    rows, reasons = [], []
    for record in records:
        try:
            content = checkpoint.load(record.folder / "last.pt")
        except UserError as error:
            reasons.append(f"{record.name}: {error}")
            continue
        best = content.get("best")
        marks = content.get("milestones", []) + (
            [[f"best epoch ({best[0]}), chosen on these scores", best[1]]] if best else []
        )
        if not marks:
            reasons.append(f"{record.name}: has no test images with identities")
        rows += [
            [record.name, name, *(f"{scores[0]['values'][metric]:.2f}" for metric in METRICS)] for name, scores in marks
        ]
    return (table(["run", "", *METRICS], rows, words=2) if rows else "") + _missing(reasons)


def _pictures(found: Sequence[tuple[str, Any]]) -> str:
    """What runs have of one kind, side by side, and why others have it not."""
    cells, reasons, wide = [], [], False
    for run, content in found:
        if isinstance(content, UserError):
            reasons.append(f"{run}: {content}")
            continue
        wide = isinstance(content, (Rankings, Attention))
        figures = [_figure([one] if isinstance(content, list) else one, one.caption, wide) for one in _listed(content)]
        cells += figures if len(found) == 1 else [f"<div><h3>{_text(run)}</h3>{''.join(figures)}</div>"]
    body = "".join(cells) if wide else f'<div class="grid">{"".join(cells)}</div>'
    return body + _missing(reasons)


def _figure(content: Any, caption: str, wide: bool) -> str:
    """One picture: lines as vectors, photographs as pixels in a box of their own that scrolls."""
    kind, mime = ("webp", "image/webp") if wide else ("svg", "image/svg+xml")
    figure = pictures.draw(content, titled=False)
    data = base64.b64encode(pictures.encode(figure, kind, _DPI)).decode()
    width = f' style="--width: {_DPI * figure.get_figwidth():.0f}px"' if wide else ""
    image = f'<img src="data:{mime};base64,{data}" alt="{_text(caption)}"{width}>'
    if isinstance(content, list):  # a chart says it all
        return f"<figure>{image}</figure>"
    box = f'<div class="scroll wide" tabindex="0">{image}</div>' if wide else image
    return f"<figure>{box}<figcaption>{_text(caption)}</figcaption></figure>"


def _distance_table(found: Sequence[tuple[str, Any]]) -> str:
    rows = [
        [run, *(f"{n:,}" for n in one.counts), *(f"{mean:.3f}" for mean in one.means), f"{100 * one.overlap:.1f}"]
        for run, one in found
        if isinstance(one, Distances)
    ]
    head = ["run", "pairs of one identity", "of two", "mean distance of one", "of two", "overlap, percent"]
    return table(head, rows, words=1) if rows else ""


def _phase_table(found: Sequence[tuple[str, Any]]) -> str:
    times = {run: content[0].parts for run, content in found if not isinstance(content, UserError)}
    names = list(dict.fromkeys(name for parts in times.values() for name in parts))
    totals = {run: sum(map(sum, parts.values())) for run, parts in times.items()}
    rows: list[list[Any]] = []
    for name in names:
        sums = {run: sum(parts.get(name, [])) for run, parts in times.items()}
        rows.append([name, *(f"{sums[run]:.1f} ({100 * sums[run] / max(totals[run], 1e-9):.0f} %)" for run in times)])
    rows.append(["all", *(f"{total:.1f}" for total in totals.values())])
    return table(["seconds of all epochs", *times], rows, words=1) if times else ""


TABLES: dict[str, Callable[[Sequence[tuple[str, Any]]], str]] = {"distances": _distance_table, "phases": _phase_table}


def _settings(records: Sequence[Record]) -> str:
    columns = [dict(_flat(record.settings)) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = ["setting", *(record.name for record in records)]
    rows = [[name, *(column.get(name, "not there") for column in columns)] for name in names]
    whole = f"<details><summary>All settings</summary>{table(head, rows)}</details>"
    if len(records) == 1:
        return whole
    differing = [
        [f"{name} (where and how fast it runs)" if runs.is_movable(name) else name, *values]
        for name, *values in rows
        if len(set(values)) > 1
    ]
    return (table(head, differing) if differing else "<p>All settings are the same.</p>") + whole


def _environment(records: Sequence[Record]) -> str:
    columns = [dict(_flat(record.environment)) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    reasons = [f"{record.name}: has no environment.json" for record in records if not record.environment]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return (table(["", *(record.name for record in records)], rows) if rows else "") + _missing(reasons)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with its value, "a.b.0" and as JSON or text."""
    nested = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if isinstance(value, dict) or nested:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, default=str)


def _at(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


class Bold(str):
    """A table's cell that stands out."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int | None = None) -> str:
    """A table in a box of its own that scrolls; all columns but the first `words` are numbers (default: none is)."""
    kinds = ["" if words is None or i < words else ' class="number"' for i in range(len(head))]

    def cell(kind: str, value: Any) -> str:
        text = _text("" if value is None else str(value))
        return f"<td{kind}><b>{text}</b></td>" if isinstance(value, Bold) else f"<td{kind}>{text}</td>"

    names = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    body = "".join(f"<tr>{''.join(map(cell, kinds, row))}</tr>" for row in rows)
    words_only = ' class="words"' if words is None else ""
    return f'<div class="scroll" tabindex="0"><table{words_only}><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _missing(reasons: Iterable[str]) -> str:
    return "".join(f'<p class="missing">Not shown: {_text(reason)}</p>' for reason in reasons)


def _text(text: str) -> str:
    return html.escape(text)


if __name__ == "__main__":
    run_tool(main)
