"""The one exception that stands for "the user can mend this"."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, with a message that names the thing, what was expected, what came, and the remedy."""


def run_tool(main: Callable[[], int]) -> None:
    """Exit with what a tool's `main` returns; a `UserError` prints its message alone and exits with code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
