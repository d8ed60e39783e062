"""lm-evaluation-harness over our engine: log-likelihoods, rolling ones, and generation.

    dsjax eval CHECKPOINT --tasks harness:arc_easy
    python -m dsjax.evaluation.harness --model dsjax --model_args path=CHECKPOINT --tasks arc_easy
    lm_eval.simple_evaluate("dsjax", "path=CHECKPOINT", tasks=["arc_easy"])   # this file imported

The numbers equal those of its own `hf` model on the same files, except where a comment says so. For
a model that thinks, the content is scored, as by `hf` with `think_end_token=</think>`. Unlike `hf`,
a thought that does not end leaves an empty content, and a task's stop strings are matched in the
content only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dsjax.data.text import TextStream
from dsjax.data.thinking import CLOSED, OPENED, ThoughtfulSpeech, begins_in_thought
from dsjax.errors import UserError
from dsjax.evaluation.harness_chat import ChatPrompts
from dsjax.evaluation.harness_requests import (
    Collector,
    Content,
    Likelihood,
    read_options,
    seed_of_text,
)
from dsjax.inference.drawing import QUEUE
from dsjax.inference.opening import open_engine
from dsjax.inference.reader import read_checkpoint
from dsjax.inference.request import Request, SamplingParams
from dsjax.places import as_path

CACHE_TOKENS = 4096
"""Tokens that the cache has for each row, where the model's limit is longer than that."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Pair = tuple[Any, list[int], list[int]]
"""The text, for the cache of answers; the tokens of the context, and of its continuation."""


