"""The kernels of csrc/<op>.cu: found or compiled, loaded on a device and started on torch's stream.

The package holds them compiled ahead of time where nvcc was there when it was built. Where it was not, or where what it
holds does not run on a GPU, CuPy's NVRTC compiles the same source at first use and the result is kept in a cache.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.folders import cache_folder

PACKAGE = Path(__file__).parents[1]
FATBINS = PACKAGE / "fatbins"
INCLUDE = re.compile(r'^#include "(\w+\.h)"', re.MULTILINE)
AHEAD, NVRTC = "compiled ahead of time by nvcc", "compiled at first use by NVRTC"
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
"""Of NVRTC, which knows no functions for the host; headers of csrc/ hold some."""
OLDEST = (8, 0)
"""The compute capability that the kernels are written for: their atomics, shared memory and asynchronous copies."""


class Unavailable(Exception):
    """Why the kernels of an operator cannot run here, and what to do."""


def launch(
    op: str,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Sequence[Tensor | float | None],
    *,
    shared_bytes: int = 0,
    cooperative: bool = False,
) -> None:
    """Start a kernel of csrc/<op>.cu on the device of its tensors, on torch's current stream there.

    Args:
        op: the operator.
        kernel: name of the kernel.
        grid, block: their sizes; nothing is started for a grid of size 0.
        arguments: in order; a tensor is handed over as its address, None as a null pointer, an int as int64, a float as
            float, a bool as bool. The first tensor is on the device.
        shared_bytes: dynamic shared memory of a block.
        cooperative: all blocks are there at once.

    Raises:
        RuntimeError: the driver or the compiler refuses.
    """
    from engine import _C

    sizes = three(grid)
    if 0 in sizes:
        return
    device = next(argument for argument in arguments if isinstance(argument, Tensor)).get_device()
    _C.cuda_launch(
        device,
        _kernel(op, kernel, device),
        sizes,
        three(block),
        shared_bytes,
        torch.cuda.current_stream(device).cuda_stream,
        cooperative,
        [_packed(argument) for argument in arguments],
    )


def three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    """The size of a grid or block in three dimensions."""
    x, y, z = (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)[:3]
    return x, y, z


def name_of(dtype: torch.dtype) -> str:
    """As kernels are named for what they read: float32, float16 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: as many blocks as fit on each can wait for each other."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def loader(op: str) -> str:
    """How the kernels of an operator come to the current device: `AHEAD` or `NVRTC`.

    Raises:
        Unavailable: they do not.
        ImportError: engine._C is not built.
    """
    importlib.import_module("engine._C")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    return _loader(op, torch.cuda.current_device())


def sources(op: str) -> dict[str, str]:
    """csrc/<op>.cu and the headers it includes, by name, the .cu first.

    Raises:
        FileNotFoundError: a file includes a header that csrc/ does not hold.
    """
    packaged = PACKAGE / "csrc"
    folder = packaged if packaged.is_dir() else PACKAGE.parent / "csrc"
    found: dict[str, str] = {}
    waiting = [f"{op}.cu"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (folder / name).read_text()
            waiting += INCLUDE.findall(found[name])
    return found


def _packed(argument: Tensor | float | None) -> float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


@cache
def _kernel(op: str, name: str, device: int) -> int:
    from engine import _C

    module, _ = _ahead_of_time(op, device)
    return _C.cuda_find_kernel(device, _at_first_use(op, device) if module is None else module, name)


@cache
def _loader(op: str, device: int) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise Unavailable(f"{name} is of compute capability {_dotted(capability)}; the kernels need 8.0 or later")
    module, missing = _ahead_of_time(op, device)
    if module is not None:
        return AHEAD
    try:
        nvrtc()
    except ImportError as error:
        extra = f"cuda{str(torch.version.cuda).partition('.')[0]}"
        raise Unavailable(
            f"{missing} and CuPy cannot compile them ({error}); run: pip install 'vireid-engine[{extra}]', "
            "or install again where nvcc is"
        ) from error
    return NVRTC


@cache
def _ahead_of_time(op: str, device: int) -> tuple[int | None, str]:
    """The module of the package, or None and the reason. Whether it runs on the device shows when it is loaded."""
    from engine import _C

    fatbin = FATBINS / f"{op}.fatbin"
    if not fatbin.is_file():
        return None, "the package was built without nvcc and has no kernels"
    try:
        return _C.cuda_load_module(device, fatbin.read_bytes()), ""
    except _C.CudaError as error:
        capability = _dotted(torch.cuda.get_device_capability(device))
        return None, f"the package has no kernels that run on compute capability {capability} ({error})"


@cache
def _at_first_use(op: str, device: int) -> int:
    from engine import _C

    return _C.cuda_load_module(device, _compiled(op, torch.cuda.get_device_capability(device)))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def nvrtc() -> Any:
    """CuPy's binding of NVRTC.

    Raises:
        ImportError: there is none, or it finds no NVRTC.
    """
    binding = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    try:
        binding.getVersion()
    except Exception as error:  # CuPy opens the library at the first call, and tells in several ways that it cannot
        raise ImportError(str(error)) from error
    return binding


def _compiled(op: str, capability: tuple[int, int]) -> bytes:
    """csrc/<op>.cu as a cubin, from the cache where it was compiled before: same text, options, GPU and compiler."""
    binding = nvrtc()
    texts = sources(op)
    options = (*OPTIONS, f"--gpu-architecture=sm_{capability[0]}{capability[1]}")
    identity = repr((texts, options, binding.getVersion()))
    kept = cache_folder() / "kernels" / f"{op}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    image = compile_source(binding, texts, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(image)
        unfinished.replace(kept)
    except OSError:  # compiled again by the next process
        pass
    return image


def compile_source(binding: Any, texts: dict[str, str], options: Sequence[str]) -> bytes:
    """A cubin of the first of `texts`, which includes the others.

    Raises:
        RuntimeError: with what the compiler says.
    """
    (name, text), *headers = texts.items()
    contents = [content.encode() for _, content in headers]
    program = binding.createProgram(text, name, contents, [header.encode() for header, _ in headers])
    try:
        binding.compileProgram(program, options)
        return binding.getCUBIN(program)
    except binding.NVRTCError as error:
        raise RuntimeError(f"NVRTC cannot compile csrc/{name}: {binding.getProgramLog(program)}") from error
    finally:
        binding.destroyProgram(program)
