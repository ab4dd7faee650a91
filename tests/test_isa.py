from __future__ import annotations

import pytest

from engine import _C


def test_the_environment_can_narrow_the_vector_instructions(monkeypatch):
    monkeypatch.setenv("ENGINE_ISA", "portable")
    assert _C.isa() == "portable"


def test_unset_or_empty_the_widest_is_taken(monkeypatch):
    monkeypatch.delenv("ENGINE_ISA", raising=False)
    widest = _C.isa()
    for name in ("", widest):
        monkeypatch.setenv("ENGINE_ISA", name)
        assert _C.isa() == widest


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("ENGINE_ISA", "sse9")
    with pytest.raises(ValueError, match="ENGINE_ISA must be portable, avx2 or avx512, .*; got sse9"):
        _C.isa()
