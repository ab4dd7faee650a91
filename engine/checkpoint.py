"""Files that a run leaves behind: written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import UserError


def write(
    path: Path,
    content: bytes,
    remedy: str = "make room or choose another folder by --out, then go on with --resume",
) -> None:
    """Put `content` at `path` so that a reader, or a crash at any moment, sees the old file or the new one.

    Raises:
        UserError: the folder is full or cannot be written to; the old file stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(
            f"{path}: cannot be written ({reason}; {len(content) / 2**20:.1f} MiB needed); {remedy}"
        ) from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; `load` gives them back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of this engine, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; a run folder holds last.pt, best.pt and stage1.pt once they exist"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or foreign files fail in many ways
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one of the run") from error
    if not isinstance(state, dict) or "network" not in state or "config" not in state:
        raise UserError(f"{path}: not a checkpoint of this engine (it has no 'network' and 'config')")
    return state


def locate(run: str, name: str = "last") -> Path:
    """The checkpoint that a command line names: a file, or `name`.pt of a run folder."""
    path = Path(run)
    if path.is_dir():
        path = path / f"{name}.pt"
    if not path.is_file():
        found = sorted(item.name for item in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        hint = f"this folder has {', '.join(found)}" if found else "expected a run folder or a .pt file"
        raise UserError(f"{path}: no such checkpoint; {hint}")
    return path


def load_network(network: nn.Module, content: dict[str, Any], fresh: str = "") -> None:
    """The weights of a checkpoint, or a `UserError` when it is of another network.

    Args:
        fresh: a part of the network that stays as it is, whether the checkpoint has it or not; "" = none.
    """
    state = content["network"]
    if fresh:
        own = {name: value for name, value in network.state_dict().items() if name.startswith(f"{fresh}.")}
        state = own | {name: value for name, value in state.items() if not name.startswith(f"{fresh}.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint is of another network (its model settings: {content['config'].get('model')}): "
            f"{str(error).splitlines()[-1].strip()}; use the configuration it was trained with"
        ) from error
