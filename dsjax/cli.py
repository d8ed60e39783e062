"""The `dsjax` command: verbs for looking at models and moving them about.

Importing this imports no jax; a verb imports what it needs when it is called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dsjax.cli_plan import add_plan
from dsjax.cli_sample import add_sample
from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath, as_path
from dsjax.serving.options import mesh_sizes

DESCRIPTION = (
    "DeepSeek-V3 and R1 in JAX: models looked at, moved and measured; train.py trains one."
)

EXAMPLES = """\
examples:
  dsjax inspect v3-671b            a model named in configs/model/
  dsjax inspect ./DeepSeek-R1      a Hugging Face folder; only headers are read
  dsjax inspect v3-671b --json     the same for programs
  dsjax convert ./DeepSeek-R1 ./r1 --dry-run       what a conversion would do
  dsjax eval runs/demo --tasks letters             how often it counts letters right
  dsjax sample my-prompts.yaml                     its right answers, as data to train on
  dsjax plan v3-671b-v5p-512 --topology v5p:8x8x8  what a run takes on TPUs that are not there

`dsjax VERB --help` explains a verb. Exit codes: 0 done, 2 your input is wrong, 1 our fault.
"""


OTHERS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES")
"""Variables that tell a process of others: explicitly, under Slurm, in GKE."""

Value = TypeVar("Value")


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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def read_together(read: Callable[[], Value]) -> Value:
    """What `read` makes of the command line; its complaint ends the run's other processes as well.

    They would wait for this one otherwise. Only where the environment says that there are others,
    jax is imported for that.
    """
    try:
        return read()
    except UserError:
        if os.environ.keys().isdisjoint(OTHERS):
            raise
        from dsjax.config import DistributedConfig
        from sharding.distributed import processes

        with processes(DistributedConfig()):
            raise
    raise AssertionError("the others have been told")


def main() -> NoReturn:
    """The console script."""
    run(_call_verb)


def make_parser() -> Parser:
    """The command line: every verb, with the function that it calls as `verb`."""
    parser = Parser(
        prog="dsjax",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_inspect(verbs)
    _add_convert(verbs)
    _add_eval(verbs)
    add_sample(verbs)
    add_plan(verbs)
    return parser


def _call_verb() -> None:
    """Parse the command line and call its verb.

    Settings, `section.key=value`, may stand behind options, where argparse does not look for them.
    """
    parser = make_parser()
    known, others = parser.parse_known_args()
    arguments = vars(known)
    settings = [text for text in others if "=" in text and not text.startswith("-")]
    if settings != others or (others and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if settings:
        arguments["overrides"] = [*arguments["overrides"], *settings]
    arguments.pop("verb")(**arguments)


def _path(text: str) -> Path:
    """A path that can be looked at; whether something is there is for the verb to say."""
    try:
        path = as_path(text)
        if not isinstance(path, ObjectPath):
            path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except OSError as error:  # too long, forbidden, or a link to itself
        raise argparse.ArgumentTypeError(f"cannot be looked at: {one_line(error)}") from None
    return path


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
        type=_path,
        help="a Hugging Face folder, dsjax weights, a run, a GGUF file, a config.json, a YAML "
        "file, or a name under configs/; folders may be in a bucket, gs://...",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument(
        "--verify",
        action="store_true",
        help="first read every file of a folder, and check it against the manifest.json that "
        "dsjax wrote there",
    )
    _add_allow_pickle(verb)
    verb.set_defaults(verb=_inspect)


def _add_allow_pickle(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read PyTorch's .bin, .pt and .pth too, a format that can carry code, by torch's "
        "weights-only loader, which runs none",
    )


def _inspect(source: Path, json: bool, verify: bool, allow_pickle: bool) -> None:
    from dsjax.checkpoint.inspect import inspect

    inspect(str(source), as_json=json, verify=verify, allow_pickle=allow_pickle)


CONVERT = """\
Bring a model from one format to another: a Hugging Face folder (safetensors), dsjax weights (read
by orbax, and by dsjax slice by slice), or, to read from, the newest checkpoint of a training run or
a GGUF file of llama, qwen2 or qwen3.

