"""Serve a model: `python serve.py chat|batch|http CHECKPOINT`."""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter

from dsjax.cli import Parser, run
from dsjax.serving.options import ModelOptions, add_batch, add_chat, add_http

EXAMPLES = """\
examples:
  python serve.py chat runs/demo
  python serve.py batch runs/demo --input requests.jsonl --output answers.jsonl
  python serve.py http runs/demo --port 8000 --memory 1GiB

`serve.py VERB --help` explains a verb. Exit codes: 0 done, 2 your input is wrong (one line says
what), 130 and 143 stopped by Ctrl-C and SIGTERM, 1 a fault of ours.
"""


def main() -> None:
    """Parse, and call the verb; it imports what it needs, since `--help` needs no jax."""
    parser = Parser(prog="serve.py", description="Talk to a model, or let programs do so.",
                    epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_chat(verbs, _chat)
    add_batch(verbs, _batch)
    add_http(verbs, _http)
    arguments = parser.parse_args()
    arguments.call(arguments, ModelOptions.of(arguments))


def _chat(asked: Namespace, model: ModelOptions) -> None:
    from dsjax.serving.opening import open_model
    from dsjax.serving.terminal import run_chat

    run_chat(*open_model(model), asked.temperature)


def _batch(asked: Namespace, model: ModelOptions) -> None:
    from dsjax.serving.batch import run_batch

    run_batch(asked.input, asked.output, model)


def _http(asked: Namespace, model: ModelOptions) -> None:
    from dsjax.serving.http import HttpSettings, listen, run_http
    from dsjax.serving.opening import open_model
    from dsjax.serving.security import check_exposure, read_keys

    keys = read_keys(asked.api_key_file)
    settings = HttpSettings(asked.host, asked.port, keys, asked.without_key)
    check_exposure(asked.host, keys, without_key=asked.without_key)
    listen(settings).close()  # a port that cannot be had is refused before weights are loaded
    run_http(*open_model(model), settings)


if __name__ == "__main__":
    run(main)
