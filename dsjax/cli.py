"""The `dsjax` command: verbs for looking at models and moving them about.

Importing this imports no jax; a verb imports what it needs when it is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from dsjax.errors import UserError, one_line

DESCRIPTION = "DeepSeek-V3 and R1 in JAX: look at models, here; train.py trains one."

EXAMPLES = """\
examples:
  dsjax inspect v3-671b            a model named in configs/model/
  dsjax inspect ./DeepSeek-R1      a Hugging Face folder; only headers are read
  dsjax inspect v3-671b --json     the same for programs

`dsjax VERB --help` explains a verb. Exit codes: 0 done, 2 your input is wrong, 1 our fault.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; `{self.prog} --help` explains")


def run(command: Callable[[], None]) -> NoReturn:
    """Call `command` and leave with the exit code that all commands share.

    0 when done; 2 when the user's input is wrong, with one line on stderr; 130 when interrupted.
    Any other exception is our fault: it shows its traceback, and Python exits with 1.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def main() -> NoReturn:
    """The console script."""
    run(_call_verb)


def _call_verb() -> None:
    """Parse the command line and call its verb."""
    parser = Parser(
        prog="dsjax",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_inspect(verbs)
    arguments = vars(parser.parse_args())
    arguments.pop("verb")(**arguments)


def _add_inspect(verbs: argparse._SubParsersAction[Parser]) -> None:
    verb = verbs.add_parser(
        "inspect",
        help="what a model is: family, parameters by kind, dtypes, sizes",
        description="Say what a model is, without loading it: family, parameters by kind, dtypes, "
        "sizes. Of a folder only headers are read, and every tensor is accounted for.",
    )
    verb.add_argument(
        "source",
        metavar="CONFIG|FOLDER",
        help="a Hugging Face folder, a config.json, a YAML file, or a name under configs/",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(verb=_inspect)


def _inspect(source: str, json: bool) -> None:
    from dsjax.checkpoint.inspect import inspect

    inspect(source, as_json=json)
