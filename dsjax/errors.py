"""The one exception that means: the user's input is wrong, not our code."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line and names what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: object) -> str:
    """Any message on a single line."""
    return " ".join(str(error).split())
