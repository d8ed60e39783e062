"""The one exception that means: the user's input is wrong, not our code."""

from __future__ import annotations

LONGEST = 2000
"""Characters of a message: it quotes what a file says, and a file may say anything."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names what was found, what was expected and what to do. It is one line of printable
    text, whatever a damaged or hostile file put into it. The command line prints it without a
    traceback and exits with code 2.
    """

    def __init__(self, message: object):
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """Any message on a single line: cut in its middle if it is long, and safe for a terminal.

    >>> one_line("two\\nlines, \\x1b[31mred")
    'two lines, \\\\x1b[31mred'
    """
    text = " ".join(str(message).split())
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
