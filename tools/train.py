"""Train by a configuration.

python tools/train.py --cfg demo.yaml [--set a.b=c ...] [--out DIR]
python tools/train.py --resume RUN
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from engine import checkpoint, config, distributed, methods, report, runs
from engine.errors import command, run_tool
from engine.stopping import Stopped
from engine.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train by a configuration. The run folder gets the settings, a log, metrics and checkpoints.",
        epilog="Configurations: " + ", ".join(sorted(path.name for path in config.CONFIGS.glob("*.yaml"))),
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="NAME", help="a YAML file, or the name of one that comes with the engine")
    what.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, from its folder")
    parser.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="change one setting (again for more)"
    )
    parser.add_argument("--out", metavar="DIR", default="", help="run folder (default: runs/<cfg>-seed<seed>)")
    arguments = parser.parse_args()
    if arguments.resume and arguments.out:
        parser.error("--out does not go with --resume: the run stays in its folder")
    with distributed.joined():
        return train(arguments)


def train(arguments: argparse.Namespace) -> int:
    """One run, alone or with the other processes that torchrun started."""
    if arguments.resume:
        settings, folder = runs.reopen(arguments.resume, arguments.set)
    else:
        settings = config.load(arguments.cfg, arguments.set)
        folder = distributed.from_main(runs.choose(settings, Path(arguments.cfg).stem, arguments.out))
    try:
        trainer = Trainer(settings, folder, resume=bool(arguments.resume))
        if distributed.is_main():
            print(f"run folder: {folder}")
        rows = trainer.run()
    except Stopped as stop:
        if checkpoint.exists(folder):
            name = settings.method.name
            consent = "" if name in methods.BUILT_IN else f" --set method.name={name}"
            remedy = f"go on with: {command('train')} --resume {folder}{consent}"
        else:
            remedy = (
                "there is no checkpoint yet. What was drawn or decoded to its end stays, what the network learned is lost; the "
                "same command starts again"
            )
        if distributed.is_main():
            print(f"\nstopped; {remedy}", file=sys.stderr)
        sys.exit(stop.code)
    if distributed.is_main():
        results = f"\n{report.table(rows)}\n\nin {folder}/results.md"
        print(results if rows else f"\ndone; the network is in {folder}/last.pt")
    return 0


if __name__ == "__main__":
    run_tool(main)
