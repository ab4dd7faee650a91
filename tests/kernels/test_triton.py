"""Triton kernels where there is no GPU: run by the interpreter, and compiled for two generations of GPUs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.ops import _csr

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def arguments(op: str, dtype: torch.dtype, precision: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the engine hands to the kernels of an operator at the sizes they are made for."""
    if op == "sinkhorn":
        return (torch.empty(2, 11909, 800, dtype=dtype), 0.1), {"relax": 1.0, "max_iter": 2}
    if op == "propagate":
        nothing = torch.empty(0, dtype=torch.int64)
        csr = _csr.build(torch.zeros(100, dtype=torch.int64), nothing, torch.empty(0), 50)
        return (csr, torch.empty(50, 2048, dtype=dtype)), {}
    features, bank = torch.empty(256, 2048, dtype=dtype), torch.empty(9000, 2048, dtype=dtype)
    target = {
        "cluster_contrast": torch.empty(256, dtype=torch.int64),
        "neighbor_contrast": torch.empty(256, 30, dtype=torch.int64),
        "soft_contrast": torch.empty(256, 9000),
    }
    return (features, bank, target[op], 0.05, True, precision), {}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants it was launched with."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]

    @classmethod
    def of(cls, kernel: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Launch:
        signature, constants = {}, {}
        values = dict(zip(kernel.arg_names, positional, strict=False)) | named
        options = {name: value for name, value in values.items() if name not in kernel.arg_names}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        return cls(kernel, signature, constants, options)

    def resources(self, capability: int) -> dict[str, int]:
        """Registers and bytes of stack of one thread, compiled for a generation of GPUs."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(self.kernel.arg_names)
            if self.signature[name].startswith("*")
        }
        source = ASTSource(fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [reader, "--dump-resource-usage", cubin.name]
            report = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", report)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches of kernels, written down instead of made."""
    launches: list[Launch] = []

    def write_down(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch.of(kernel, positional, named))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", write_down)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    yield launches


KERNELS = sorted(path.stem for path in (HERE.parents[1] / "kernels").glob("[a-z]*.py"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", ["ieee", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", KERNELS)
def test_kernels_compile_without_spilling_registers(op, dtype, precision, capability, launched):
    positional, named = arguments(op, dtype, precision)
    getattr(importlib.import_module(f"engine.kernels.{op}"), op)(*positional, **named)
    assert launched
    for launch in {repr(launch): launch for launch in launched}.values():
        resources = launch.resources(capability)
        assert resources["STACK"] == 0, f"{launch.kernel.__name__}: {resources}"


def test_kernels_agree_with_the_references_on_the_interpreter():
    """In a process of its own, as Triton reads the setting when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(HERE.glob("interpreted_*.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
