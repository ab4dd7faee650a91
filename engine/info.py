"""`python -m engine.info`: versions, devices, and which back end runs every operator here, or why not."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import engine
from engine import ops
from engine.ops import _cuda
from engine.ops._backend import BACKENDS, backends, exists

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pillow", "pyyaml")


def operator_names() -> list[str]:
    """The operators of `engine.ops`, which are the exported names that have a module of their own name."""
    exported = (getattr(ops, name) for name in ops.__all__)
    return sorted(item.__name__ for item in exported if item.__module__ == f"engine.ops.{item.__name__}")


def versions() -> dict[str, str]:
    """Version by name, of the engine, Python and the packages that results depend on."""
    found = {"vireid-engine": engine.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the checkout the engine is imported from, `-dirty` when changed; None outside of one."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return run.stdout.strip() or None


def cpu_name() -> str:
    """What the processor calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> list[str]:
    """One line per device torch can use, the CPU first."""
    cpu = f"cpu: {cpu_name()}, {torch.get_num_threads()} threads"
    gpus = [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [cpu, *(gpus or ["cuda: no device"])]


def table() -> list[str]:
    """Operators x back ends as lines: `yes`, `-` where there is no such form, a number where a note says more."""
    notes: list[str] = []
    lines = [f"{'operator':<18}" + "".join(f"{name:<11}" for name in BACKENDS)]
    for op in operator_names():
        cells = [_cell(op, name, reason, notes) for name, reason in backends(op).items()]
        lines.append(f"{op:<18}" + "".join(f"{cell:<11}" for cell in cells))
    return lines + [f"({number}) {note}" for number, note in enumerate(notes, start=1)]


def _cell(op: str, name: str, reason: str | None, notes: list[str]) -> str:
    if not exists(op, name):
        return "-"
    answer, note = ("no", reason) if reason is not None else ("yes", _cuda.loader(op) if name == "cuda" else None)
    if note is None:
        return answer
    if note not in notes:
        notes.append(note)
    return f"{answer} ({notes.index(note) + 1})"


def main() -> None:
    """Print everything."""
    for name, version in versions().items():
        print(f"{name:<14}{version}")
    print(*devices(), "", *table(), sep="\n")


if __name__ == "__main__":
    main()
