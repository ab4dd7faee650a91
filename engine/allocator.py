"""How the process keeps the memory that tensors on the CPU leave."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Blocks up to this size are kept. Larger ones leave holes that other large ones do not fit: with 1 GB, a step on 192 images
# grew from 18 GB to more than 22.
_KEPT = 1 << 26
_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors, for the whole process; for tools, not for libraries.

    By default it returns large blocks at once, and the system hands them out again page by page, each filled with zeros: a
    third of a step of ResNet-50 on 48 images. In return a process does not shrink, and may hold more than it needs at a time.

    Returns:
        Whether it was done: not without glibc, nor where one of glibc's own settings in the environment decides.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT) and mallopt(_M_TRIM_THRESHOLD, -1))