@register_model("dsjax")
class HarnessModel(TemplateLM):
    """A checkpoint of ours, as lm-evaluation-harness asks a model.

    Args:
        path: a released folder, dsjax weights, or a run.
        dtype: float32 or bfloat16; None: as stored.
        rows: sequences that run at the same time.
        mesh: sizes of mesh axes, such as {"tensor": 2}; None: one device.
        max_length: most tokens of a window, as of `hf`. The engine needs two places beside it, so
            that the longest here is two less than the model's.
        add_bos_token: whether a text begins with bos; None: what the tokenizer's files say.
        batch_size, max_batch_size, device: what the command line always gives. The engine fills
            its rows by itself, on the devices that there are.
        enable_thinking: whether answers in the chat template begin with a thought; None: as the
            template has it. False tells the template so, as `enable_thinking` (Qwen3) and
            `thinking` (DeepSeek-V3.1), and closes a thought that its prompt opens all the same.
        think_end_token: as of `hf`; </think>, which need not be given.

    Raises:
        UserError: the checkpoint cannot be read, `max_length` is beyond it, or its chat template
            has no thoughts to enable.
    """

    enable_thinking: bool | None = None

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        rows: int = 8,
        mesh: Mapping[str, int] | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
    ):
        super().__init__()
        reader = read_checkpoint(as_path(path))
        if not reader.tokenizer.byte_level:
            raise UserError(
                f"{path}: the tokenizer is not byte-level; stop strings need one that is"
            )
        if add_bos_token is not None:
            reader = dataclasses.replace(reader, add_bos=add_bos_token)
        limit = reader.config.max_position_embeddings - 2
        if max_length is not None and not 1 <= max_length <= limit:
            raise UserError(f"max_length is {max_length}; expected 1 to {limit} for this model")
        if think_end_token not in (None, CLOSED):
            raise UserError(f"think_end_token is {think_end_token!r}; thoughts end with {CLOSED}")
        self.max_length = max_length or limit
        self._reader = reader
        self.enable_thinking = enable_thinking
        if self.chat.thinks:
            logger.info("%s thinks in a chat; its content is scored", path)
        context = self.max_length + 2
        # `hf` takes all that the model has into account, tokens that no text makes among it.
        self._engine = open_engine(
            reader, rows, context, dtype=dtype, mesh=mesh,
            cache_tokens=max(context, rows * min(context, CACHE_TOKENS)),
            vocab_size=reader.config.vocab_size,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------
    # Text
    # -----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._reader.tokenizer.document_ends[1]

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows: bos, or eos where there is none."""
        return self._reader.tokenizer.document_ends[0]

    @property
    def tokenizer_name(self) -> str:
        """Tells this tokenizer and template from others, in the cache of requests."""
        template = self.chat_template(True) or ""
        text = f"{self._reader.tokenizer.digest}{template}{self.enable_thinking}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"dsjax-{digest[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text; bos in front of it if the model has it so, and it has none yet."""
        if add_special_tokens is False:
            return dataclasses.replace(self._reader, add_bos=False).text(string)
        return self._reader.text(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template; None if none is to be used."""
        if not chat_template or self._reader.template is None:
            return None
        return self._reader.template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat.

        Without the generation prompt the last message is a beginning of the answer: it follows the
        prompt of the others.

        Raises:
            UserError: the checkpoint has no template, or the beginning would be one of a thought.
        """
        if add_generation_prompt:
            return self.chat.render(chat_history)
        *before, begun = chat_history
        return self.chat.render(before, begun["content"])

    @cached_property
    def chat(self) -> ChatPrompts:
        """What makes prompts of chats."""
        return ChatPrompts(self._reader.template, self.enable_thinking)

    # -----------------------------------------------------------------------------------------
    # What is asked
    # -----------------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of a continuation of each context.

        Raises:
            UserError: a context ends where the model would think first.
        """
        for request in requests:
            if self.chat.thinks_after(request.args[0]):
                self.chat.refuse_likelihood(request.task_name)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows that predict each token once."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            [text] = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows)
        for owner, (value, _) in zip(owners, found, strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """The prompt's own log-probabilities, summed over each continuation."""
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1, ignore_eos=True)
        asked = [
            (tuple((context + continuation)[-(self.max_length + 1) :]), sampling)
            for _, context, continuation in requests
        ]
        found: list[tuple[float, bool]] = []
        answers = self._run(asked, lambda place: Likelihood(len(requests[place][2])))
        for (text, *_rest), answer in zip(requests, answers, strict=True):
            found.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The content of answers, up to the first of a task's stop strings in it.

        A thought is left out; where it does not end, the content is empty.
        """
        seen: Counter[str] = Counter()
        asked, stops = [], []
        for request in requests:
            context, options = cast(tuple[str, dict[str, Any]], request.args)
            sampling, until = read_options(options, self._reader.stop_tokens)
            key = repr((context, options))
            seed = seed_of_text(key, seen[key])
            seen[key] += 1
            prompt, length = self._fitted(context, sampling.max_tokens)
            sampling = dataclasses.replace(sampling, seed=seed, max_tokens=length)
            asked.append((prompt, sampling))
            stops.append(until)
        tokenizer = self._reader.tokenizer
        hidden = tokenizer.special_ids - {tokenizer.added_tokens.get(t) for t in (OPENED, CLOSED)}

        def collect(place: int) -> Content:
            opened = begins_in_thought(requests[place].args[0])
            stream = TextStream(tokenizer, hidden=hidden)
            return Content(ThoughtfulSpeech(stream, stops[place], opened))

        answers = self._run(asked, collect)
        if unfinished := sum(not finished for _, finished in answers):
            logger.warning(
                "%d of %d answers ended within their thought: their content is empty; allow more "
                "tokens by --max-tokens, or --gen_kwargs max_gen_toks=N", unfinished, len(answers)
            )  # fmt: skip
        for request, (text, _) in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return [text for text, _ in answers]

    def _fitted(self, context: str, max_tokens: int) -> tuple[tuple[int, ...], int]:
        """The tokens of a prompt, and how many may follow, so that both fit into the window.

        A prompt that is too long is truncated from the left, as `hf` does. Before a thought, whose
        length is unknown, the token limit of the answer is lowered instead.
        """
        prompt = self.tok_encode(context)
        if self.chat.thinks_after(context):
            if len(prompt) >= self.max_length:
                raise UserError(
                    f"a task's prompt has {len(prompt)} tokens, and max_length is "
                    f"{self.max_length}; choose a larger one (--context)"
                )
            return tuple(prompt), min(max_tokens, self.max_length - len(prompt))
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_tokens} tokens, and max_length is {self.max_length}; "
                "choose a larger one, or fewer tokens by --max-tokens or --gen_kwargs"
            )
        return tuple(prompt[-room:]), max_tokens

    def _run(
        self,
        asked: Sequence[tuple[tuple[int, ...], SamplingParams]],
        collect: Callable[[int], Collector[Result]],
    ) -> list[Result]:
        """Bring everything through the engine; one result for each, in order."""
        engine, results = self._engine, {}
        open_: dict[str, Collector[Result]] = {}
        waiting = iter(enumerate(asked))
        while True:
            while len(open_) < QUEUE * engine.settings.rows and (entry := next(waiting, None)):
                place, (prompt, sampling) = entry
                engine.submit(Request(str(place), prompt, sampling))
                open_[str(place)] = collect(place)
            if not open_:
                return [results[place] for place in range(len(asked))]
            for update in engine.step():
                collector = open_[update.request_id]
                if collector.take(update) and update.finish is None:
                    engine.cancel(update.request_id)
                elif update.finish is None:
                    continue
                results[int(update.request_id)] = open_.pop(update.request_id).result()


if __name__ == "__main__":  # lm-evaluation-harness's own command line, which knows "dsjax" now
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
