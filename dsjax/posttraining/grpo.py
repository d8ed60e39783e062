"""Reinforcement learning from a configuration to a finished run directory.

run_dir/config.yaml        the resolved configuration
run_dir/tokenizer/         that of the checkpoint, with its chat template
run_dir/checkpoints/       the newest saves, as in pre-training; the reference is in them
run_dir/metrics.jsonl      one record a step, and one an evaluation
run_dir/tensorboard/       the same numbers
run_dir/rewards.png        the picture
run_dir/summary.json       what the run ended with
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from dsjax.checkpoint.load import load_on, with_config
from dsjax.checkpoint.overridden import differences
from dsjax.checkpoint.run_weights import newest_step
from dsjax.checkpoint.source import read_folder_config
from dsjax.checkpoint.store import CheckpointStore, abstract_on
from dsjax.config_files import write_config
from dsjax.config_grpo import GrpoRunConfig
from dsjax.data.language import Language, check_vocabulary, read_language
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from dsjax.inference.stops import read_stop_tokens
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from dsjax.places import as_path
from dsjax.posttraining.grpo_loop import ACTIVITIES, GrpoLoop, Progress
from dsjax.posttraining.grpo_picture import draw_rewards
from dsjax.posttraining.language import write_language
from dsjax.posttraining.policy_step import init_policy
from dsjax.posttraining.prompts import Questions, open_questions
from dsjax.rewards.score import Scorer
from dsjax.small_files import write_whole
from dsjax.training.bucket_metrics import open_log, read_records
from dsjax.training.changes import resumed_changes, say_resumed
from dsjax.training.progress import say
from dsjax.training.run import make_layout, rows_read_here, together
from dsjax.training.signals import catch_termination
from dsjax.training.step import TrainState
from sharding.distributed import agree, share
from sharding.rules import Layout, use_layout

BYTES = "bytes"
"""The name of a tokenizer that needs no file."""
_BYTES_AND_SPECIAL = 261


def grpo(config: GrpoRunConfig, console: Console) -> None:
    """Learn from rewards, or go on learning, until `training.max_steps` are taken.

    Leaves with exit code 128 + signal after saving when SIGTERM or SIGINT arrives, and with 1 when
    `training.max_bad_steps` steps in a row are not finite, or when a process is lost. With several
    processes all call this, as `pretrain`: they draw and train together, and each verifies its
    share of the answers.

    Raises:
        UserError: the configuration, a question, a reward, the checkpoint or the run directory
            cannot be used, by any of the processes. Nothing has been written then.
    """
    with together(config, console) as console:
        _grpo(config, console)


def _grpo(config: GrpoRunConfig, console: Console) -> None:
    layout = make_layout(config)
    training = config.training
    rows_read_here(layout, training.microbatch_size, training.sequence_length)
    for name, path in (("init", config.init), ("grpo.reference", config.grpo.reference)):
        if path is not None:
            found = read_folder_config(as_path(path))
            for changed in differences(config.model, found, f"{name}={path}"):
                say(console, f"{path}: {changed}")
    language = _language(config)
    folder = as_path(config.run_dir)
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer(config.rewards))
        questions = _questions(config, scorer, language)
        agree("the questions", {"digest": questions.digest})
        agree("the tokenizer", {"digest": language.tokenizer.digest})
        store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
        stack.enter_context(closing(store))
        termination = stack.enter_context(catch_termination())
        with use_layout(layout):
            state, reference, progress = _begin(config, layout, store, console)
        share("run directory", lambda: _write_beginning(config, folder, language))
        log = stack.enter_context(closing(open_log(folder, progress.step)))
        stop_tokens = read_stop_tokens(language.home, config.model.vocab_size)
        asked = (language, stop_tokens, questions, scorer)
        told = (store, log, console, termination)
        loop = GrpoLoop(config, layout, state, reference, progress, *asked, *told)
        loop.run()
    if loop.exit_code is not None:
        sys.exit(loop.exit_code)
    share("summary", lambda: _finish(config, folder, console))


def _language(config: GrpoRunConfig) -> Language:
    """That of the checkpoint, or the given one."""
    where = config.tokenizer or config.init
    if where is None:
        raise UserError(
            "random weights have no tokenizer; give `tokenizer`: a folder that has one, or bytes"
        )
    if where == BYTES:
        language = Language(train_tokenizer([], _BYTES_AND_SPECIAL), None, add_bos=True, home=None)
    else:
        language = read_language(where)
    check_vocabulary(language.tokenizer, config.model.vocab_size, where)
    if language.tokenizer.eos_id not in config.model.eos_token_ids:
        raise UserError(
            f"{where}: the tokenizer's eos is {language.tokenizer.eos_id}, the model's "
            f"eos_token_id {config.model.eos_token_id}; answers would not end where they should"
        )
    return language


def _questions(config: GrpoRunConfig, scorer: Scorer, language: Language) -> Questions:
    """All questions, each of which can be asked."""
    questions = open_questions(config.prompts, scorer.check, config.seed)
    longest = config.training.sequence_length - config.sampling.max_tokens
    questions.check(language, longest)
    [first], _ = questions.training(0, 1)
    scorer.try_functions(language.tokenizer.decode(questions.encode(first, language)), first)
    if config.evaluation is not None and not questions.held_out(1):
        raise UserError(
            f"evaluation: no question of {config.prompts.path} is held out; raise "
            "prompts.held_out_fraction, or leave evaluation out"
        )
    return questions


def _begin(
    config: GrpoRunConfig, layout: Layout, store: CheckpointStore, console: Console
) -> tuple[TrainState, Transformer | None, Progress]:
    """What the newest sound checkpoint holds, or the beginning."""
    placed = saved_state(config, layout)
    resumed = _resume(config, layout, store, placed, console)
    if resumed is not None:
        return resumed
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    own = TrainState(**{name: shardings[name] for name in TrainState._fields})
    begin = jax.jit(partial(init_policy, config), out_shardings=own, donate_argnums=0)
    state = begin(_first_weights(config, config.init, layout, placed))
    if config.grpo.kl_weight == 0:
        return state, None, Progress()
    if config.grpo.reference is not None:
        return state, _load(config, config.grpo.reference, layout), Progress()
    # A copy: the step gives the policy's own memory away.
    return state, jax.tree.map(jnp.copy, state.model), Progress()


def _resume(
    config: GrpoRunConfig,
    layout: Layout,
    store: CheckpointStore,
    placed: dict[str, Any],
    console: Console,
) -> tuple[TrainState, Transformer | None, Progress] | None:
    """What the newest sound checkpoint holds; None where there is none.

    `grpo.kl_weight` may have been 0 then: the reference is the one that the run would have begun
    with. One that is no longer needed is left where it is.
    """
    folder = as_path(config.run_dir)
    changes = resumed_changes(folder, config, store)
    wants = config.grpo.kl_weight > 0
    has = wants
    if store.steps():
        _, leaves = newest_step(folder, check=False)
        has = any(name.startswith("reference.") for name in leaves)
    restored = store.restore(
        placed | ({} if wants and has else {"reference": None}), part=has and not wants
    )
    if restored is None:
        return None
    step, arrays, extra = restored
    say_resumed(console, config.run_dir, step, changes)
    reference = arrays.pop("reference")
    if wants and not has:
        first = config.grpo.reference or config.init
        reference = _first_weights(config, first, layout, placed)
        say(console, f"the reference is {first or 'the random weights that the run began with'}")
    return TrainState(**arrays), reference, Progress(**extra["progress"])


def _first_weights(
    config: GrpoRunConfig, path: str | None, layout: Layout, placed: dict[str, Any]
) -> Transformer:
    """Those of a checkpoint, or random ones."""
    if path is not None:
        return _load(config, path, layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed["model"])
    model: Transformer = jax.jit(partial(_random, config), out_shardings=shardings)()
    return model


def saved_state(config: GrpoRunConfig, layout: Layout) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what a checkpoint of this run holds."""
    abstract = jax.eval_shape(lambda: init_policy(config, _random(config)))
    placed = abstract_on(abstract, tree_shardings(abstract, layout))
    reference = placed.model if config.grpo.kl_weight > 0 else None
    return placed._asdict() | {"reference": reference}


