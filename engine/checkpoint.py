"""Files that a run leaves behind: written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from engine.errors import UserError

LATEST = ("last.pt", "previous.pt")
_MARK = b"sha256:"
_TRAILER = len(_MARK) + 2 * hashlib.sha256().digest_size


def write(
    path: Path,
    content: bytes | memoryview,
    remedy: str = "make room or choose another folder by --out, then go on with --resume",
    keep: Path | None = None,
) -> None:
    """Put `content` at `path` so that a reader, or a crash at any moment, sees the old file or the new one.

    Args:
        keep: where the old file stays.

    Raises:
        UserError: the folder is full, is gone or cannot be written to; the old file stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with explained(path, f"; {len(content) / 2**20:.1f} MiB needed", remedy):
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                _keep(path, keep)
            os.replace(part, path)
            _sync(path.parent)
    except BaseException:  # a signal too
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def explained(path: Path, needs: str = "", remedy: str = "mend that, then go on with --resume") -> Iterator[None]:
    """Turn what the file system refuses inside the block into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        if not path.parent.is_dir():
            reason = f"its folder is gone: {reason}"
        raise UserError(f"{path}: cannot be written ({reason}{needs}); {remedy}") from error


def save(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Write tensors and plain values, and their checksum; `load` gives them back.

    The file is that of `torch.save`, a ZIP archive, whose comment holds the SHA-256 of all bytes before the digest.

    Args:
        keep: where the file that was at `path` stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as content:
        content[-2:] = _TRAILER.to_bytes(2, "little")  # the last field of an archive: how long its comment is
        digest = hashlib.sha256(content)
    digest.update(_MARK)
    buffer.seek(0, io.SEEK_END)
    buffer.write(_MARK + digest.hexdigest().encode())
    with buffer.getbuffer() as content:
        write(path, content, keep=keep)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of this engine, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: no such file, a damaged one, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; a run folder holds last.pt, best.pt and stage1.pt once they exist"
        )
    try:
        with open(path, "rb") as file:
            _check(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or foreign files fail in many ways
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); use another one of the run") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("network", "config")):
        raise UserError(
            f"{path}: not a checkpoint of this engine (it has no 'network' and 'config'); weights that others released "
            "go with a configuration: docs/weights.md"
        )
    return state


def exists(folder: Path) -> bool:
    """Whether a run can go on from this folder."""
    return any((folder / name).is_file() for name in LATEST)


def latest(folder: Path) -> tuple[dict[str, Any], Path]:
    """The latest whole checkpoint of a run, and its file. A damaged one is passed over with a warning.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for path in (folder / name for name in LATEST):
        try:
            content = load(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}. Taking {path.name}, the one before", stacklevel=2)
        return content, path
    raise UserError(problems[0])


def set_damaged_aside(folder: Path) -> None:
    """Make previous.pt the latest checkpoint; what was it becomes damaged.pt."""
    with explained(folder / LATEST[0]):
        if (folder / LATEST[0]).exists():
            os.replace(folder / LATEST[0], folder / "damaged.pt")
        os.replace(folder / LATEST[1], folder / LATEST[0])


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
    except (RuntimeError, TypeError, AttributeError) as error:
        settings, reason = content["config"], str(error).splitlines()[-1].strip()
        reason = reason if len(reason) < 160 else f"{reason[:160]}..."  # a name for each of some hundred tensors
        raise UserError(
            f"the checkpoint is of another network (its settings: method {settings.get('method')}, model "
            f"{settings.get('model')}): {reason}; use the configuration it was trained with"
        ) from error


def _keep(path: Path, keep: Path) -> None:
    """Leave the file at `path` at `keep` too, where the file system can; it is about to be replaced."""
    second = keep.with_name(f".{keep.name}.part")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:  # a file system without hard links: for a moment there is no file at `path`
        second = path
    os.replace(second, keep)


def _sync(folder: Path) -> None:
    """Have the names in a folder survive a power cut, where the file system can promise it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check(file: IO[bytes]) -> None:
    """Raise a `ValueError` for a file that is not what was saved, or that would unpack to more than it is.

    Files of versions that wrote no checksum pass; what they lack, `torch.load` may notice.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TRAILER))
    trailer = file.read()
    if trailer.startswith(_MARK):
        file.seek(0)
        digest, left = hashlib.sha256(), size - len(trailer) + len(_MARK)
        while left:
            block = file.read(min(left, 2**20))
            if not block:
                raise ValueError("it was cut off while it was read")
            digest.update(block)
            left -= len(block)
        if digest.hexdigest().encode() != trailer[len(_MARK) :]:
            raise ValueError("its checksum does not match: it was damaged or changed after it was written")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("it would unpack to more than it is, as no checkpoint does")
