"""Being told to stop, by Ctrl-C or by whoever runs the machine: nothing is cut in two, and nobody is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PARENT = "ENGINE_PARENT"  # names the process without which this one shall not go on
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_depth = 0  # of `held` blocks
_waiting = 0  # the signal that came inside of them
_ECHO = 1.0  # seconds in which another signal is the same: torchrun passes on what a scheduler sends to all processes
_latest = -_ECHO


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came.

    Attributes:
        code: the exit code that shells expect, 130 or 143.
        cut: it came a second time, inside of a `held` block, which was left half done.
    """

    def __init__(self, number: int, cut: bool = False) -> None:
        super().__init__("stopped")
        self.code, self.cut = 128 + number, cut


@contextmanager
def graceful() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped`; afterwards they do what they did before.

    Where a signal was ignored it stays so. Threads other than the main one cannot handle signals: there nothing changes.
    """
    global _waiting, _latest
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        _waiting, _latest = 0, -_ECHO
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """What must not be cut in two: a signal that comes inside raises `Stopped` at the end, a second one at once.

    One that comes within a second of another is no second one.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _waiting and not _depth:
        raise Stopped(_waiting)


def waiting() -> int:
    """The signal that came inside of the running `held` block; 0 = none."""
    return _waiting


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one in $ENGINE_PARENT, which started it, ends in any way."""
    parent = os.environ.pop(PARENT, "")
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it ended before the kernel was asked
            signal.raise_signal(signal.SIGTERM)


def _handle(number: int, _: FrameType | None) -> None:
    global _waiting, _latest
    now = time.monotonic()
    if now < _latest + _ECHO:
        return
    _latest = now
    if not _depth or _waiting:
        raise Stopped(number, cut=_depth > 0)
    _waiting = number
    with suppress(OSError):  # Ctrl-C ends `| tee` too; the step is saved all the same
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print() may be what was interrupted
