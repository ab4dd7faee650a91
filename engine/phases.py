"""Where the time of an epoch goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Phases:
    """Seconds per named part of an epoch. A GPU tells them by its own clock: nothing waits for it between the parts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._parts.append((name, start, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """Of the parts that have ended, by name; waits for the device."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, start, end in self._parts:
            passed = start.elapsed_time(end) / 1000 if on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + passed
        return seconds

    def _now(self) -> Any:
        """The time, or on a GPU an event that will know when all work before it was done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
