"""Kill runs without warning at random moments, resume them, and look whether anything was lost.

python tests/kill_runs.py --runs 20 --cfg demo.yaml [--set a.b=c ...] [--seed 0] [--out DIR]

Two runs are left alone and have to be equal. Every other one is killed by SIGKILL once, at a moment that the seed chooses: of
two runs one at a part of the time that a whole run takes, the other while it writes a file. It is then resumed, or started
again where it was killed before its first checkpoint, and has to end with the metrics, weights and memories of the first ones,
bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from engine import checkpoint
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WRITES = (".last.pt.part", ".best.pt.part", ".previous.pt.part", ".config.yaml.part", ".results.md.part")


@dataclass(frozen=True)
class Kill:
    """What one kill met.

    Attributes:
        moment: "at 2.3 s", or "writing last.pt".
        state: the epoch and the step that the last checkpoint held, or "no checkpoint".
        problem: what differs from the runs that were left alone; "" for nothing.
    """

    moment: str
    state: str
    problem: str


class Starter:
    """Starts `tools/train.py` in processes of their own, forked from one that has imported the engine already."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["engine.trainer"])

    def __call__(self, output: Path, *arguments: object) -> BaseProcess:
        process = self.context.Process(target=_train, args=(str(output), [str(one) for one in arguments]))
        process.start()
        return process


def _train(output: str, arguments: list[str]) -> None:
    """What the process does: the tool, with what it prints in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")


def measure(start: Starter, out: Path, new: Sequence[object], runs: int, seed: int) -> Iterator[Kill]:
    """Kill `runs` runs, resume each, and compare; `new` are the arguments of a new run but for its folder."""
    seconds = 0.0
    for name in ("first", "second"):  # the first also draws and decodes what all of them read
        begun = time.monotonic()
        _finish(start(out / f"{name}.txt", *new, "--out", out / name), out / f"{name}.txt")
        seconds = time.monotonic() - begun
    expected = outcome(out / "first")
    if outcome(out / "second") != expected:
        raise UserError(f"{out}: two runs that were left alone differ; use a CPU, one thread and settings that repeat")
    generator = random.Random(seed)
    for number in range(runs):
        folder, printed, moment = out / f"killed{number}", out / f"killed{number}.txt", ""
        while not moment:  # it had ended before
            shutil.rmtree(folder, ignore_errors=True)
            process = start(printed, *new, "--out", folder)
            moment = (
                _kill_writing(process, folder, generator) if number % 2 else _kill_after(process, seconds, generator)
            )
        state = held(folder)
        if checkpoint.exists(folder):
            _finish(start(printed, "--resume", folder), printed)
        else:
            _finish(start(printed, *new, "--out", folder), printed)
        found = outcome(folder)
        problem = ", ".join(f"another {name}" for name in expected if found[name] != expected[name])
        if not problem:
            shutil.rmtree(folder)
        yield Kill(moment, state, problem)


def outcome(folder: Path) -> dict[str, str]:
    """What a finished run comes to: its metrics but for times, its table, and the hashes of what it learned."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("epoch", "stage", "lr", "labels", "labels_kept", "losses", "scores")
    content = checkpoint.load(folder / "last.pt")
    found = {"metrics": json.dumps([{name: row[name] for name in names} for row in rows])}
    found["table"] = (folder / "results.md").read_text()
    for part in ("network", "memories"):
        digest = hashlib.sha256()
        for name, value in sorted(content[part].items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        found[part] = digest.hexdigest()
    return found


def held(folder: Path) -> str:
    """The epoch and the step of the checkpoint from which a run goes on."""
    if not checkpoint.exists(folder):
        return "no checkpoint"
    content, path = checkpoint.latest(folder)
    return f"epoch {content['epoch'] + 1}, step {content['step']}" + (f" ({path.name})" if path.stem != "last" else "")


def _kill_after(process: BaseProcess, seconds: float, generator: random.Random) -> str:
    """Kill at a part of the time that a whole run takes."""
    after = generator.random() * seconds
    process.join(after)
    if process.exitcode is not None:
        return ""
    _kill(process)
    return f"at {after:.1f} s"


def _kill_writing(process: BaseProcess, folder: Path, generator: random.Random) -> str:
    """Kill while it writes the n-th file under another name, or when it has just put it in its place."""
    left, before = generator.randrange(1, 16), ""
    while process.exitcode is None:
        now = next((name for name in WRITES if (folder / name).exists()), "")
        if now and now != before:
            left -= 1
        before = now
        if now and not left:
            time.sleep(generator.random() * 0.005)
            _kill(process)
            return f"writing {now[1:].removesuffix('.part')}"
    return ""


def _kill(process: BaseProcess) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def _finish(process: BaseProcess, printed: Path) -> None:
    process.join()
    if process.exitcode:
        raise UserError(f"the run ended with code {process.exitcode}: {printed.read_text()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="runs to kill (default: 20)")
    parser.add_argument("--cfg", default="demo.yaml", metavar="NAME", help="the configuration (default: demo.yaml)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", default="runs/killed", metavar="DIR", help="a new folder (default: runs/killed)")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True)
    new = ["--cfg", arguments.cfg, *(part for one in arguments.set for part in ("--set", one))]
    kills = []
    for kill in measure(Starter(), out, new, arguments.runs, arguments.seed):
        kills.append(kill)
        print(
            f"{len(kills)}. killed {kill.moment}, resumed from {kill.state}: {kill.problem or 'the same'}", flush=True
        )
    lost = sum(bool(kill.problem) for kill in kills)
    print(f"{len(kills)} runs killed, {lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
