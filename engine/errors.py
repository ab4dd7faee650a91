"""The one exception that stands for "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, with a message that names the thing, what was expected, what came, and the remedy.

    The tools print the message without a traceback and exit with code 2.
    """