Numbers are kept as they are stored unless --dtype says otherwise; FP8 keeps its bits and scales.
The MTP layer, config.json, generation_config.json, tokenizer and chat templates travel along. The
model streams by in some 300 MB of memory, whatever its size. DST is written as DST.partial and
gets its name when it is whole; killed, the same command goes on where it was. SRC and DST may be in
a bucket, gs://BUCKET/PATH; there what makes DST a model is written last."""

CONVERT_EXAMPLES = """\
examples:
  dsjax convert DeepSeek-R1 r1 --dry-run            tensors, files, bytes, memory, disk
  dsjax convert DeepSeek-R1 r1                      to dsjax weights, in FP8 as released
  dsjax convert DeepSeek-R1 r1 --dtype bfloat16     the same, widened
  dsjax convert DeepSeek-R1 r1-bf16 --to hf --dtype bfloat16
                                                    a Hugging Face folder in bfloat16
  dsjax convert runs/demo demo-hf                   a run, for other libraries
  dsjax convert base merged --to hf --adapter runs/me/adapter
  dsjax convert model.gguf folder                   to a Hugging Face folder, in float32
  dsjax convert old folder --to hf --allow-pickle   pytorch_model.bin to safetensors
  dsjax convert gs://bucket/DeepSeek-R1 gs://bucket/r1
                                                    between buckets, or a bucket and a disk
  dsjax inspect --verify r1                         later: is every byte still there?
"""


def _add_convert(verbs: argparse._SubParsersAction[Parser]) -> None:
    verb = verbs.add_parser(
        "convert",
        help="from Hugging Face folders to dsjax weights and back, in a chosen dtype",
        description=CONVERT,
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "source", metavar="SRC", type=_path, help="the folder that holds the model, or a GGUF file"
    )
    verb.add_argument(
        "destination", metavar="DST", type=_path, help="a folder that is not there yet"
    )
    verb.add_argument(
        "--to",
        metavar="dsjax|hf",
        help="what DST will be; left out: dsjax from a Hugging Face folder, hf from the others",
    )
    verb.add_argument(
        "--dtype",
        metavar="float32|bfloat16|fp8",
        help="what numbers become (router biases: float32; fp8: what DeepSeek quantizes, the rest "
        "in bfloat16); left out: as they are stored",
    )
    verb.add_argument(
        "--adapter",
        metavar="FOLDER",
        type=_path,
        help="merge the low-rank adapters that a tuning run or PEFT wrote there into the weights",
    )
    verb.add_argument(
        "--verify", action="store_true", help="at the end read DST again, and compare it with SRC"
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would be done, from headers; write nothing"
    )
    _add_allow_pickle(verb)
    verb.set_defaults(verb=_convert)


def _convert(source: Path, destination: Path, **options: Any) -> None:
    from dsjax.checkpoint.convert import convert

    convert(source, destination, **options)


EVAL = """\
Measure a model by DeepSeek-R1's protocol: of every question k answers are drawn at temperature 0.6
and top-p 0.95, without a system prompt; the thought is left out, and the final answer is compared.
pass@1 is the mean over all answers, cons@k the majority's, both with intervals over questions.

Tasks that need no data: arithmetic-easy, arithmetic-medium, arithmetic-hard, backwards, countdown,
letters, puzzles; with the extra `eval` humaneval; with the extra `gym`, of reasoning-gym,
gym-base_conversion, gym-calendar_arithmetic, gym-countdown, gym-course_schedule,
gym-family_relationships, gym-leg_counting, gym-maze, gym-rotten_oranges, gym-spiral_matrix,
gym-syllogism.

Tasks with the path of a published data set, as NAME=PATH: aime, gpqa, livecodebench, math500, mmlu,
mmlu-pro. Code and formulas are verified in jails, which need Linux, and the extra `post`.
docs/evaluation.md says which files they read.

harness:NAME is a task of lm-evaluation-harness, by its own rules. With --chat the content of an
answer is scored, without its thought. A model that thinks then draws as above, if --max-tokens,
--temperature and --top-p do not say otherwise; others draw as the task says. --no-think leaves the
thought out. Tasks that compare log-likelihoods are refused for a model that thinks."""

