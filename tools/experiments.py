"""Many runs as one experiment: each in a folder of its own, trained once, gone on with, several side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine import checkpoint, config, runs, stopping
from engine.config import Config, to_dict
from engine.errors import UserError
from engine.evaluate import Score, summary
from engine.trained import evaluate_checkpoint


@dataclass(frozen=True)
class Run:
    """One run that an experiment wants.

    Attributes:
        folder: of this run alone.
        config: its settings.
        after: the run whose folder `config.train.start_from` names, to be finished first.
    """

    folder: Path
    config: Config
    after: Run | None = None


def train(wanted: Sequence[Run], jobs: int = 1) -> dict[Path, str]:
    """Finish all runs, `jobs` at once, each in a process of its own with its share of the cores.

    A folder that several runs name is trained once. Finished runs are kept, interrupted ones go on from their last
    checkpoint. One that fails does not stop the others. Progress goes to stderr, what a run prints to its output.txt.

    Returns:
        By folder, why a run failed.

    Raises:
        UserError: a folder holds a run with other settings; nothing has been started then.
    """
    unfinished = [run for run in wanted if not is_finished(run)]
    needed = [one for run in unfinished for one in (run.after, run) if one is not None and not is_finished(one)]
    waiting = {run.folder: run for run in needed}
    threads = max(1, torch.get_num_threads() // jobs)
    running: dict[Path, tuple[subprocess.Popen[bytes], float]] = {}
    failed: dict[Path, str] = {}
    try:
        while waiting or running:
            for folder, run in list(waiting.items()):
                before = run.after.folder if run.after else None
                if before in failed:
                    failed[folder] = f"it starts from {before}, which failed"
                    del waiting[folder]
                elif len(running) < jobs and before not in {*waiting, *running}:
                    del waiting[folder]
                    _say(f"{'going on' if checkpoint.exists(folder) else 'started'}: {folder}")
                    try:
                        running[folder] = _start(run, threads), time.monotonic()
                    except UserError as error:  # another process is at work in it, for one
                        failed[folder] = str(error)
            for folder, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[folder]
                if process.returncode in (130, 143):
                    raise KeyboardInterrupt
                if process.returncode:
                    failed[folder] = _reason(folder, process.returncode)
                word = "failed" if folder in failed else "finished"
                left = len(waiting) + len(running)
                _say(f"{word} after {time.monotonic() - began:.0f} s, {left} more to go: {folder}")
            if running:
                time.sleep(0.1)
    finally:
        for process, _ in running.values():  # they save the step that they are in
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


def is_finished(run: Run) -> bool:
    """Whether the folder holds this run, trained to its end.

    Raises:
        UserError: it holds a run with other settings.
    """
    if not (run.folder / "config.yaml").is_file():
        return False
    saved, wanted = to_dict(config.load(str(run.folder / "config.yaml"))), to_dict(run.config)
    if run.after:  # an experiment's folder may be moved as a whole
        for content in (saved, wanted):
            content["train"]["start_from"] = Path(content["train"]["start_from"]).name
    changed = runs.fixed_differences(saved, wanted)
    if changed:
        raise UserError(
            f"{run.folder}: holds a run with other settings ({'; '.join(changed)}); choose another folder by --out, "
            "or move that run away"
        )
    return (run.folder / "results.md").is_file()


def scores(run: Run, rerank: Sequence[str] = ()) -> list[Score]:
    """The scores of a finished run's last epoch.

    Args:
        rerank: re-rankings, as `engine.rerank.Rerank.parse` takes them, to score its last network by instead; done once and
            kept in the folder's scores.json.
    """
    if not rerank:
        return [Score(**score) for score in json.loads(_lines(run.folder / "metrics.jsonl")[-1])["scores"]]
    file = run.folder / "scores.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    key = " ".join(rerank)
    if key not in known:
        _say(f"scoring by {key}: {run.folder}")
        fresh = evaluate_checkpoint(run.folder / "last.pt", runs.movable_overrides(run.config), rerank)
        known[key] = [asdict(score) for score in fresh]
        checkpoint.write(file, json.dumps(known, indent=2).encode())
    return [Score(**score) for score in known[key]]


def best_scores(run: Run) -> list[Score]:
    """The scores of a finished run's best epoch, as `best.pt` is chosen: by the main protocol's mAP on the test images."""
    rows = [json.loads(line)["scores"] for line in _lines(run.folder / "metrics.jsonl")]
    best = max((scores for scores in rows if scores), key=lambda scores: scores[0]["values"]["mAP"])
    return [Score(**score) for score in best]


def average(found: Sequence[Sequence[Score]]) -> list[Score]:
    """Mean and population standard deviation over runs, of the scores of each; `trials` counts the runs."""
    return [
        summary(rows[0].protocol, rows[0].rerank, [(row.values, row.queries) for row in rows])
        for rows in zip(*found, strict=True)
    ]


def _start(run: Run, threads: int) -> subprocess.Popen[bytes]:
    tool = [sys.executable, str(Path(__file__).parent / "train.py")]
    with runs.hold(run.folder):
        if checkpoint.exists(run.folder):
            what = [
                "--resume",
                str(run.folder),
                *(part for one in runs.movable_overrides(run.config) for part in ("--set", one)),
            ]
        else:
            runs.create(run.folder, run.config)
            what = ["--cfg", str(run.folder / "config.yaml"), "--out", str(run.folder)]
        (run.folder / "output.txt").write_bytes(b"")
    # In a session of its own Ctrl-C reaches it once, by this process; and it ends when this one does, however that is.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), stopping.PARENT: str(os.getpid())}
    with open(run.folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [*tool, *what],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _reason(folder: Path, code: int) -> str:
    said = _lines(folder / "output.txt")
    what = (
        f"killed by signal {-code}" if code < 0 else said[-1].removeprefix("error: ") if said else f"exit code {code}"
    )
    return f"{what} (all it printed: {folder}/output.txt)"


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(errors="replace").splitlines() if line.strip()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
