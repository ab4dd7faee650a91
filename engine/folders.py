"""Folders that the engine writes to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError


def cache_folder(given: str = "") -> Path:
    """The folder that `data.cache` gives; where that is empty, `$XDG_CACHE_HOME/vireid-engine` or `~/.cache/vireid-engine`."""
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vireid-engine"


@contextlib.contextmanager
def writable(folder: Path, byte_count: int) -> Iterator[None]:
    """Make `folder`, and turn what the file system refuses inside the block into words."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < byte_count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"the cache needs {byte_count:,} bytes in {folder}, where {free:,} are free; "
                "make room, or name another folder in data.cache"
            ) from error
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}); name another one in data.cache"
        ) from error


def make(folder: Path) -> None:
    """Make a folder that a command line names.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder by --out") from error
