"""Where tensors with a row for every image lie: in memory, or in files that are mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.folders import cache_folder, writable


@dataclass(frozen=True)
class Storage:
    """Makes tensors that the operators take like any other.

    Attributes:
        folder: of the files that are mapped, None = in memory. A file has no name, so that its space is free again when the
            last tensor of it is gone, or the process; the system keeps in memory what of it is in use and fits.
    """

    folder: Path | None = None

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """A tensor of this shape whose content is undefined, in the dtype of `like`; on its device, or mapped, on the CPU.

        Raises:
            UserError: the folder is full or cannot be written.
        """
        if self.folder is None:
            return like.new_empty(shape)
        byte_count = math.prod(shape) * like.dtype.itemsize
        if byte_count == 0:
            return torch.empty(shape, dtype=like.dtype)  # what is empty cannot be mapped
        with writable(self.folder, byte_count), tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, byte_count)  # a disk that is full kills who writes to a map
            return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(byte_count,))).view(like.dtype).view(shape)

    def take(self, parts: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The chosen rows of every part: P of `[N, D]`, `[R]` int64 -> `[P, R, D]`."""
        taken = self.empty(len(parts), len(rows), parts[0].shape[1], like=parts[0])
        for part, own in zip(parts, taken, strict=True):
            torch.index_select(part, 0, rows, out=own)
        return taken


MEMORY = Storage()


def of(config: Config) -> Storage:
    """The storage that `train.features` names; its files lie in the folder of the cache."""
    return Storage(cache_folder(config.data.cache) if config.train.features == "disk" else None)
