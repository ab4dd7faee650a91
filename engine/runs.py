"""Run folders: what was run, with which settings, on what."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint, folders, info, methods
from engine.config import Config, differences, override, parse, read_file, to_dict
from engine.errors import UserError

_KEYS = ("epoch", "epochs", "stage", "lr", "labels", "losses", "scores", "seconds")
# Settings that a resumed run may change: they say where and how fast it runs, not what it computes.
MOVABLE = (
    "device",
    "data.root",
    "data.also.*.root",
    "data.cache",
    "data.max_pixels",
    "data.workers",
    "deterministic",
    "memory.shard",
    "train.accumulate",
    "train.checkpoint_steps",
    "train.features",
    "tensorboard",
)


@dataclass(frozen=True)
class Record:
    """What a run folder tells without its network.

    Attributes:
        name: the folder's, as short as tells it from the others that it was read with.
        settings: of config.yaml.
        environment: of environment.json; empty where there is none.
        epochs: the lines of metrics.jsonl.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]


def read(places: Sequence[Path]) -> list[Record]:
    """The records of some run folders, finished or not.

    Raises:
        UserError: one is not a run folder, is given twice, or has a damaged file.
    """
    return [_read(folder, name) for folder, name in zip(places, _names(places), strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    places = [place.resolve() for place in places]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place}: given {places.count(place)} times; name every run once")
    names = [""] * len(places)
    for depth in range(1, 1 + max((len(place.parts) for place in places), default=0)):
        shorter = ["/".join(place.parts[-depth:]) for place in places]
        names = [
            name or (short if shorter.count(short) == 1 else "") for name, short in zip(names, shorter, strict=True)
        ]
    return names


def _read(folder: Path, name: str) -> Record:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (it has no config.yaml)")
    settings, file = read_file(folder / "config.yaml"), folder / "environment.json"
    try:
        environment = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); remove it") from error
    if not isinstance(environment, dict):
        raise UserError(f"{file}: expected names and values, got {type(environment).__name__}; remove it")
    return Record(folder, name, settings, environment, _epochs(folder / "metrics.jsonl"))


def _epochs(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    epochs = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):  # the last one may just be being written
                raise UserError(f"{file}, line {number}: not JSON ({error}); remove this line") from error
            continue
        missing = [key for key in _KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{file}, line {number}: not an epoch of this engine (it has no {', '.join(missing)})")
        epochs.append(row)
    return epochs


def choose(config: Config, name: str, out: str = "") -> Path:
    """The folder for a new run; nothing is made yet.

    Args:
        name: of the configuration; names the folder when `out` is empty: runs/<name>-seed<seed>, numbered if taken.

    Raises:
        UserError: `out` holds a run already.
    """
    if out:
        refuse_taken(Path(out))
        return Path(out)
    folder, number = Path("runs") / f"{name}-seed{config.seed}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-seed{config.seed}-{number}"
    return folder


def refuse_taken(folder: Path) -> None:
    """Raise a `UserError` for a folder that holds a run already."""
    if checkpoint.exists(folder):
        raise UserError(
            f"--out {folder}: holds a run already; go on with it by --resume {folder}, or choose another folder"
        )


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Inside, no other process that asks the same gets this folder, which is made if need be.

    The kernel lets go of it when this process ends, however it does; the file .lock stays and means nothing by itself.

    Raises:
        UserError: another process has it, or the folder cannot be made or written to.
    """
    folders.make(folder)
    with checkpoint.explained(folder / ".lock", remedy="choose another folder by --out"):
        (folder / ".lock").touch()
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                lock.seek(0)
                raise UserError(
                    f"{folder}: {lock.read().strip() or 'another process'} is at work in this run folder; wait for it or "
                    "stop it, or choose another folder by --out"
                ) from error
            warnings.warn(f"{folder}: its file system has no locks; see that no two runs use it at once", stacklevel=3)
        with checkpoint.explained(folder / ".lock"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        yield


def create(folder: Path, config: Config) -> None:
    """Write config.yaml and environment.json to a run folder.

    Raises:
        UserError: it cannot be written to.
    """
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
    if not checkpoint.exists(folder):
        raise UserError(f"--resume {run}: it was stopped before its first checkpoint; start it anew, without --resume")
    content, written = checkpoint.latest(folder)[0]["config"], read_file(folder / "config.yaml")
    for settings in (content, written):
        methods.refuse_foreign(settings, overrides, folder)
    saved, config = to_dict(parse(content)), parse(override(written, overrides))
    changed = fixed_differences(saved, to_dict(config))
    if changed:
        raise UserError(
            f"--resume {run}: the checkpoint was made with other settings ({'; '.join(changed)}). A resumed run may "
            f"change {', '.join(MOVABLE)} only; undo the change, or start a new run"
        )
    return config, folder


def fixed_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "a.b: old -> new" for the settings that make two runs different ones: all but `MOVABLE`."""
    return [line for line in differences(old, new) if not is_movable(line.split(":")[0])]


def movable_overrides(config: Config) -> list[str]:
    """The settings that a resumed run may change, "a.b=c" each, and its method, so that a module of the user's may run."""

    def walk(value: Any, path: str) -> Iterator[str]:
        if is_movable(path):
            yield f"{path}={json.dumps(value)}"
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from walk(item, f"{path}.{key}".lstrip("."))

    return [*walk(to_dict(config), ""), f"method.name={config.method.name}"]


def is_movable(path: str) -> bool:
    """Whether a setting, "a.b", is one of `MOVABLE`."""
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
