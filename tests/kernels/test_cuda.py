"""CUDA sources where there is no GPU: compiled for two generations of them, and fit for both of their compilers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from engine.ops import _cuda

CSRC = Path(__file__).parents[2] / "csrc"
OPERATORS = sorted(path.stem for path in CSRC.glob("*.cu"))
FOR_HOSTS = re.compile(r"#(?:ifndef __CUDA_ARCH__|ifdef __CUDACC_RTC__.*?#else)\n.*?#endif", re.DOTALL)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SPILLS = re.compile(r"Function properties for (\w+)\n *\d+ bytes stack frame, (\d+) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")


def nvrtc() -> ModuleType:
    try:
        return _cuda.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_for_two_generations_without_spilling_registers(op, tmp_path):
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    command = [NVCC, "-std=c++17", "-fatbin", *targets, "-Xptxas=-v", "-o", tmp_path / "fatbin", CSRC / f"{op}.cu"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    spills = SPILLS.findall(done.stderr)
    assert len(spills) == len(REGISTERS.findall(done.stderr)) > 0
    assert all(stored == "0" for _, stored in spills), done.stderr


@pytest.mark.parametrize("op", OPERATORS)
def test_includes_nothing_but_headers_of_its_own(op):
    for name, text in _cuda.sources(op).items():
        included = re.findall(r"#include +(\S+)", FOR_HOSTS.sub("", text))
        assert all(re.fullmatch(r'"\w+\.h"', header) for header in included), f"{name} includes {included}"


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_at_run_time(op, architecture):
    options = (*_cuda.OPTIONS, f"--gpu-architecture={architecture}")
    assert _cuda.compile_source(nvrtc(), _cuda.sources(op), options).startswith(b"\x7fELF")


def test_tells_what_the_run_time_compiler_says():
    with pytest.raises(RuntimeError, match="NVRTC cannot compile csrc/wrong.cu: .*error"):
        _cuda.compile_source(nvrtc(), {"wrong.cu": "no code"}, _cuda.OPTIONS)
