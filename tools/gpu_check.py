"""Proves the GPU back ends on the GPU of this machine, and writes down what was seen.

    python tools/gpu_check.py [--tests-only | --bench-only] [--sanitize] [--minutes N] [--out FOLDER] [--commit NAME]
    python tools/gpu_check.py --readme

It builds engine._C in place, runs the tests marked `gpu`, `precision_errors.py`, `profile_step.py` for a step of training,
`bench_kernels.py --device cuda` and, with `--sanitize`, every operator under compute-sanitizer. All of it ends in `--minutes`:
a part that takes more than its share is cut short and says so, and one that fails keeps no other from being run. Where that
is too little, run it as `--tests-only --sanitize` and as `--bench-only`. One JSON in docs/gpu/, written after every part,
holds the machine, versions, commit, a hash of kernels/ and csrc/, the outcome of every test, every error and every timing; a
page beside it shows them. `--readme` writes what the README says of GPUs, from the newest of these files and nothing else.

Exit status: 0 when all went well, 1 when something failed or was left out, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # nothing has to be installed

import readme_part
import torch
from gpu_report import REPORT

from engine import checkpoint, info

FOLDER = ROOT / "docs" / "gpu"
UNMEASURED = "GPU timings are still to be measured."
PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "pytest", "hypothesis", "pybind11", "faiss-gpu", "cuml-cu12", "cuml-cu13")


@dataclass
class Step:
    """Something that was run.

    Attributes:
        outcome: "passed", or what kept it from passing.
        output: the last of what it printed, unless it passed.
    """

    name: str
    outcome: str
    seconds: float = 0.0
    output: str = ""


@dataclass
class Record:
    """What one run of this script saw: the content of a file in docs/gpu.

    Attributes:
        sources: `source_hash()` of what was run.
        tests: name, outcome, seconds, and why it did not pass.
        errors: what `precision_errors.py --json` writes, or None.
        benchmark: what `bench_kernels.py --json` writes, or None.
        step: what `profile_step.py --json` writes of a SALCR step at the sizes of SYSU-MM01, or None.
    """

    date: str
    commit: str
    sources: str
    machine: dict[str, str]
    versions: dict[str, str]
    steps: list[Step] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] | None = None
    benchmark: dict[str, Any] | None = None
    step: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        content = json.loads(path.read_text())
        return cls(**content | {"steps": [Step(**step) for step in content["steps"]]})

    def write(self, folder: Path) -> Path:
        """The JSON, and the page beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        words = re.findall(r"[a-z0-9]+", f"{self.machine['gpu']} {self.commit}".lower())
        path = folder / f"{re.sub('[^0-9]', '', self.date)}-{'-'.join(words)}.json"
        checkpoint.write(path, (json.dumps(asdict(self), indent=1) + "\n").encode())
        path.with_suffix(".md").write_text(page(self))
        return path

    @property
    def passed(self) -> bool:
        return all(step.outcome == "passed" for step in self.steps)


def source_hash() -> str:
    """Of names and contents of all that a kernel is made from."""
    digest = hashlib.sha256()
    files = (path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file())
    for path in sorted(path for path in files if path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


# The run


def run(name: str, command: Iterable[object], limit: float, **environment: str) -> Step:
    """A step in a process of its own, in the root of the checkout, for `limit` seconds at most."""
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tools")))} | environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            outcome = ended(process, limit)
        except OSError as error:
            outcome = f"not run: {error}"
        printed.seek(0)
        output = "" if outcome == "passed" else printed.read()[-6000:]
    step = Step(name, outcome, round(time.monotonic() - start, 1), output)
    print(f"  {step.outcome}, {step.seconds} s", *output.splitlines()[-15:], sep="\n  ", flush=True)
    return step


def ended(process: subprocess.Popen[bytes], limit: float) -> str:
    """The outcome of a process that leads a session; no child of it, which may hold the GPU, is left behind."""
    try:
        status = process.wait(limit)
        return "passed" if status == 0 else f"failed with exit status {status}"
    except subprocess.TimeoutExpired:
        return f"cut short after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(limit: float) -> Step:
    """engine._C, in place."""
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    if find_spec("pybind11"):
        step = run("build", command, limit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stand_in_for_pybind11(Path(folder))
            step = run("build", command, limit, PYTHONPATH=folder)
    if step.outcome == "passed" and not list((ROOT / "engine").glob("_C.*.so")):  # the extension is optional
        step.outcome = "failed: there is no engine/_C"
    return step


def stand_in_for_pybind11(folder: Path) -> None:
    """A package that setup.py and CMakeLists.txt take for pybind11, with the headers that torch brings."""
    headers = Path(torch.__file__).parent / "include"
    (folder / "pybind11.py").write_text("def get_cmake_dir():\n    return __file__.rpartition('/')[0]\n")
    (folder / "pybind11Config.cmake").write_text(
        f"""\
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
function(pybind11_add_module name)
  Python_add_library(${{name}} MODULE WITH_SOABI ${{ARGN}})
  target_include_directories(${{name}} SYSTEM PRIVATE "{headers}")
  set_target_properties(${{name}} PROPERTIES CXX_VISIBILITY_PRESET hidden)
endfunction()
"""
    )


def test(limit: float) -> tuple[Step, list[dict[str, Any]]]:
    """The tests marked `gpu`, each with its outcome."""
    if find_spec("pytest") is None:
        return Step("tests", "not run: pytest is not installed"), []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "gpu_report", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "tests"]
    if find_spec("xdist"):  # as compiling kernels takes most of the time
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        report.touch()
        step = run("tests", command, limit, **{REPORT: str(report)})
        outcomes = [json.loads(line) for line in report.read_text().splitlines()]
    if step.outcome == "passed" and not any(row["outcome"] == "passed" for row in outcomes):
        step.outcome = "failed: no test ran"
    return step, outcomes


def sanitize(tool: str, backends: Iterable[str], limit: float) -> Step:
    """Every operator at a small size under a tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        return Step(tool, "not run: compute-sanitizer is not installed")
    call = (sys.executable, Path(__file__), "--exercise", *backends)
    # Without a cache every tensor is an allocation of its own, beyond whose end nothing is.
    command = (sanitizer, "--tool", tool, "--error-exitcode", 1, *call)
    return run(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def exercise(backends: Iterable[str], device: str = "cuda") -> int:
    """One call of every operator on each of these back ends that has it, or on what the engine chooses for its parts.

    Returns:
        How many operators failed: one that does keeps no other from being looked at.
    """
    from bench_cases import CASES, SIZES
    from bench_measure import AUTOMATIC, Settings, engine_backends, on_backend

    settings = Settings(SIZES["quick"], device, torch.float32, torch.get_num_threads())
    failed = 0
    for op, cases in CASES.items():
        try:
            for case in cases(settings.size, settings.make):
                for name in engine_backends(case, settings):
                    if name in (*backends, AUTOMATIC):
                        on_backend(name, case.call, *case.inputs())
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception:  # noqa: BLE001  whatever it is, the others are looked at
            failed += 1
            print(f"{op}:", traceback.format_exc(), sep="\n", flush=True)
    return failed


OPERATORS = (
    *("neighbor_contrast", "cluster_contrast", "memory_update_", "sinkhorn", "jaccard", "dbscan", "topk", "cmfp"),
    *("ot_assign", "soft_contrast", "affinity", "propagate", "knn_intersection", "set_intersection", "set_union"),
    *("segment_mean", "rank"),
)
"""All, those with a goal or the most to do first, as time may run out."""
MEASUREMENTS = {
    "errors": ("tools/precision_errors.py", "--device", "cuda"),
    "training step": ("tools/profile_step.py", "--cfg", "sysu.yaml", "--set", "device=cuda", "--steps", 10),
    "benchmark": ("tools/bench_kernels.py", "--device", "cuda", "--budget", 3, "--keep-going", "--op", *OPERATORS),
}


def measure(name: str, limit: float) -> tuple[Step, Any]:
    """One of `MEASUREMENTS`, and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "written.json")
        step = run(name, (sys.executable, *MEASUREMENTS[name], "--json", written), limit)
        return step, json.loads(written.read_text()) if written.is_file() else None


WEIGHTS = {
    "build": 6,
    "tests": 6,
    "errors": 2,
    "training step": 2,
    "benchmark": 6,
    "memcheck": 2,
    "racecheck": 2,
}
"""A part may take this share of what it and those after it have; what it leaves is theirs."""


