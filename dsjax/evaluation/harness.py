"""lm-evaluation-harness over our engine: log-likelihoods, rolling ones, and generation.

    dsjax eval CHECKPOINT --tasks harness:arc_easy
    python -m dsjax.evaluation.harness --model dsjax --model_args path=CHECKPOINT --tasks arc_easy
    lm_eval.simple_evaluate("dsjax", "path=CHECKPOINT", tasks=["arc_easy"])   # this file imported

The numbers are those of its own `hf` model on the same files: what differs is said beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dsjax.data.text import TextStream
from dsjax.errors import UserError
from dsjax.evaluation.harness_requests import (
    Collector,
    Likelihood,
    Text,
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

    Raises:
        UserError: the checkpoint cannot be read, or `max_length` is beyond it.
    """

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
        self.max_length = max_length or limit
        self._reader = reader
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
        digest = hashlib.sha256((self._reader.tokenizer.digest + template).encode()).hexdigest()
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
            UserError: the checkpoint has no template.
        """
        template = self._reader.template
        if template is None:
            raise UserError(f"{self._reader.checkpoint}: has no chat template; ask without one")
        if add_generation_prompt:
            return template.render(chat_history)
        *before, begun = chat_history
        return template.render(before) + begun["content"]

    # -----------------------------------------------------------------------------------------
    # What is asked
    # -----------------------------------------------------------------------------------------

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
        """Continuations up to the first of a task's stop strings, which is not part of them."""
        seen: Counter[str] = Counter()
        asked, stops = [], []
        for request in requests:
            context, options = request.args
            sampling, until = read_options(options, self._reader.stop_tokens)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise UserError(
                    f"a task generates {sampling.max_tokens} tokens, and max_length is "
                    f"{self.max_length}; choose a larger one, or fewer tokens by --gen_kwargs"
                )
            key = repr((context, options))
            seed = seed_of_text(key, seen[key])
            seen[key] += 1
            prompt = tuple(self.tok_encode(context)[-room:])
            asked.append((prompt, dataclasses.replace(sampling, seed=seed)))
            stops.append(until)
        tokenizer = self._reader.tokenizer
        texts = self._run(
            asked,
            lambda place: Text(TextStream(tokenizer, stops[place], tokenizer.special_ids)),
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

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
