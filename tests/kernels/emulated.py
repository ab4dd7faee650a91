"""The kernels of csrc/*.cu on the CPU, behind cuda_emulator.h: `launch` stands in for that of `engine.ops._cuda`."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from engine.ops import _backend, _cuda

CSRC = Path(__file__).parents[2] / "csrc"
EMULATOR = Path(__file__).with_name("cuda_emulator.h")
COMPILER = [
    "g++",
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-w",
    "-D__CUDA_ARCH__=800",
]  # headers as the device has them
if "libasan" in os.environ.get("LD_PRELOAD", ""):  # see .ci/sanitize; the stacks of fibers are none that it knows
    COMPILER += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]
KERNEL = re.compile(r'extern "C"\s+__global__\s+void\s+(\w+)\(')
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__attribute__\s*\(\(aligned\(\w+\)\)\)\s+)?([\w: ]+?)\s+(\w+)\[\];")

LAUNCHER = (
    'extern "C" const char* emulated_{name}(emulator::Launch* launch) {{ return emulator::run({name}, *launch); }}\n'
)
_descending = False


class Launch(ctypes.Structure):
    """As in cuda_emulator.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("cooperative", ctypes.c_bool),
        ("descending", ctypes.c_bool),
        ("arguments", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


@cache
def _folder() -> str:
    """Of the libraries, for as long as the process lasts."""
    folder = tempfile.TemporaryDirectory(prefix="emulated_")
    atexit.register(folder.cleanup)
    return folder.name


@cache
def library(source: Path) -> ctypes.CDLL:
    """A .cu file as a library with a function `emulated_<kernel>` for each of its kernels."""
    preprocess = [*COMPILER, "-E", "-I", str(CSRC), "-include", str(EMULATOR), "-x", "c++", str(source)]
    text = subprocess.run(preprocess, capture_output=True, check=True, text=True).stdout
    names = KERNEL.findall(text)
    text = DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(emulator::current->shared.data());", text)
    text = text.replace("__shared__", "static thread_local").replace("__global__", "")
    text += "namespace engine {}\nusing namespace engine;\n"
    text += "".join(LAUNCHER.format(name=name) for name in names)
    target = Path(_folder(), source.stem)
    target.with_suffix(".cpp").write_text(text)
    build = [*COMPILER, "-fpic", "-shared", "-pthread", f"{target}.cpp", "-o", f"{target}.so"]
    done = subprocess.run(build, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(f"{target}.so")


def launch(
    op: str | Path,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Sequence[Any],
    *,
    shared_bytes: int = 0,
    cooperative: bool = False,
) -> None:
    """Run every thread of a kernel of csrc/<op>.cu, or of another file.

    Raises:
        RuntimeError: the arguments are not those of the kernel, or its threads do what the hardware leaves undefined.
    """
    grid, block = _cuda.three(grid), _cuda.three(block)
    if 0 in grid:
        return
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    sizes = (ctypes.c_size_t * len(values))(*map(ctypes.sizeof, values))
    addresses = ctypes.addressof(pointers), ctypes.addressof(sizes)
    run = library(op if isinstance(op, Path) else CSRC / f"{op}.cu")[f"emulated_{kernel}"]
    run.restype = ctypes.c_char_p
    failure = run(ctypes.byref(Launch(grid, block, shared_bytes, cooperative, _descending, *addresses, len(values))))
    if failure:
        raise RuntimeError(f"{kernel}: {failure.decode()}")


def _value(argument: Any) -> Any:
    """As csrc/cuda_driver.cpp packs it."""
    if isinstance(argument, Tensor) or argument is None:
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}
    return kinds[type(argument)](argument)


@contextmanager
def cuda_backend(*, descending: bool = False) -> Iterator[None]:
    """Inside the block operators run their `cuda` form, where they have one, on CPU tensors.

    Args:
        descending: threads run from the last to the first between two barriers; no result may hang on it.
    """
    order = _backend.ORDER | {"cpu": ("cuda", "reference")}
    with ExitStack() as stack:
        stack.enter_context(patch.object(_cuda, "launch", launch))
        stack.enter_context(patch.object(_cuda, "loader", lambda op: "emulated"))
        stack.enter_context(patch.object(_cuda, "multiprocessors", lambda device: 2))
        stack.enter_context(patch.object(_backend, "ORDER", order))
        stack.enter_context(patch(f"{__name__}._descending", descending))
        _backend._find.cache_clear()
        try:
            yield
        finally:
            _backend._find.cache_clear()
