"""One value per modality, so that nothing is written twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Modality = Literal["vis", "ir"]


@dataclass(frozen=True)
class Pair(Generic[T]):
    """A visible and an infrared value of the same kind."""

    vis: T
    ir: T

    def map(self, function: Callable[..., R], *others: Pair[Any]) -> Pair[R]:
        """`function` of both values; values of `others` follow as further arguments."""
        return Pair(
            function(self.vis, *(other.vis for other in others)),
            function(self.ir, *(other.ir for other in others)),
        )

    def swap(self) -> Pair[T]:
        """The same two values, each in the other's place."""
        return Pair(self.ir, self.vis)

    def __getitem__(self, modality: Modality) -> T:
        if modality not in ("vis", "ir"):
            raise KeyError(f"modality must be 'vis' or 'ir', got {modality!r}")
        return getattr(self, modality)

    def __iter__(self) -> Iterator[T]:
        yield self.vis
        yield self.ir
