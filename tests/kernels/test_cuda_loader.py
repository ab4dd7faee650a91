"""How kernels come to a GPU, with a driver and devices that only pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import ops
from engine.ops import _backend, _cuda, set_union

HERE = Path(__file__).parent
SETS = torch.tensor([[3, -1, 1]])
CACHES = (_cuda._kernel, _cuda._loader, _cuda._ahead_of_time, _cuda._at_first_use, _backend._find)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An H100 without kernels compiled ahead of time, with or without a CuPy; the place for such kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_cuda, "FATBINS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", None)


class FakeCompiler(SimpleNamespace):
    """As `cupy_backends.cuda.libs.nvrtc`."""

    class NVRTCError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(programs=[], version=(13, 0), failure=None)

    def getVersion(self) -> tuple[int, int]:
        if self.failure:
            raise self.failure
        return self.version

    def createProgram(self, *program: Any) -> tuple[Any, ...]:
        self.programs.append(program)
        return program

    def compileProgram(self, program: Any, options: tuple[str, ...]) -> None:
        self.options = options

    def getCUBIN(self, program: Any) -> bytes:
        return b"cubin"

    def destroyProgram(self, program: Any) -> None:
        pass


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    compiler = FakeCompiler()
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", compiler)
    return compiler


def load_only(monkeypatch: pytest.MonkeyPatch, runs: bytes) -> list[bytes]:
    """A driver that loads one image and no other; what it was given."""
    from engine import _C

    images: list[bytes] = []

    def load(device: int, image: bytes) -> int:
        images.append(image)
        if image != runs:
            raise _C.CudaError("cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU")
        return 5

    monkeypatch.setattr(_C, "cuda_load_module", load)
    return images


def reason() -> str | None:
    return ops.backends("set_union")["cuda"]


def test_without_a_gpu_there_is_no_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no CUDA device"
    said = "'cuda' of engine.ops.set_union was asked for but cannot run: no CUDA device"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=said):
        set_union(SETS, SETS)


def test_without_nvcc_and_cupy_the_remedies_are_named(gpu, without_cupy):
    said = str(reason())
    assert said.startswith("the package was built without nvcc and has no kernels and CuPy cannot compile them (")
    assert said.endswith("run: pip install 'vireid-engine[cuda13]', or install again where nvcc is")


def test_kernels_for_other_gpus_are_told_from_missing_ones(gpu, without_cupy, monkeypatch):
    (gpu / "set_union.fatbin").write_bytes(b"for another")
    load_only(monkeypatch, b"")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    said = str(reason())
    assert "no kernels that run on compute capability 9.0 (cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU)" in said
    assert "pip install 'vireid-engine[cuda12]'" in said


def test_a_gpu_that_is_too_old_is_named(gpu, compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason() == "Pretended GPU is of compute capability 7.5; the kernels need 8.0 or later"


def test_without_a_driver_cupy_does_not_help(gpu, without_cupy):
    (gpu / "set_union.fatbin").write_bytes(b"good")
    assert "no CUDA driver (libcuda.so.1 cannot be opened)" in str(reason())


def test_a_cupy_that_finds_no_compiler_says_so(gpu, compiler):
    compiler.failure = OSError("libnvrtc.so.13: cannot open")
    assert "CuPy cannot compile them (libnvrtc.so.13: cannot open)" in str(reason())


def test_what_was_compiled_ahead_of_time_comes_first(gpu, compiler, monkeypatch):
    (gpu / "set_union.fatbin").write_bytes(b"good")
    load_only(monkeypatch, b"good")
    assert reason() is None
    assert _cuda.loader("set_union") == _cuda.AHEAD and not compiler.programs


def test_a_kernel_is_compiled_once_per_source_gpu_and_compiler(gpu, compiler, monkeypatch):
    images = load_only(monkeypatch, b"cubin")
    assert reason() is None and _cuda.loader("set_union") == _cuda.NVRTC
    assert not compiler.programs  # only at first use
    _cuda._at_first_use("set_union", 0)
    (program,) = compiler.programs
    assert program[0] == (HERE.parents[1] / "csrc" / "set_union.cu").read_text()
    assert b"sets.h" in program[3] and "--gpu-architecture=sm_90" in compiler.options

    def count_in_a_new_process() -> int:
        _cuda._at_first_use.cache_clear()
        _cuda._at_first_use("set_union", 0)
        return len(compiler.programs)

    assert count_in_a_new_process() == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert count_in_a_new_process() == 2
    compiler.version = (13, 1)
    assert count_in_a_new_process() == 3
    texts = _cuda.sources("set_union")
    monkeypatch.setattr(_cuda, "sources", lambda op: texts | {"sets.h": "changed"})
    assert count_in_a_new_process() == 4
    assert set(images) == {b"cubin"}


def test_a_cache_that_cannot_be_written_is_no_hindrance(gpu, compiler, monkeypatch):
    load_only(monkeypatch, b"cubin")
    (gpu / "cache").write_text("a file where the folder should be")
    assert _cuda._at_first_use("set_union", 0) == 5


def test_falls_back_with_a_warning(gpu, without_cupy, monkeypatch):
    monkeypatch.setattr(_backend, "ORDER", {"cpu": ("cuda", "reference")})
    _backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="set_union: back end 'cuda' cannot run .*CuPy.* using a slower one"):
        assert set_union(SETS, SETS).tolist() == [[1, 3, -1, -1, -1, -1]]


def test_float64_is_left_to_the_reference(gpu, compiler, monkeypatch):
    load_only(monkeypatch, b"cubin")
    rows, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
    monkeypatch.setattr(_backend, "ORDER", {"cpu": ("cuda", "reference")})
    said = "'cuda' of engine.ops.segment_mean does not compute in float64"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=said):
        ops.segment_mean(rows, labels, 3)
    assert torch.equal(ops.segment_mean(rows, labels, 3), rows)


PROGRAM = """
from engine import _C

module = _C.cuda_load_module(1, b"good")
kernel = _C.cuda_find_kernel(1, module, "kernel")
_C.cuda_launch(1, kernel, (1, 2, 3), (4, 5, 6), 789, 11, False, [2**40, 0.5, True, 2**47])
for call in (
    lambda: _C.cuda_load_module(0, b"bad"),
    lambda: _C.cuda_find_kernel(1, module, "another"),
    lambda: _C.cuda_load_module(2, b"good"),
    lambda: _C.cuda_launch(1, kernel, (1, 1, 1), (1, 1, 1), 0, 0, True, []),
):
    try:
        call()
    except _C.CudaError as error:
        print(error, flush=True)
"""
PRINTED = """retain 1
attribute 8: 99000
launch 8 in 101: 1 2 3, 4 5 6, 789 bytes, stream 11: 1099511627776 0.5 1 140737488355328
retain 0
cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU
another: CUDA_ERROR_NOT_FOUND
cuDeviceGet: an unknown error
cooperative launch
cuLaunchCooperativeKernel: an unknown error
"""


def test_the_driver_gets_what_it_takes(tmp_path):
    """In a process of its own, whose driver prints what it is asked for."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fpic", HERE / "fake_libcuda.cpp", "-o", library], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED
