"""The tools keep the memory that tensors leave."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys
import torch
from engine.allocator import keep_freed_memory
assert keep_freed_memory() == (sys.argv[1] == "keeps")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):  # aligned blocks take some turns to find their places
    torch.ones(1 << 22)
before = faults()
for _ in range(10):
    torch.ones(1 << 22)  # 16 MiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_serves_the_next_tensor_unless_the_user_has_a_setting(monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    kept = count("keeps")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert kept < count("leaves") / 2


def count(expected: str) -> int:
    """Page faults of ten large tensors."""
    found = subprocess.run([sys.executable, "-c", FAULTS, expected], capture_output=True, text=True, check=True)
    return int(found.stdout)
