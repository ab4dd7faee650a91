"""Random streams by name: the draws of epoch 7, step 3 are the same after a resume, on any device, for any world size."""

from __future__ import annotations

import numpy as np
import torch


def _state(key: tuple[int, ...], words: int) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(words)


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on `key` (for example seed, epoch, step) alone."""
    high, low = _state(key, 2)
    return torch.Generator().manual_seed((int(high) << 31) ^ int(low))


def random_state(*key: int) -> np.random.RandomState:
    """A numpy generator (the legacy kind, which samplers of this field draw from) for `key` alone."""
    return np.random.RandomState(_state(key, 4))