def _random(config: GrpoRunConfig) -> Transformer:
    key, dtype = jax.random.key(config.seed), config.training.compute_dtype
    return Transformer(config.model, key, dtype=dtype)


def _load(config: GrpoRunConfig, path: str, layout: Layout) -> Transformer:
    """A checkpoint's weights in float32, laid out as training has them."""
    model = with_config(load_on(path, jnp.float32, layout), config.model)
    model.dtype = jnp.dtype(config.training.compute_dtype)
    return model


def _write_beginning(config: GrpoRunConfig, folder: Path, language: Language) -> None:
    write_config(config, folder)
    write_language(language, folder / "tokenizer")


def _finish(config: GrpoRunConfig, folder: Path, console: Console) -> None:
    records = read_records(folder)
    draw_rewards(records, folder / "rewards.png", folder.name)
    steps = [record for record in records if "reward" in record]
    evaluated = [record for record in records if "held_out_pass_at_1" in record]
    summary: dict[str, Any] = {"steps": steps[-1]["step"], "tokens": steps[-1]["tokens"]}
    summary |= {f"first_{k}": v for k, v in _held_out(evaluated[:1]).items()}
    summary |= _held_out(evaluated[-1:])
    seconds = {key: sum(r.get(f"{key}_seconds", 0) for r in steps) for key in ACTIVITIES}
    total = sum(seconds.values())
    summary |= {f"{key}_share": value / total for key, value in seconds.items()}
    write_whole(folder / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
    for name, value in summary.items():
        say(console, f"{name.replace('_', ' '):32} {value:,.4g}")
    say(console, f"run directory: {folder}")


def _held_out(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        k: v
        for record in records
        for k, v in record.items()
        if k.startswith("held_out_") and not k.startswith(("held_out_complete", "held_out_failed"))
    }
