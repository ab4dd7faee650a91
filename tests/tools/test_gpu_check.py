from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check
import gpu_report
import readme_part
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
FAR = {"op": "topk", "size": "4 x 2", "gradient": None, "rows": 0.25}
ERRORS = [{**FAR, "computed": "ieee", "values": 1e-7}, {**FAR, "computed": "fast", "values": 2e-5}]
ERROR_LINES = "| topk | 4 x 2 | values | 1.0e-07 | 2.0e-05 |", "| topk | 4 x 2 | rows changed | 25.0% | 25.0% |"
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
    errors=ERRORS,
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
    content = gpu_check.section(gpu_check.records(), gpu_check.source_hash())
    expected = readme_part.replaced(text, "gpu_check", content)
    assert text == expected, "run: python tools/gpu_check.py --readme"


def test_every_page_is_that_of_its_file():
    for path in gpu_check.FOLDER.glob("*.json"):
        assert path.with_suffix(".md").read_text() == gpu_check.page(Record.read(path))


def test_a_file_holds_all_of_a_run(tmp_path):
    path = RECORD.write(tmp_path)
    assert path.name == "20260102030405-nvidia-h200-abc1234.json"
    assert Record.read(path) == RECORD
    fields = {"date", "commit", "sources", "machine", "versions", "steps", "tests", "errors", "benchmark", "step"}
    assert set(json.loads(path.read_text())) == fields
    page = path.with_suffix(".md").read_text()
    assert all(
        part in page
        for part in (LINE, *ERROR_LINES, "1 failed, 1 passed", "assert 1 == 2", "failed with exit status 1")
    )
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


@pytest.mark.parametrize(("last", "limit", "outcome"), [("", 60, "passed"), ("sleep 60", 0.1, "cut short after 0 s")])
def test_no_child_of_a_step_is_left_behind(last, limit, outcome):
    """It would go on using the GPU."""
    process = subprocess.Popen(
        ["sh", "-c", f"sleep 60 & echo $!; {last}"], stdout=subprocess.PIPE, start_new_session=True
    )
    child = Path("/proc", process.stdout.readline().decode().strip(), "stat")
    assert gpu_check.ended(process, limit) == outcome
    deadline = time.monotonic() + 30
    while child.exists() and " Z " not in child.read_text():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.01)
    process.stdout.close()


def arguments_for(folder: Path, *given: str):
    return gpu_check.parse(["--out", str(folder), "--commit", "abc1234", *given])


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "NVIDIA H200"})


def test_a_part_that_fails_keeps_no_other_from_being_run(monkeypatch, machine, tmp_path):
    limits = {}

    def run_part(name, record, limit):
        limits[name] = limit
        assert Record.read(next(tmp_path.glob("*.json"))).steps == record.steps, "the file lags behind"
        if name == "errors":
            raise ValueError("broken")
        return Step(name, "passed")

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    record, path = gpu_check.check(arguments_for(tmp_path, "--sanitize", "--minutes", "10"))
    assert Record.read(path) == record
    assert not record.passed
    assert {step.name: step.outcome for step in record.steps} == {
        "build": "passed",
        "tests": "passed",
        "errors": "failed: broken",
        "training step": "passed",
        "benchmark": "passed",
        "memcheck": "passed",
        "racecheck": "passed",
    }
    assert list(limits) == list(gpu_check.WEIGHTS)
    assert limits["racecheck"] == pytest.approx(600, abs=60), "what is left over is for the last"
    assert max(limits["build"], limits["tests"]) < 300, "time is kept for those after them"


def test_without_time_the_rest_says_so(machine, tmp_path):
    record, _ = gpu_check.check(arguments_for(tmp_path, "--minutes", "0"))
    assert {step.outcome for step in record.steps} == {"not run: no time was left"}


def test_the_parts_are_those_asked_for(tmp_path):
    def names(*given: str) -> list[str]:
        return gpu_check.parts_of(arguments_for(tmp_path, *given))

    assert names() == ["build", "tests", "errors", "training step", "benchmark"]
    assert names("--tests-only", "--sanitize") == ["build", "tests", "memcheck", "racecheck"]
    assert names("--bench-only") == ["build", "errors", "training step", "benchmark"]


@pytest.mark.parametrize("name", gpu_check.MEASUREMENTS)
def test_what_is_measured_by_takes_these_arguments(name):
    script, *words = map(str, gpu_check.MEASUREMENTS[name])
    assert importlib.import_module(Path(script).stem).parse([*words, "--json", "file"]).json == Path("file")


def test_every_operator_is_timed_once():
    assert sorted(gpu_check.OPERATORS) == sorted(importlib.import_module("bench_cases").CASES)


def test_the_sanitizer_sees_every_operator_whatever_fails(monkeypatch, capsys):
    import bench_cases
    import bench_measure

    def broken(*_):
        raise ValueError("broken")

    few = ("set_intersection", "topk")
    monkeypatch.setattr(bench_cases, "CASES", {"rank": broken} | {name: bench_cases.CASES[name] for name in few})
    calls = []
    monkeypatch.setattr(bench_measure, "on_backend", lambda name, call, *inputs: calls.append(name) or call(*inputs))
    assert gpu_check.exercise(("reference",), "cpu") == 1
    assert "rank:" in capsys.readouterr().out
    assert calls == ["reference"] * 3


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
