"""Supervised tuning: a checkpoint goes on training, on the assistant's part of conversations."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from rich.console import Console

from dsjax.checkpoint.adapters import cut_adapters
from dsjax.checkpoint.overridden import differences
from dsjax.checkpoint.peft import peft_files
from dsjax.checkpoint.run_weights import read_adapters
from dsjax.checkpoint.source import model_of
from dsjax.config import OptimizerConfig, Stage
from dsjax.config_files import CONFIGS
from dsjax.config_sft import SftConfig, TuningConfig
from dsjax.data.answer_rows import AnswerRows, held_out_answers, make_examples
from dsjax.data.answers import AnswerEncoder
from dsjax.data.chat_template import ChatTemplate, TemplateError, read_template_file
from dsjax.data.conversations import hold_out, read_conversations
from dsjax.data.held_out import HeldOutRows
from dsjax.data.language import Language, check_vocabulary, read_language
from dsjax.errors import UserError
from dsjax.places import as_path
from dsjax.posttraining.language import write_language
from dsjax.posttraining.tuned import Tuned
from dsjax.small_files import write_whole
from dsjax.training.progress import say
from dsjax.training.run import Run, make_layout, rows_read_here, together, train
from sharding.distributed import agree


def sft(config: SftConfig, console: Console) -> None:
    """Train the checkpoint `init` on conversations for some epochs, or go on where the run is.

    With several processes all call this, as `pretrain`; `train` says how it leaves.

    Raises:
        UserError: the configuration, the checkpoint, the conversations or the run directory cannot
            be used, by any of the processes. Nothing has been written then.
    """
    with together(config, console) as console:
        train(prepare(config, console), console)


def prepare(config: TuningConfig, console: Console) -> Run:
    """What the loop needs, once all processes have come together."""
    layout = make_layout(config)
    length = config.data.sequence_length
    rows = rows_read_here(layout, config.training.microbatch_size, length)
    for changed in differences(config.model, model_of(config.init), config.init):
        say(console, f"{config.init}: {changed}")
    tuned = Tuned(config, layout)
    language = read_chat_language(config)
    data, held_out = _read_data(config, language, rows.tolist(), console)
    agree("the data", data.get_state()["data"])
    agree("the tokenizer", {"digest": language.tokenizer.digest})
    init = str(as_path(config.init).absolute())
    template = None if config.data.chat_template is None else _template(language).source
    return Run(
        config=config.model_copy(update={"optimizer": _scheduled(config, data.num_tokens)}),
        settings=config.model_copy(update={"init": init}),
        layout=layout,
        tokens=data.num_tokens,
        rows=rows,
        data=data,
        held_out=held_out,
        abstract=tuned.abstract,
        begin=tuned.begin,
        complete=tuned.complete,
        write_files=lambda folder: write_language(language, folder / "tokenizer", template),
        finish=partial(_write_adapter, config),
        compressors=dict,
    )


def read_chat_language(config: TuningConfig) -> Language:
    """The checkpoint's, with the template that the configuration names, if it names one.

    Raises:
        UserError: there is none, one is damaged, or tokenizer and model do not fit.
    """
    language = read_language(config.init)
    check_vocabulary(language.tokenizer, config.model.vocab_size, config.init)
    if (named := config.data.chat_template) is None:
        return language
    for file in (as_path(named), CONFIGS / f"{named}.jinja"):
        if file.is_file():
            template = read_template_file(file, language.tokenizer)
            return dataclasses.replace(language, template=template)
    raise UserError(f"data.chat_template={named}: no such file, and none of that name in {CONFIGS}")


def _template(language: Language) -> ChatTemplate:
    if language.template is None:
        raise UserError(
            f"{language.home}: the checkpoint has no chat template; name one by "
            "data.chat_template, a jinja file or plain-chat"
        )
    return language.template


def _read_data(
    config: TuningConfig, language: Language, rows: list[int], console: Console
) -> tuple[AnswerRows, HeldOutRows | None]:
    """What is trained on, and what is held out of it."""
    data, length = config.data, config.data.sequence_length
    try:
        encoder = AnswerEncoder(_template(language), language.tokenizer, data.train_on)
    except TemplateError as error:
        raise UserError(f"{language.home}: {error}; name another by data.chat_template") from None
    train, held_out = hold_out(read_conversations(data.paths), data.held_out_fraction)
    examples, left_out = make_examples(train, encoder, length)
    say(console, f"{len(train):,} conversations: {len(examples):,} examples of "
                 f"{examples.lengths.sum():,} tokens")  # fmt: skip
    if left_out:
        say(console, f"{left_out:,} examples longer than {length:,} tokens are left out")
    if encoder.thoughts and not encoder.has_think_tokens:
        say(console, f"{encoder.thoughts:,} answers have a thought; the tokenizer has no tokens "
                     "for <think> and </think>: they are trained as text")  # fmt: skip
    answers = AnswerRows(
        examples,
        epochs=config.training.epochs,
        microbatch_size=config.training.microbatch_size,
        rows=rows,
        row_length=length,
        seed=config.seed,
    )
    if not held_out:
        return answers, None
    examples, _ = make_examples(held_out, encoder, length)
    return answers, held_out_answers(examples, language.tokenizer, length)


def _scheduled(config: TuningConfig, tokens: int) -> OptimizerConfig:
    """The optimizer's settings with the learning rate over this many tokens."""
    [first, *later] = config.optimizer.learning_rate
    if later or first.until is not None:
        return config.optimizer
    final = first.value * config.optimizer.final_share
    stages = [Stage(value=first.value, until=0), Stage(value=final, until=tokens, shape="cosine")]
    return config.optimizer.model_copy(update={"learning_rate": stages})


def _write_adapter(config: TuningConfig, folder: Path) -> None:
    """The newest adapters in PEFT's layout, where there are any."""
    if config.lora is None:
        return
    lows = cut_adapters(config.model, config.lora, read_adapters(folder, check=False))
    init = str(as_path(config.init).absolute())
    for name, data in peft_files(config.model, config.lora, lows, init).items():
        (folder / "adapter").mkdir(exist_ok=True)
        write_whole(folder / "adapter" / name, data)
