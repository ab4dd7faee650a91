from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from engine import info

TOOL = Path(__file__).parents[2] / "tools" / "bench_kernels.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_kernels", TOOL)
    module = sys.modules["bench_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_operator_has_a_row(bench):
    assert sorted(bench.CASES) == info.operator_names()


def test_back_ends_and_peers_are_timed_once_they_agree(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "timings.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--op", "memory_update_", "topk", "--json", str(path)])
    bench.main()
    written = json.loads(path.read_text())
    rows = {(row["op"], row["contender"]) for row in written["timings"]}
    assert rows == {
        ("memory_update_", "reference"),
        ("memory_update_", "cpu"),
        ("memory_update_", "python loop"),
        ("topk", "reference"),
        ("topk", "cpu"),
        ("topk", "torch chunked"),
    }
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in written["timings"])
    assert {"machine", "commit", "threads", "torch"} <= set(written["header"])
    assert "python loop" in capsys.readouterr().out


def test_a_wrong_contender_ends_the_benchmark(bench):
    case = next(bench.memory_update_cases(True, "cpu"))
    with pytest.raises(SystemExit, match="memory_update_, .*: sloppy is wrong, so nothing is timed"):
        bench.check("memory_update_", case, {"sloppy": lambda bank, *_: bank})