def parts_of(arguments: argparse.Namespace) -> list[str]:
    """Which parts are run, in the order of `WEIGHTS`."""
    left_out = {"errors", "training step", "benchmark"} if arguments.tests_only else set()
    left_out |= {"tests"} if arguments.bench_only else set()
    left_out |= set() if arguments.sanitize else {"memcheck", "racecheck"}
    return [name for name in WEIGHTS if name not in left_out]


def run_part(name: str, record: Record, limit: float) -> Step:
    """One part, whose findings go into the record; races of shared memory are for our own CUDA kernels."""
    if name == "build":
        return build(limit)
    if name == "tests":
        step, record.tests = test(limit)
    elif name == "errors":
        step, record.errors = measure(name, limit)
    elif name == "training step":
        step, record.step = measure(name, limit)
    elif name == "benchmark":
        step, record.benchmark = measure(name, limit)
    else:
        step = sanitize(name, ("cuda", "triton") if name == "memcheck" else ("cuda",), limit)
    return step


def check(arguments: argparse.Namespace) -> tuple[Record, Path]:
    """Part after part; the files hold what was seen as soon as a part is over, whatever becomes of the next."""
    end = time.monotonic() + 60 * arguments.minutes
    record = Record(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        commit=arguments.commit or info.commit() or "unknown",
        sources=source_hash(),
        machine=machine(),
        versions={**info.versions(), **{name: version for name in PACKAGES if (version := version_of(name))}},
    )
    names = parts_of(arguments)
    path = record.write(arguments.out)
    for place, name in enumerate(names):
        share = WEIGHTS[name] / sum(WEIGHTS[later] for later in names[place:])
        limit = share * (end - time.monotonic())
        try:
            step = run_part(name, record, limit) if limit > 1 else Step(name, "not run: no time was left")
        except Exception as error:  # noqa: BLE001  whatever it is, the rest is run
            step = Step(name, f"failed: {error}", output=traceback.format_exc()[-6000:])
        record.steps.append(step)
        record.write(arguments.out)
    return record, path


def machine() -> dict[str, str]:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    nvcc = re.search(r"release ([\d.]+)", printed_by(["nvcc", "--version"]))
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "driver": printed_by(query).strip() or "unknown",
        "cuda of torch": torch.version.cuda or "none",
        "nvcc": nvcc[1] if nvcc else "not installed",
        "cpu": f"{info.cpu_name()}, {os.cpu_count()} cores",
        "system": platform.platform(),
    }


