"""`engine.kernels.<op>`: the Triton form of an operator, packaged in engine/kernels/, in a checkout ../kernels/."""

from __future__ import annotations

from pathlib import Path

_packaged = Path(__file__).with_suffix("")
__path__ = [str(_packaged if _packaged.is_dir() else Path(__file__).parents[1] / "kernels")]
