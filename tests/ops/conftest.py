"""Fixtures of the operator tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.ops import use_backend


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test of native code on every set of vector instructions that this processor has."""
    native = pytest.importorskip("engine._C")
    monkeypatch.setenv("ENGINE_ISA", request.param)
    try:
        return native.isa()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each back end of the CPU."""
    with use_backend(request.param):
        yield request.param
