"""Operators of the engine: one file each, a plain torch reference, and faster back ends held to it."""

from __future__ import annotations

from engine.ops._backend import backends, use_backend
from engine.ops.topk import topk

__all__ = [
    "backends",
    "topk",
    "use_backend",
]
