from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check
import gpu_report
from gpu_check import Record, Step

TIMED = {"op": "topk", "form": "self", "size": "4 x 2", "dtype": "float32", "ceiling": 0.5, "ours": False}
BENCHMARK = {
    "rows": [
        {**TIMED, "contender": "cuda", "median": 2.0, "ours": True},
        {**TIMED, "contender": "reference", "median": 3.0},
        {**TIMED, "contender": "torch chunked", "median": 5.0},
        {**TIMED, "contender": "torch chunked, TF32", "median": 4.0},
        {**TIMED, "contender": "faiss-gpu", "median": None},
    ]
}
LINE = "| topk self | 4 x 2 | float32 | cuda | 2 | 50% | torch chunked, TF32: 2.00x |"
RECORD = Record(
    date="2026-01-02 03:04:05",
    commit="abc1234",
    sources="0123",
    machine={"gpu": "NVIDIA H200"},
    versions={"torch": "2.11.0"},
    steps=[Step("tests", "failed with exit status 1", 9.0, "the last of it")],
    tests=[
        {"name": "tests/ops/test_gpu.py::a", "outcome": "passed", "seconds": 0.1, "why": ""},
        {"name": "tests/ops/test_gpu.py::b", "outcome": "failed", "seconds": 0.1, "why": "assert 1 == 2"},
    ],
    benchmark=BENCHMARK,
    step={
        "facts": {"precision": "fp32"},
        "rows": [
            {"path": [], "forward": 30.0, "backward": 60.0, "share": 1.0, "rest": None},
            {"path": ["GPCR", "topk"], "forward": 9.0, "backward": 0.0, "share": 0.1, "rest": 0.9},
        ],
    },
)


def test_without_a_gpu_nothing_is_checked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_readme_says_what_the_newest_files_say():
    text = (ROOT / "README.md").read_text()
    expected = gpu_check.readme(text, gpu_check.section(gpu_check.records(), gpu_check.source_hash()))
    assert text == expected, "run: python tools/gpu_check.py --readme"


def test_every_page_is_that_of_its_file():
    for path in gpu_check.FOLDER.glob("*.json"):
        assert path.with_suffix(".md").read_text() == gpu_check.page(Record.read(path))


def test_a_file_holds_all_of_a_run(tmp_path):
    path = RECORD.write(tmp_path)
    assert path.name == "20260102030405-nvidia-h200-abc1234.json"
    assert Record.read(path) == RECORD
    fields = {"date", "commit", "sources", "machine", "versions", "steps", "tests", "benchmark", "step"}
    assert set(json.loads(path.read_text())) == fields
    page = path.with_suffix(".md").read_text()
    assert all(part in page for part in (LINE, "1 failed, 1 passed", "assert 1 == 2", "failed with exit status 1"))
    assert "| - topk | 9.0 | 0.0 | 9.0 | 10.0% | 90.0% |" in page


def test_without_a_file_timings_are_still_to_be_measured(tmp_path):
    assert gpu_check.section(gpu_check.records(tmp_path), "0123") == "GPU timings are still to be measured.\n"


def test_the_newest_tests_and_the_newest_timings_are_shown_and_where_they_are_stale(tmp_path):
    later = replace(RECORD, date="2026-01-03 00:00:00", commit="def5678", sources="4567", benchmark=None)
    for record in (later, RECORD):
        record.write(tmp_path)
    found = gpu_check.records(tmp_path)
    assert found == [later, RECORD]
    text = gpu_check.section(found, "4567")
    assert "Measured on one NVIDIA H200 at commit `abc1234` (**stale**: the kernels have changed since):" in text
    assert "Tests on one NVIDIA H200 at commit `def5678`: 1 failed, 1 passed." in text
    assert LINE in text
    assert "stale" not in gpu_check.section([RECORD], "0123")


def test_the_readme_is_changed_between_its_marks_only():
    text = f"before\n{gpu_check.BEGIN}old\n{gpu_check.END}after\n"
    changed = gpu_check.readme(text, "new\n")
    assert changed == f"before\n{gpu_check.BEGIN}\nnew\n\n{gpu_check.END}after\n"
    assert gpu_check.readme(changed, "new\n") == changed
    with pytest.raises(ValueError, match="must hold"):
        gpu_check.readme("no marks", "new\n")


def test_the_hash_is_that_of_names_and_contents_of_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for folder in ("csrc", "kernels", "engine"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "csrc" / "topk.cu"
    source.write_text("one")
    first = gpu_check.source_hash()
    for other in ("engine/topk.py", "kernels/topk.cpython-312.pyc"):
        (tmp_path / other).write_text("no kernel")
    assert gpu_check.source_hash() == first
    source.write_text("two")
    second = gpu_check.source_hash()
    source.rename(tmp_path / "csrc" / "rank.cu")
    assert len({first, second, gpu_check.source_hash()}) == 3


def test_a_step_that_fails_or_takes_too_long_says_so():
    python = sys.executable, "-c"
    assert gpu_check.run("fine", (*python, "print(1)"), 60) == Step("fine", "passed", pytest.approx(0, abs=60))
    failed = gpu_check.run("wrong", (*python, "print('because'); raise SystemExit(3)"), 60)
    assert (failed.outcome, failed.output) == ("failed with exit status 3", "because\n")
    late = gpu_check.run("slow", (*python, "import time; print('begun', flush=True); time.sleep(60)"), 1)
    assert (late.outcome, late.output) == ("cut short after 1 s", "begun\n")
    assert gpu_check.run("absent", ("/no/such/program",), 60).outcome.startswith("not run: ")


def test_without_pytest_no_test_is_claimed(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert gpu_check.test(60) == (Step("tests", "not run: pytest is not installed"), [])


def test_the_plugin_writes_down_every_outcome(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_left_out(): pytest.skip('no reason')\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    report = tmp_path / "report"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_report", "--continue-on-collection-errors", "."]
    environment = {
        "PYTHONPATH": str(ROOT / "tools"),
        gpu_report.REPORT: str(report),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    rows = {row["name"]: row for row in map(json.loads, report.read_text().splitlines())}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_broken.py": "not run",
        "test_some.py::test_right": "passed",
        "test_some.py::test_wrong": "failed",
        "test_some.py::test_left_out": "skipped",
    }
    assert "no_such_package" in rows["test_broken.py"]["why"]
    assert "assert 1 == 2" in rows["test_some.py::test_wrong"]["why"]
    assert "no reason" in rows["test_some.py::test_left_out"]["why"]
