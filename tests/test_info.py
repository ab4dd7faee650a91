from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from engine import info, ops
from engine.ops import _cuda


def test_lists_every_operator_and_nothing_else():
    names = info.operator_names()
    assert set(names) <= set(ops.__all__)
    assert {"topk", "memory_update_", "sinkhorn"} <= set(names)
    assert not {"backends", "use_backend", "Sinkhorn", "Ranking"} & set(names)


def test_a_back_end_that_cannot_run_has_its_reason_below_the_table(monkeypatch):
    reason = "engine._C is not built (gone)"
    real = info.backends
    monkeypatch.setattr(info, "backends", lambda op: real(op) | ({"cpu": reason} if op == "rank" else {}))
    lines = info.table()
    (row,) = [re.split(r"\s{2,}", line) for line in lines if line.startswith("rank")]
    number = row[3].removeprefix("no ")
    assert f"{number} {reason}" in lines


def test_how_cuda_kernels_come_to_the_gpu_stands_below_the_table(monkeypatch):
    real = info.backends
    monkeypatch.setattr(info, "backends", lambda op: real(op) | ({"cuda": None} if op == "set_union" else {}))
    monkeypatch.setattr(_cuda, "loader", lambda op: "compiled somehow")
    lines = info.table()
    (row,) = [re.split(r"\s{2,}", line) for line in lines if line.startswith("set_union")]
    assert f"{row[1].removeprefix('yes ')} compiled somehow" in lines


def test_a_package_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.versions()["no-such-package"] == "not installed"


def test_the_commit_is_unknown_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert info.commit() is None


def test_prints_versions_devices_and_the_table():
    root = Path(__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-m", "engine.info"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for word in ("vireid-engine", "torch", "cpu:", "cuda", "topk", "reference"):
        assert word in printed