EVAL_EXAMPLES = """\
examples:
  dsjax eval runs/demo --tasks arithmetic-easy letters
  dsjax eval DeepSeek-R1-Distill-Qwen-7B --tasks aime=aime24.jsonl --k 64
  dsjax eval DeepSeek-R1 --tasks gpqa=gpqa_diamond.csv --k 64 --mesh expert=8 --rows 64
  dsjax eval runs/demo --tasks harness:my_task --include tasks/
  dsjax eval DeepSeek-R1 --tasks harness:ifeval --chat
  dsjax eval Qwen3-8B --tasks harness:mmlu --chat --no-think

Answers are kept in OUTPUT/answers.jsonl as they come: stopped or killed, the same command goes on,
and with a larger --k it draws only what is new. Results: OUTPUT/results.json and results.png.
"""


def _add_eval(verbs: argparse._SubParsersAction[Parser]) -> None:
    verb = verbs.add_parser(
        "eval",
        help="how good a model is at tasks, by DeepSeek-R1's protocol",
        description=EVAL,
        epilog=EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=_path,
        help="a run directory of train.py, dsjax weights, or a Hugging Face folder",
    )
    verb.add_argument("--tasks", nargs="+", required=True, metavar="NAME[=PATH]",
                      help="what to measure")  # fmt: skip
    verb.add_argument("--k", type=int, metavar="N",
                      help="answers to each question (4; R1's scores are of 64)")  # fmt: skip
    verb.add_argument("--temperature", type=float, metavar="T",
                      help="0 takes the likeliest token (0.6; harness: what the task says, and 0.6 "
                      "for a model that thinks)")  # fmt: skip
    verb.add_argument("--top-p", type=float, metavar="P",
                      help="only the likeliest tokens that reach this together (0.95; harness: "
                      "likewise)")  # fmt: skip
    verb.add_argument("--max-tokens", type=int, metavar="N",
                      help="of an answer, thought included; less where the context ends "
                      "(32768; harness: likewise)")  # fmt: skip
    verb.add_argument("--seed", type=int, metavar="N",
                      help="another one draws other answers (0)")  # fmt: skip
    verb.add_argument("--limit", type=int, metavar="N",
                      help="only the first N questions of each task (all)")  # fmt: skip
    verb.add_argument("--output", type=Path, metavar="FOLDER",
                      help="where answers and results go (evaluations/ and the name of "
                      "CHECKPOINT)")  # fmt: skip
    verb.add_argument("--rows", type=int, default=8, metavar="N",
                      help="answers that are drawn at the same time (8)")  # fmt: skip
    verb.add_argument("--context", type=int, metavar="N",
                      help="most tokens of question and answer together (the model's own "
                      "limit)")  # fmt: skip
    verb.add_argument("--dtype", choices=("float32", "bfloat16"),
                      help="hold and compute in this (as stored)")  # fmt: skip
    verb.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...",
                      help="spread the model over all devices, such as expert=4,tensor=2 (one "
                      "device)")  # fmt: skip
    _add_harness(verb)
    verb.set_defaults(verb=_eval)


def _add_harness(verb: Parser) -> None:
    harness = verb.add_argument_group("tasks of lm-evaluation-harness")
    harness.add_argument("--include", type=Path, metavar="FOLDER",
                         help="where more of its tasks are, as YAML")  # fmt: skip
    harness.add_argument("--few-shot", type=int, metavar="N",
                         help="examples before each question (what the task says)")  # fmt: skip
    harness.add_argument("--chat", action="store_true", default=None,
                         help="put questions into the checkpoint's chat template")  # fmt: skip
    harness.add_argument("--think", action=argparse.BooleanOptionalAction,
                         help="whether answers of a chat begin with a thought (what the template "
                         "does)")  # fmt: skip


def _eval(
    checkpoint: Path,
    tasks: list[str],
    limit: int | None,
    output: Path | None,
    include: Path | None,
    **options: Any,
) -> None:
    from dsjax.evaluation.run import run_eval
    from dsjax.evaluation.run_harness import run_harness
    from dsjax.evaluation.settings import HarnessSettings, Room, Settings, chosen
    from dsjax.evaluation.tasks import split_tasks

    room = Room(**{name: options.pop(name) for name in ("rows", "context", "dtype", "mesh")})
    own, theirs = split_tasks(tasks)
    output = output or Path("evaluations") / checkpoint.resolve().name
    if theirs:
        run_harness(checkpoint, theirs, room, chosen(HarnessSettings, options), limit=limit,
                    output=output, include=include)  # fmt: skip
    else:
        run_eval(checkpoint, own, chosen(Settings, options), room, limit=limit, output=output)
