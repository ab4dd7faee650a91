"""The one exception that stands for "the user can mend this"."""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable

from engine import stopping
from engine.allocator import keep_freed_memory


class UserError(Exception):
    """Bad input, with a message that names the thing, what was expected, what came, and the remedy."""


def command(tool: str) -> str:
    """A tool as one would call it here: "vireid train" where that is how this process was called."""
    return f"vireid {tool}" if sys.argv[0].startswith("vireid ") else f"python tools/{tool}.py"


def run_tool(main: Callable[[], int]) -> None:
    """Exit with what a tool's `main` returns; a `UserError` or a full disk prints its message alone, and code 2.

    Ctrl-C and SIGTERM raise `stopping.Stopped` in `main`. Where nobody reads the output any more, as behind `| head`, the tool
    ends without a word, by the code of SIGPIPE.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    faulthandler.enable(2)  # says where, when a disk that a file is mapped from fails
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = _outcome(main)
        sys.stdout.flush()
    except BrokenPipeError:
        for stream in (1, 2):  # or Python fails once more, as it flushes what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _outcome(main: Callable[[], int]) -> int:
    try:
        with stopping.graceful():
            stopping.end_with_parent()
            return main()
    except stopping.Stopped as stop:
        print("\nstopped", file=sys.stderr)
        return stop.code
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = f"the disk is full ({error.filename or 'writing the log'}); make room, then go on with --resume"
    rank = os.environ.get("RANK", "0")
    print(f"error{f' of process {rank}' * (rank != '0')}: {message}", file=sys.stderr)
    return 2
