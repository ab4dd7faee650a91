"""The rule of the operators: one name leads to the public function, its definition, its back ends and its tests."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from engine import ops

ROOT = Path(__file__).parents[2]
TOOLS = {"backends", "use_backend"}
RESULT_TYPES = {"Ranking", "Sinkhorn"}
OPERATORS = sorted(set(ops.__all__) - TOOLS - RESULT_TYPES)
COMMON_SOURCES = {
    "bindings.cpp",
    "block.h",
    "components.h",
    "contrast.cpp",
    "contrast.h",
    "cuda_driver.cpp",
    "cuda_driver.h",
    "host_device.h",
    "isa.cpp",
    "isa.h",
    "matmul.cpp",
    "matmul.h",
    "neighbors.h",
    "parallel.h",
    "rows.h",
    "search.h",
    "sets.h",
    "sources.cpp",
    "sources.h",
    "storage.h",
    "vectors.h",
    "warp_sets.h",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_its_module_definition_and_test_file(name):
    module = importlib.import_module(f"engine.ops.{name}")
    function = getattr(ops, name)
    assert inspect.unwrap(function).__module__ == module.__name__
    assert "Raises:" in (function.__doc__ or "")
    assert list(inspect.signature(module.reference).parameters) == list(inspect.signature(function).parameters)
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file()
    assert ops.backends(name)["reference"] is None


def test_every_operator_module_is_exported():
    modules = {path.stem for path in (ROOT / "engine" / "ops").glob("[a-z]*.py")}
    assert modules == set(OPERATORS)


def test_every_native_source_belongs_to_an_operator_with_that_back_end():
    for path in (ROOT / "csrc").iterdir():
        if path.name not in COMMON_SOURCES:
            assert path.stem in OPERATORS, f"{path.name} is named like no operator"
            backend = "cuda" if path.suffix == ".cu" else "cpu"
            assert hasattr(importlib.import_module(f"engine.ops.{path.stem}"), backend)


def test_every_kernel_belongs_to_an_operator():
    assert {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")} <= set(OPERATORS)
