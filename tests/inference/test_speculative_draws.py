"""With drafts, tokens are drawn from the model's own distribution: chi-square over many draws.

The model has 16 tokens, and an MTP module that is right now and then. What is compared is the joint
distribution of the second, third and fourth token after a prompt. Expected are products of
softmax(logits / temperature) of the whole model, in numpy. Every engine has seeds of its own, since
with the same ones drafts change no token at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import drafting_weights, place
from scipy.stats import chi2_contingency, chisquare

from dsjax.inference import step
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.inference.speculation import Speculation
from dsjax.model.transformer import Transformer

from .conftest import run

VOCAB = 16
PROMPT = (3, 1, 4, 1)
COMPARED = 4
"""Tokens that are looked at. The first comes with the prompt, each of the others beside a draft or
right behind one that was accepted."""
MADE = COMPARED + 1
"""Beside the last token of a request no draft is read."""
BEGINNINGS = np.array(list(itertools.product(range(VOCAB), repeat=COMPARED - 1)))
REQUESTS = 6720
"""Times three tokens: 20,160 draws."""
ROWS = 64
CASES = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.6, top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
}
LEAST = 1e-3
"""What a right engine falls below once in a thousand times; seeds are fixed, so here never."""

# Hasty programs would take three times as long.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thorough_compiler")]

draw = step._draw


@pytest.fixture(autouse=True)
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drafts do not pay the engine would leave them off, and here they do not."""
    monkeypatch.setattr(Speculation, "choose", lambda self, rows: self.drafts)


@pytest.fixture(scope="module")
def model() -> Transformer:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    config = CONFIGS["v3"].model_copy(update=sizes)
    return place(config, drafting_weights(config, sharpness=3, seed=1))


@pytest.fixture(scope="module")
def logits(model: Transformer) -> np.ndarray:
    """After the prompt and every possible beginning: [V^3, 4, V], in one pass over everything."""
    prompts = np.tile(PROMPT, (len(BEGINNINGS), 1))
    tokens = np.concatenate([prompts, BEGINNINGS], axis=1).astype(np.int32)
    found = jax.jit(lambda model, tokens: model(tokens).logits)(model, jnp.asarray(tokens))
    return np.asarray(found)[:, len(PROMPT) - 1 :]


Counts = dict[str, np.ndarray]
"""For each case how often each second, third and fourth token came together, [V, V, V]."""


def counted(model: Transformer, drafts: int, count: int = REQUESTS, seed: int = 0) -> Counts:
    """Of so many requests of each case, with seeds from this one on."""
    engine = Engine(model, EngineSettings(rows=ROWS, context=32, drafts=drafts))
    # One program for prompts, one for continuations: to compile all would take most of the time.
    engine._scheduler._shapes, engine._scheduler._row_counts = [(ROWS, len(PROMPT))], [ROWS]
    requests = [
        Request(
            f"{case} {number}",
            PROMPT,
            SamplingParams(MADE, ignore_eos=True, seed=seed + number, **sampling),
        )
        for number in range(count)
        for case, sampling in CASES.items()
    ]
    found = run(engine, requests)
    stats = engine.stats()
    if drafts:
        share = stats.accepted / stats.drafted
        print(f"\n  drafts={drafts}: {share:.1%} of {stats.drafted:,} accepted; p:", end="")
    counts = {case: np.zeros((VOCAB,) * (COMPARED - 1)) for case in CASES}
    for request in requests:
        counts[request.id.rsplit(" ", 1)[0]][tuple(found[request.id].tokens[1:COMPARED])] += 1
    return counts


def expected(logits: np.ndarray, sampling: dict[str, float]) -> np.ndarray:
    """Their probabilities, whatever the first token is."""
    chances = probabilities(logits, **sampling)
    taken = np.take_along_axis(chances[:, :-1], BEGINNINGS[..., None], axis=-1)
    joint = taken.prod(axis=1) * chances[:, -1]
    return joint.reshape((VOCAB,) * COMPARED).sum(axis=0)


def probabilities(logits: np.ndarray, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature), and of it the likeliest tokens that reach top_p together."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum(-1, keepdims=True)
    best = np.sort(p)[..., ::-1]
    last = (best.cumsum(-1) < top_p).sum(-1, keepdims=True).clip(max=VOCAB - 1)
    p[p < np.take_along_axis(best, last, -1)] = 0
    return p / p.sum(-1, keepdims=True)


