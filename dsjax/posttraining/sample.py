"""`dsjax sample`: answers drawn, scored, filtered, and written as data for supervised tuning.

output/sft.jsonl       the answers that were kept, as `task: sft` reads them, with their provenance
output/answers.jsonl   every answer, with its rewards and what became of it
output/summary.json    settings, counts, and how many were refused for which reason; written last
output/journal.jsonl   while it runs: what was drawn, and what it is worth
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console

from dsjax.config_sample import SampleConfig
from dsjax.errors import UserError
from dsjax.inference.drawing import draw, seed_of
from dsjax.inference.reader import Reader, read_checkpoint, weights_stamp
from dsjax.inference.request import FinishReason, Request, SamplingParams
from dsjax.journal import Journal, refuse_other_settings
from dsjax.places import as_path, local_path
from dsjax.posttraining.prompts import Check, open_questions
from dsjax.posttraining.sample_filters import check_line
from dsjax.posttraining.sample_results import SUMMARY, write_results
from dsjax.posttraining.sample_rows import Asked, Drawn, origin_of
from dsjax.rewards.failures import describe_failures, refuse_total_failure
from dsjax.rewards.score import Scorer
from dsjax.small_files import read_json
from dsjax.training.progress import ThroughputDisplay, say
from dsjax.training.signals import Stopped, Termination, catch_termination, leave_soon

JOURNAL = "journal.jsonl"

AT_ONCE = 256
"""Answers that are scored before what they are worth is written down. Which ones go together
depends on nothing else: a reward that compares answers says the same after a kill."""


class Key(NamedTuple):
    """What a record of the journal is: an answer as it was drawn, or its score."""

    record: str
    prompt: int
    sample: int


def sample(config: SampleConfig, console: Console) -> None:
    """Draw `sampling.k` answers to each prompt, and keep the good ones; called again, it goes on.

    Raises:
        UserError: the checkpoint, a prompt, a reward or the output cannot be used, or the output
            was made with other settings. Nothing has been written then.
        SystemExit: 143 or 130, after SIGTERM or SIGINT; what was drawn is kept.
    """
    checkpoint = as_path(config.checkpoint)
    reader = read_checkpoint(checkpoint)
    stamp = weights_stamp(checkpoint)
    output = local_path(as_path(config.output), "output")
    if (output / SUMMARY).is_file():
        settings = _settings(config, stamp, _ask(config, reader, lambda example, where: None))
        refuse_other_settings(
            output / SUMMARY, read_json(output / SUMMARY).get("settings", {}), settings
        )
        (output / JOURNAL).unlink(missing_ok=True)  # a kill can come before that
        say(console, f"{output}: finished already; nothing is left to do")
        return

    def check(example: Mapping[str, Any], where: str) -> None:
        scorer.check(example, where)
        check_line(config.filters, example, where)

    with Scorer(config.rewards) as scorer:
        asked = _ask(config, reader, check)
        scorer.try_functions(asked[0].prompt, asked[0].example)
        about = origin_of(config, checkpoint, stamp)
        settings = _settings(config, stamp, asked)
        if config.mesh is not None:  # what devices can be asked for, jax has to be asked
            from sharding.mesh import make_mesh

            make_mesh(config.mesh)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: cannot be made: {error.strerror}") from error
        with (
            Journal(output / JOURNAL, settings, Key) as journal,
            catch_termination() as termination,
        ):
            run = _Run(config, reader, asked, journal, console, termination)
            speed = run.draw()
            run.score(scorer)
            groups = [[run.drawn(one, n) for n in range(config.sampling.k)] for one in asked]
            write_results(output, config, groups, settings, about, speed, console)
            (output / JOURNAL).unlink()


def _ask(config: SampleConfig, reader: Reader, check: Check) -> list[Asked]:
    """All prompts, each of which has room for its answers."""
    questions = open_questions(config.prompts, check, config.seed)
    context, limit = reader.config.max_position_embeddings, config.sampling.max_tokens
    asked = []
    for number, example in questions.once(config.limit):
        try:
            tokens = questions.encode(example, reader)
        except UserError as error:
            raise UserError(f"{config.prompts.path}: prompt {number + 1}: {error}") from None
        if len(tokens) + limit > context:
            raise UserError(
                f"{config.prompts.path}: prompt {number + 1} has {len(tokens)} tokens, which with "
                f"sampling.max_tokens={limit} go beyond the model's context of {context}; lower "
                "the second, or leave the prompt out"
            )
        prompt = reader.decode(tokens)
        asked.append(Asked(number, example, questions.said(example), tokens, prompt))
    return asked


def _settings(config: SampleConfig, stamp: str, asked: list[Asked]) -> dict[str, Any]:
    """All that the written files depend on: not where they are, nor where the model is."""
    tree = config.model_dump(
        mode="json", exclude={"output": True, "mesh": True, "sampling": {"rows"}}
    )
    flat: dict[str, Any] = {}
    for section, value in tree.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{key}".rstrip("."): part for key, part in parts.items()}
    digests = "".join(f"{one.number} {one.digest} " for one in asked)
    asked_digest = hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
    return {**flat, "weights": stamp, "questions": asked_digest}


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything that the three stages need."""

    config: SampleConfig
    reader: Reader
    asked: list[Asked]
    journal: Journal[Key]
    console: Console
    termination: Termination

    def draw(self) -> float | None:
        """Draw what is missing; tokens a second, if there was anything."""
        requests = {
            f"{one.number}/{number}": (one, number)
            for one in self.asked
            for number in range(self.config.sampling.k)
            if Key("answer", one.number, number) not in self.journal.records
        }
        total = len(self.asked) * self.config.sampling.k
        before = total - len(requests)
        if before:
            say(self.console, f"{before:,} of {total:,} answers are there already")
        if not requests:
            return None

        def take(name: str, tokens: list[int], finish: FinishReason) -> None:
            one, number = requests[name]
            key = Key("answer", one.number, number)
            text = self.reader.decode(tokens)
            self.journal.write(key, {"text": text, "tokens": len(tokens), "finish": finish})

        # Imported late: what is wrong, or done already, is said without jax.
        from dsjax.inference.opening import open_engine

        config = self.config
        # Of all prompts, not of those that are missing: a resumed run runs the same programs.
        context = max(len(one.tokens) for one in self.asked) + config.sampling.max_tokens
        engine = open_engine(
            self.reader, config.sampling.rows, context, dtype=config.dtype, mesh=config.mesh
        )
        pending = (self._request(name, *asked) for name, asked in requests.items())
        with ThroughputDisplay("answers", total, before, self.console) as progress:
            for tokens in draw(engine, pending, take):
                progress.update(before + self.journal.written, tokens)
                self._stop_if_asked()
        return progress.tokens_per_second or None

    def score(self, scorer: Scorer) -> None:
        """Write down what each answer is worth."""
        samples = range(self.config.sampling.k)
        step = max(1, AT_ONCE // len(samples))
        for begin in range(0, len(self.asked), step):
            pairs = [(one, n) for one in self.asked[begin : begin + step] for n in samples]
            keys = [Key("score", one.number, n) for one, n in pairs]
            if all(key in self.journal.records for key in keys):
                continue
            try:
                with self.termination.interruptible():
                    scores = scorer.score([self.drawn(one, n).answer for one, n in pairs])
            except Stopped:  # a verifier may never end
                assert self.termination.received is not None
                leave_soon(128 + self.termination.received)
                self._stop_if_asked()
                raise
            if begin == 0:
                refuse_total_failure(scores, "the first prompts")
            if failures := describe_failures(scores):
                say(self.console, failures)
            for key, score in zip(keys, scores, strict=True):
                if key not in self.journal.records:
                    self.journal.write(key, dataclasses.asdict(score))
            self._stop_if_asked()

    def drawn(self, one: Asked, number: int) -> Drawn:
        """An answer, and its score if it has one."""
        records = self.journal.records
        score = records.get(Key("score", one.number, number), {})
        record = records[Key("answer", one.number, number)]
        return Drawn(one, number, self._seed(one, number), record, score)

    def _request(self, name: str, one: Asked, number: int) -> Request:
        sampling = self.config.sampling
        params = SamplingParams(
            sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_tokens=self.reader.stop_tokens,
            seed=self._seed(one, number),
        )
        return Request(name, one.tokens, params)

    def _seed(self, one: Asked, number: int) -> int:
        return seed_of(self.config.seed, (one.number, number))

    def _stop_if_asked(self) -> None:
        if self.termination.received is not None:
            say(self.console, "stopped; what was drawn is kept, and the same command goes on")
            sys.exit(128 + self.termination.received)
