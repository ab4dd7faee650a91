"""The seconds of an epoch's parts."""

from __future__ import annotations

import itertools

import torch

from engine import phases
from engine.phases import Phases


def use(times):
    for name in ("extract", "train", "train"):
        with times(name):
            pass


def test_parts_of_one_name_are_added(monkeypatch):
    moments = itertools.count(step=2)
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    use(times := Phases(torch.device("cpu")))
    assert times.seconds == {"extract": 2, "train": 4}


def test_a_gpu_is_waited_for_only_when_the_seconds_are_asked_for(monkeypatch):
    events, waited = [], []

    class Event:
        def __init__(self, enable_timing):
            events.append(self)

        def record(self, stream):
            self.moment = 1000 * len(events)

        def elapsed_time(self, other):
            return other.moment - self.moment

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    use(times := Phases(torch.device("cuda")))
    assert len(events) == 6 and not waited
    assert times.seconds == {"extract": 1, "train": 2} and waited