def against(expected: np.ndarray, counts: np.ndarray) -> float:
    """The p-value of these counts."""
    if counts[expected == 0].any():
        return 0.0
    wanted = expected * counts.sum()
    return chisquare(together(counts, wanted), together(wanted, wanted)).pvalue


def between(expected: np.ndarray, *counts: np.ndarray) -> float:
    """The p-value of two engines' counts coming from one distribution, whichever it is."""
    return chi2_contingency([together(one, expected * one.sum()) for one in counts]).pvalue


def together(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Cells in which fewer than five are expected, as one."""
    return np.append(values[wanted >= 5], values[wanted < 5].sum())


@pytest.fixture(scope="module")
def exact(logits: np.ndarray) -> dict[str, np.ndarray]:
    return {case: expected(logits, sampling) for case, sampling in CASES.items()}


@pytest.fixture(scope="module")
def plain(model: Transformer) -> Counts:
    """Without drafts."""
    return counted(model, 0)


def test_without_drafts_tokens_have_the_probabilities_of_the_model(
    exact: dict[str, np.ndarray], plain: Counts
) -> None:
    assert min(against(exact[case], plain[case]) for case in CASES) > LEAST


@pytest.mark.parametrize("drafts", [1, 2])
def test_with_drafts_tokens_have_the_same_probabilities(
    model: Transformer, exact: dict[str, np.ndarray], plain: Counts, drafts: int
) -> None:
    counts = counted(model, drafts, seed=drafts * REQUESTS)
    for case in CASES:
        of_model = against(exact[case], counts[case])
        of_plain = between(exact[case], plain[case], counts[case])
        print(f" {of_model:.3f} and {of_plain:.3f} ({case})", end="")
        assert min(of_model, of_plain) > LEAST


# ---------------------------------------------------------------------------------------------
# What is said of an engine that is wrong
# ---------------------------------------------------------------------------------------------


def accept_always(decoder: Any, hidden: Any, sampler: Any, inputs: Any, vocab: Any, count: int):
    """A draft is the next token, whatever is drawn."""
    tokens, valid, *chances = draw(decoder, hidden, sampler, inputs, vocab, count)
    if count == 1:  # a prompt is read
        return tokens, valid, *chances
    read = jnp.arange(1, count + 1)[None] < inputs.counts[:, None]
    tokens = jnp.where(read, jnp.roll(inputs.tokens, -1, axis=1), tokens)
    return tokens, jnp.where(inputs.samples, inputs.counts, 0), *chances


def draw_again(decoder: Any, hidden: Any, sampler: Any, inputs: Any, vocab: Any, count: int):
    """After a rejection a token is drawn from all of p, where it should be from the rest of it."""
    tokens, valid, *chances = draw(decoder, hidden, sampler, inputs, vocab, count)
    if count == 1:
        return tokens, valid, *chances
    other = sampler.params._replace(seed=sampler.params.seed + 10 * REQUESTS)
    others = draw(decoder, hidden, sampler._replace(params=other), inputs, vocab, count)
    keep = (tokens[:, 0] == inputs.tokens[:, 1]) | (inputs.counts < 2)
    tokens = jnp.where(keep[:, None], tokens, others[0])
    return tokens, jnp.where(keep, valid, others[1]), *chances


@pytest.fixture
def step_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Makes every engine from now on draw like this."""

    def step_with(wrong: Any) -> None:
        monkeypatch.setattr(step, "_draw", wrong)
        step.step_for.cache_clear()

    yield step_with
    step.step_for.cache_clear()


@pytest.mark.parametrize("wrong", [accept_always, draw_again], ids=lambda wrong: wrong.__name__)
def test_a_wrong_acceptance_is_seen(
    model: Transformer,
    exact: dict[str, np.ndarray],
    step_with: Callable[[Any], None],
    wrong: Any,
) -> None:
    step_with(wrong)
    counts = counted(model, 1, 2000)
    for case in CASES:
        chance = against(exact[case], counts[case])
        print(f" {chance:.0e} ({case})", end="")
        assert chance < 1e-12