def printed_by(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# What is shown


def table(titles: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (titles, ["---"] * len(titles), *body))


def counted(tests: list[dict[str, Any]]) -> str:
    """How many had which outcome."""
    counts = Counter(row["outcome"] for row in tests)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none"


def timings(benchmark: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for every case: the engine's own choice, and the fastest of the others that ran."""
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in benchmark["rows"]:
        if row["median"] is not None:
            cases.setdefault((f"{row['op']} {row['form']}".strip(), row["size"], row["dtype"]), []).append(row)
    lines = []
    for case, rows in cases.items():
        ours = next((row for row in rows if row["ours"]), None)
        if ours is None:
            continue
        others = [row for row in rows if row is not ours and row["contender"] != "reference"]
        best = min(others, key=lambda row: row["median"], default=None)
        against = f"{best['contender']}: {best['median'] / ours['median']:.2f}x" if best else ""
        lines.append((*case, ours["contender"], f"{ours['median']:.3g}", f"{ours['ceiling']:.0%}", against))
    return lines


def step_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `profile_step.py`; what is part of something stands under it."""
    body = []
    for row in rows:
        name = "- " * (len(row["path"]) - 1) + row["path"][-1] if row["path"] else "**all of the step**"
        times = row["forward"], row["backward"], row["forward"] + row["backward"]
        rest = "" if row["rest"] is None else f"{row['rest']:.1%}"
        body.append((name, *(f"{time:,.1f}" for time in times), f"{row['share']:.1%}", rest))
    return table(("part", "forward ms", "backward ms", "both", "of the step", "of all but the backbone"), body)


def errors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `precision_errors.py`: a line for every operator and quantity, a column for every way of computing."""
    ways = dict.fromkeys(row["computed"] for row in rows)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        for quantity, what, form in QUANTITIES:
            if row[quantity] is not None:
                line = lines.setdefault((row["op"], row["size"], what), {})
                line[row["computed"]] = format(row[quantity], form)
    body = [(*line, *(cells.get(way, "") for way in ways)) for line, cells in lines.items()]
    return table(("operator", "size", "of", *ways), body)


QUANTITIES = (("values", "values", ".1e"), ("gradient", "gradient", ".1e"), ("rows", "rows changed", ".1%"))
TITLES = ("operator", "size", "dtype", "back end", "median ms", "of ceiling", "times faster than the fastest other")


ERRORS = (
    "The largest differences from float64, and the share of rows that chose other neighbours or are off by more than 1e-5; "
    "what is emulated is arithmetic in float64 (`tools/precision_errors.py`)."
)


def page(record: Record) -> str:
    """The content of a record for a reader."""
    facts = {"date": record.date, "commit": record.commit, "sources": record.sources}
    facts |= record.machine | record.versions
    steps = [(step.name, step.outcome, f"{step.seconds:.0f}") for step in record.steps]
    parts = [
        f"# {record.machine['gpu']}, commit {record.commit}",
        "Written by `tools/gpu_check.py`; nothing here is typed in.",
        table(("", ""), [(name, f"`{value}`") for name, value in facts.items()]),
        "## Steps",
        table(("step", "outcome", "seconds"), steps),
        f"Tests: {counted(record.tests)}.",
    ]
    for row in record.tests:
        if row["outcome"] not in ("passed", "skipped"):
            parts += [f"`{row['name']}` {row['outcome']}:", f"```\n{row['why'].strip()}\n```"]
    if record.errors:
        parts += ["## Errors", ERRORS, errors_table(record.errors)]
    if record.benchmark:
        parts += ["## Timings", table(TITLES, timings(record.benchmark))]
    if record.step:
        parts += ["## A training step", table(("", ""), record.step["facts"].items())]
        parts += [step_table(record.step["rows"])]
    return "\n\n".join(parts) + "\n"


def records(folder: Path = FOLDER) -> list[Record]:
    """All that were written, the newest first."""
    return sorted(map(Record.read, folder.glob("*.json")), key=lambda record: record.date, reverse=True)


def section(found: list[Record], sources: str) -> str:
    """What the README says of GPUs: the newest tests and the newest timings, and whether they are of these `sources`."""
    tested = next((record for record in found if record.tests), None)
    timed = next((record for record in found if record.benchmark), None)
    if timed is None:
        parts = [UNMEASURED]
    else:
        parts = [f"Measured on one {source(timed, sources)}:", table(TITLES, timings(timed.benchmark or {}))]
    if tested is not None:
        parts.append(f"Tests on one {source(tested, sources)}: {counted(tested.tests)}.")
    return "\n\n".join(parts) + "\n"


def source(record: Record, sources: str) -> str:
    stale = "" if record.sources == sources else " (**stale**: the kernels have changed since)"
    return f"{record.machine['gpu']} at commit `{record.commit}`{stale}"


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--tests-only", action="store_true", help="no benchmark")
    parts.add_argument("--bench-only", action="store_true", help="no tests")
    parts.add_argument("--readme", action="store_true", help="write the README's part from docs/gpu; needs no GPU")
    parts.add_argument("--exercise", nargs="+", metavar="BACKEND", help="only call every operator, for a sanitizer")
    parser.add_argument("--sanitize", action="store_true", help="run every operator under compute-sanitizer")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; 9.5 by default")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the files go; docs/gpu by default")
    parser.add_argument("--commit", help="its name, where this is no checkout")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    arguments = parse(given)
    if arguments.readme:
        readme_part.write("gpu_check", section(records(), source_hash()))
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here, so there is nothing to check; run this on a machine with a GPU")
        return 2
    if arguments.exercise:
        return 1 if exercise(arguments.exercise) else 0
    record, path = check(arguments)
    print(path.with_suffix(".md").read_text(), f"written to {path}", sep="\n")
    return 0 if record.passed else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is running ends, too
    sys.exit(main(sys.argv[1:]))
