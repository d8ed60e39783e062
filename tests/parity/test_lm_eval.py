"""lm-evaluation-harness asks our port; the numbers are those of the model itself.

Its client `local-completions` sends token ids, has the prompt's own log-probabilities echoed, and
adds up those of a continuation. It needs no torch, but a tokenizer of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from dsjax import load, load_tokenizer
from dsjax.serving.opening import open_model
from dsjax.serving.options import ModelOptions
from tests.serving.checkpoints import NAME, TEXT, write_checkpoint
from tests.serving.ports import Port, open_port

CONTEXT = 128
WAYS = {
    "one by one": {},
    "in batches": {"batch_size": 5},
    "at the same time": {"num_concurrent": 4},
    "both": {"batch_size": 3, "num_concurrent": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / NAME)


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[Port]:
    engine, served = open_model(ModelOptions(folder, NAME, context=CONTEXT, rows=4))
    engine.warm_up()
    with open_port(engine, served, keys=("sk-one",)) as port:
        yield port


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def client(
    request: pytest.FixtureRequest, port: Port, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> LocalCompletionsAPI:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # it asks through a proxy, if there is one
    monkeypatch.setenv("OPENAI_API_KEY", port.key)
    return LocalCompletionsAPI(
        base_url=f"{port.url}/v1/completions",
        model=NAME,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        max_retries=1,
        **request.param,
    )


Logits = Callable[[list[int]], np.ndarray]


@pytest.fixture(scope="module")
def logits(folder: Path) -> Logits:
    """The model's own, of one pass over everything, for the tokens that the tokenizer knows."""
    model, known = load(folder), load_tokenizer(folder).vocab_size
    forward = jax.jit(lambda model, tokens: model(tokens).logits[0])

    def logits(tokens: list[int]) -> np.ndarray:
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(forward(model, jnp.asarray(row)))[: len(tokens), :known]

    return logits


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def score(logits: Logits, tokens: list[int], given: int) -> tuple[float, bool]:
    """The log-likelihood of what follows the first `given` tokens, and whether it is greedy."""
    rows, chosen = logits(tokens)[given - 1 : -1], np.asarray(tokens[given:])
    chances = np.asarray(jax.nn.log_softmax(rows, axis=-1))
    greedy = bool((rows.argmax(-1) == chosen).all())
    return float(chances[np.arange(len(chosen)), chosen].sum()), greedy


def continuations(client: LocalCompletionsAPI, logits: Logits) -> list[tuple[str, str]]:
    """Pieces of a text, some of them followed by what the model thinks likeliest."""
    contexts = [TEXT[:cut].rstrip() for cut in range(1, 60)]
    pairs = [(context, TEXT[len(context) :][:9]) for context in contexts[::9]]
    for context in contexts:
        tokens = client.tok_encode(context)
        best = int(logits(tokens)[-1].argmax())
        likeliest = client.decode_batch([[best]])[0]
        if client.tok_encode(context + likeliest) == [*tokens, best]:
            pairs.append((context, likeliest))
    return pairs


def test_log_likelihoods_are_the_models(client: LocalCompletionsAPI, logits: Logits) -> None:
    pairs = continuations(client, logits)
    found = client.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    expected = []
    for context, continuation in pairs:
        given = client.tok_encode(context)
        rest = client.tok_encode(context + continuation)[len(given) :]
        expected.append(score(logits, given + rest, len(given)))
    (sums, greedy), (our_sums, our_greedy) = zip(*found, strict=True), zip(*expected, strict=True)
    assert greedy == our_greedy and set(greedy) == {True, False}
    gap = np.abs(np.subtract(sums, our_sums)).max()
    print(f"\n  {len(pairs)} log-likelihoods, {sum(greedy)} greedy, largest difference {gap:.1e}")
    assert gap < 1e-4


def test_a_text_longer_than_the_context_is_scored_in_windows(
    client: LocalCompletionsAPI, logits: Logits
) -> None:
    """Each token once, the first one after bos; the last window reaches back as far as it can."""
    tokens = client.tok_encode(TEXT * 9)
    after_bos = [client.prefix_token_id, *tokens]
    size = CONTEXT - 2  # the client keeps a place for a new token, and one for what is before
    expected = 0.0
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        window = after_bos[max(end - size, 0) : end + 1]
        expected += score(logits, window, len(window) - (end - start))[0]
    [found] = client.loglikelihood_rolling(
        ask("loglikelihood_rolling", (TEXT * 9,)), disable_tqdm=True
    )
    assert len(tokens) > 2 * size and abs(found - expected) < 1e-3


def speak(logits: Logits, tokens: list[int], count: int) -> list[int]:
    """What the model goes on with, a pass over everything for each token."""
    for _ in range(count):
        tokens = [*tokens, int(logits(tokens)[-1].argmax())]
    return tokens[-count:]


def test_generations_are_greedy_and_end_where_they_are_told_to(
    client: LocalCompletionsAPI, logits: Logits, folder: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    contexts = [TEXT[:cut] for cut in (3, 9, 14, 26, 40, 57)]
    made = [speak(logits, client.tok_encode(context), 24) for context in contexts]
    assert not any(tokenizer.eos_id in tokens for tokens in made)
    texts = [tokenizer.decode([i for i in t if i not in tokenizer.special_ids]) for t in made]
    until = texts[0][8]
    asked = [(context, {"until": [until], "max_gen_toks": 24}) for context in contexts]
    found = client.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    assert found == [text.split(until)[0] for text in texts]
    assert 0 < len(found[0]) <= 8 and len(set(found)) > 2
