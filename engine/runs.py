"""Run folders: what was run, with which settings, on what."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint, info
from engine.config import Config, differences, load, parse, to_dict
from engine.errors import UserError

# Settings that a resumed run may change: they say where and how fast it runs, not what it computes.
MOVABLE = (
    "device",
    "data.root",
    "data.also.*.root",
    "data.cache",
    "data.workers",
    "train.checkpoint_steps",
    "train.features",
    "tensorboard",
)


def choose(config: Config, name: str, out: str = "") -> Path:
    """The folder for a new run; nothing is made yet.

    Args:
        name: of the configuration; names the folder when `out` is empty: runs/<name>-seed<seed>, numbered if taken.

    Raises:
        UserError: `out` holds a run already.
    """
    if out:
        if (Path(out) / "last.pt").exists():
            raise UserError(
                f"--out {out}: holds a run already; go on with it by --resume {out}, or choose another folder"
            )
        return Path(out)
    folder, number = Path("runs") / f"{name}-seed{config.seed}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-seed{config.seed}-{number}"
    return folder


def create(folder: Path, config: Config) -> None:
    """Make a run folder with config.yaml and environment.json.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder by --out") from error
    checkpoint.write(folder / "environment.json", json.dumps(environment(config.seed), indent=2).encode())
    checkpoint.write(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def reopen(run: str, overrides: list[str]) -> tuple[Config, Path]:
    """The folder of an interrupted run, and its configuration with the settings that may change.

    Raises:
        UserError: no such run, nothing to resume from, or another setting than `MOVABLE` changed.
    """
    folder = Path(run)
    if folder.suffix == ".pt":
        folder = folder.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume {run}: not a run folder (it has no config.yaml)")
    if not (folder / "last.pt").is_file():
        raise UserError(f"--resume {run}: it was stopped before its first checkpoint; start it anew, without --resume")
    saved = to_dict(parse(checkpoint.load(folder / "last.pt")["config"]))
    config = load(str(folder / "config.yaml"), overrides)
    changed = fixed_differences(saved, to_dict(config))
    if changed:
        raise UserError(
            f"--resume {run}: the checkpoint was made with other settings ({'; '.join(changed)}). A resumed run may "
            f"change {', '.join(MOVABLE)} only; undo the change, or start a new run"
        )
    return config, folder


def fixed_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "a.b: old -> new" for the settings that make two runs different ones: all but `MOVABLE`."""
    return [line for line in differences(old, new) if not _is_movable(line.split(":")[0])]


def movable_overrides(config: Config) -> list[str]:
    """The settings that a resumed run may change, "a.b=c" each."""

    def walk(value: Any, path: str) -> Iterator[str]:
        if _is_movable(path):
            yield f"{path}={json.dumps(value)}"
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from walk(item, f"{path}.{key}".lstrip("."))

    return list(walk(to_dict(config), ""))


def _is_movable(path: str) -> bool:
    return any(fnmatch(path, name) for name in MOVABLE)


def environment(seed: int) -> dict[str, Any]:
    """Versions, commit and machine, for environment.json."""
    return {
        "command": shlex.join(sys.argv),
        "commit": info.commit(),
        "versions": info.versions(),
        "devices": info.devices(),
        "system": platform.platform(),
        "seed": seed,
    }
