"""What a person sees: one readable block per epoch, tables of results, and the same numbers as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine import checkpoint, distributed
from engine.errors import UserError
from engine.evaluate import RANKS, Score
from engine.evolve import EVENTS
from engine.features import NAMES


def peak_memory(device: torch.device) -> float:
    """Largest memory taken so far, in MiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Log:
    """`log.txt` for people and `metrics.jsonl` for programs, in the run folder; TensorBoard's events if wanted.

    Of several processes the main one alone writes.

    Args:
        folder: exists.
        keep: epochs already finished; later lines of `metrics.jsonl`, left by an interrupted epoch, are dropped.
        tensorboard: write events too.

    Raises:
        UserError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, keep: int = 0, tensorboard: bool = False) -> None:
        self.text, self.metrics = folder / "log.txt", folder / "metrics.jsonl"
        self.events: Any = None
        if not distributed.is_main():
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError('tensorboard: not installed; run: pip install "vireid-engine[tb]"') from error
            self.events = SummaryWriter(str(folder), purge_step=keep + 1)
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_bytes().splitlines() if 0 < _epoch(line) <= keep]
            checkpoint.write(self.metrics, b"".join(line + b"\n" for line in lines))
        if self.text.exists() and not self.text.read_bytes().endswith(b"\n"):
            self._append(self.text, "")  # a crash cut the last line short

    def say(self, text: str) -> None:
        """Append to log.txt, and print as long as somebody reads it: a run does not end with the `| tee` behind it."""
        if not distributed.is_main():
            return
        self._append(self.text, text)
        with suppress(BrokenPipeError):
            tqdm.write(text)

    def record(self, row: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl."""
        if not distributed.is_main():
            return
        self._append(self.metrics, json.dumps(row))
        if self.events is not None:
            for group in ("labels", "losses", "seconds"):
                for name, value in row[group].items():
                    self.events.add_scalar(f"{group}/{name}", value, row["epoch"])
            for score in row["scores"]:
                for name, value in score["values"].items():
                    self.events.add_scalar(f"{score['protocol']} {score['rerank']}/{name}", value, row["epoch"])
            self.events.flush()

    def _append(self, path: Path, line: str) -> None:
        with checkpoint.explained(path), open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that survives a power cut finds its epochs here


def _epoch(line: bytes) -> int:
    """Of a line of metrics.jsonl; 0 for one that a crash damaged."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


def epoch_block(row: dict[str, Any]) -> str:
    """The block of one epoch, from its `metrics.jsonl` row."""
    lines = [f"epoch {row['epoch']}/{row['epochs']}  ·  stage {row['stage']}  ·  lr {row['lr']:.2g}"]
    labels = row["labels"]
    found = [
        f"{word} {labels[f'clusters.{name}']:.0f} ({labels[f'outliers.{name}']:.0f} outliers)"
        for name, word in NAMES.items()
        if f"clusters.{name}" in labels
    ]
    lines.append(f"  clusters   {'   '.join(found)}{'   kept from before' if row['labels_kept'] else ''}")
    quality = [
        f"{word} ARI {labels[f'ari.{name}']:.3f} AMI {labels[f'ami.{name}']:.3f}"
        for name, word in NAMES.items()
        if f"ari.{name}" in labels
    ]
    if "cross.precision" in labels:
        quality.append(f"cross P {100 * labels['cross.precision']:.1f} R {100 * labels['cross.recall']:.1f}")
    if quality:
        lines.append(f"  labels     {'   '.join(quality)}")
    if "births" in labels:
        lines.append("  memory     " + "   ".join(f"{name} {labels[name]:.0f}" for name in EVENTS))
    lines.append("  loss       " + "   ".join(f"{name} {value:.4f}" for name, value in row["losses"].items()))
    for score in row["scores"]:
        values = score["values"]
        text = "   ".join(f"{name} {values[name]:.2f}" for name in ("R1", "mAP", "mINP"))
        lines.append(f"  {score['protocol']}{' ' + score['rerank'] if score['rerank'] else ''}:   {text}")
    seconds = "   ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
    lines.append(
        f"  seconds    {seconds}   ·   {row['images_per_second']:.0f} images/s   ·   peak {row['peak_mib']:.0f} MiB"
    )
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, Score]]) -> str:
    """A Markdown table of scores, percent; ± is the standard deviation over galleries or splits where there are more.

    Where re-ranking was timed there is a column of its seconds per trial for the device.
    """
    columns = [f"R{rank}" for rank in RANKS] + ["mAP", "mINP"]
    devices = sorted({device for _, score in rows for device in score.seconds})
    cells = [["", "protocol", *columns, *(f"seconds ({device})" for device in devices)]]
    for label, score in rows:
        numbers = [
            f"{score.values[name]:.2f}" + (f" ± {score.spread[name]:.2f}" if score.trials > 1 else "")
            for name in columns
        ]
        seconds = [f"{score.seconds[device]:.3f}" if device in score.seconds else "" for device in devices]
        cells.append([label, score.protocol, *numbers, *seconds])
    return markdown(cells, left=2)


def markdown(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that also reads well as text; the first row is its head, the first `left` columns are words."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        text = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(text)} |"

    rule = "".join(
        "|" + "-" * (width + 2) if i < left else "|" + "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([line(cells[0]), f"{rule}|", *map(line, cells[1:])])
