"""Each row is sampled as its request asks, whatever its neighbours ask, and nothing compiles again.

`expected_probabilities` says in plain numpy, with sorts and in float64, what a request asks for.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.inference.request import LARGEST_SEED, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from dsjax.inference.sampler_state import SamplerState, mark_prompt, record, row_params, set_row
from dsjax.inference.sampling import adjusted, logprobs, sample

EOS = 2
CHUNK = 8
ROWS, VOCAB = 8, 300
"""Of most batches here, so that they share a program; requests and tokens may be fewer."""


def jitted(function):
    """With a cache of its own, so that what a test compiles is counted alone."""
    return jax.jit(lambda *arguments: function(*arguments))


SET, MARK, RECORD = jitted(set_row), jitted(mark_prompt), jitted(record)
SAMPLE, ADJUSTED = jitted(sample), jitted(adjusted)


def settings(**changes):
    return SamplingParams(**{"max_tokens": 1000} | changes)


def batch(*requests, prompts=(), outputs=(), rows=ROWS, vocab=VOCAB):
    """Rows of these settings, after these prompts and outputs; the ones left out are empty."""
    state = SamplerState.empty(rows, vocab)
    for row, sampling in enumerate(requests):
        state = SET(state, row, row_params(sampling, (EOS,)))
    for row, prompt in enumerate(prompts):
        state = marked(state, row, prompt)
    for tokens in itertools.zip_longest(*outputs, *[[]] * (rows - len(outputs)), fillvalue=-1):
        tokens = np.array(tokens, np.int32)
        state = RECORD(state, np.maximum(tokens, 0), tokens >= 0)
    return state


def marked(state, row, prompt):
    for start in range(0, len(prompt), CHUNK):
        part = prompt[start : start + CHUNK]
        padded = np.zeros(CHUNK, np.int32)
        padded[: len(part)] = part
        state = MARK(state, row, padded, len(part))
    return state


def everywhere(row):
    """These logits in every row of a batch; the tokens after them are likely, but unknown."""
    logits = np.full((ROWS, VOCAB), 50, np.float32)
    logits[:, : len(row)] = row
    return logits


def normal(seed, *shape, scale=3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def expected_probabilities(logits, sampling, known, prompt=(), output=(), slack=0.0):
    x = logits.astype(np.float64)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] *= sampling.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in set(output):
        x[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        x[[*sampling.stop_tokens, *[EOS] * (not sampling.ignore_eos)]] = -np.inf
    x[known:] = -np.inf
    if sampling.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = (x - x.max()) / sampling.temperature
    if sampling.top_k:
        x[x < np.sort(x)[-min(sampling.top_k, len(x))]] = -np.inf
    p = np.exp(x) / np.exp(x).sum()
    if sampling.top_p < 1:
        best = np.sort(p)[::-1]
        p[p < best[np.cumsum(best).searchsorted(sampling.top_p + slack)]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def probabilities(logits, state, known):
    z = np.asarray(ADJUSTED(logits, state, known), np.float64)
    assert (z.max(-1) == 0).all()
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# The distribution
# ---------------------------------------------------------------------------------------------


def random_settings(rng, known):
    def ids(most):
        return rng.choice(known, rng.integers(0, most + 1), replace=False).tolist()

    return settings(
        min_tokens=int(rng.choice([0, 5])),
        temperature=rng.choice([0, 0.3, 0.7, 1.0, 1.7], p=[0.1, 0.2, 0.2, 0.3, 0.2]),
        top_k=int(rng.choice([0, 1, 3, 12, 40, 10**6], p=[0.4, 0.1, 0.1, 0.2, 0.1, 0.1])),
        top_p=rng.choice([1.0, 0.05, 0.5, 0.9, 0.99], p=[0.4, 0.1, 0.1, 0.2, 0.2]),
        min_p=rng.choice([0, 0.002, 0.02, 0.3, 1], p=[0.4, 0.2, 0.2, 0.1, 0.1]),
        repetition_penalty=rng.choice([1, 0.7, 1.3]),
        frequency_penalty=rng.choice([0, 0.5, -0.7]),
        presence_penalty=rng.choice([0, 0.8, -1.1]),
        logit_bias={token: rng.choice([-100, -2.5, 1.5, 4]) for token in ids(5)},
        stop_tokens=tuple(ids(MAX_STOP_TOKENS)),
        ignore_eos=bool(rng.integers(2)),
    )


def test_every_mixture_of_settings_gives_the_distribution_of_the_plain_reference():
    rng, rows, vocab, known = np.random.default_rng(0), 200, 61, 55
    requests = [random_settings(rng, known) for _ in range(rows)]
    prompts = [rng.integers(0, known, rng.integers(1, 30)).tolist() for _ in range(rows)]
    outputs = [rng.integers(0, known, rng.integers(0, 10)).tolist() for _ in range(rows)]
    logits = normal(1, rows, vocab)
    state = batch(*requests, prompts=prompts, outputs=outputs, rows=rows, vocab=vocab)
    found = probabilities(logits, state, known)
    each = zip(logits, requests, [known] * rows, prompts, outputs, strict=True)
    expected = np.stack([expected_probabilities(*one) for one in each])
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1, 6])
def test_limits_are_exact_over_a_large_vocabulary(scale):
    """top_k to the token; top_p within 1e-6 of the probability that is left."""
    limits = [{"top_p": p} for p in (0.001, 0.5, 0.95, 0.999)]
    limits += [{"top_k": k} for k in (1, 50, 30_000)] + [{"top_k": 5_000, "top_p": 0.8}]
    requests = [settings(temperature=0.9, **limit) for limit in limits]
    logits = normal(2, ROWS, 40_000, scale=scale)
    found = probabilities(logits, batch(*requests, vocab=40_000), 40_000) > 0
    for row, request in enumerate(requests):
        each = (logits[row], request, 40_000)
        least, most = (expected_probabilities(*each, slack=s) > 0 for s in (-1e-6, 1e-6))
        assert (least <= found[row]).all() and (found[row] <= most).all()


def test_limits_tell_neighbouring_floats_apart():
    steps = np.arange(12, dtype=np.int32) - 6
    logits = np.stack([(np.float32(x).view(np.int32) + steps).view(np.float32) for x in (1, -40)])
    limits = [{"top_k": k} for k in (1, 5, 11)] + [{"top_p": p} for p in (0.04, 0.6)]
    for limit in limits:
        state = batch(*[settings(temperature=1.0, **limit)] * 2, rows=2, vocab=12)
        kept = (probabilities(logits, state, 12) > 0).sum(-1).tolist()
        assert kept == [limit.get("top_k") or np.ceil(12 * limit["top_p"])] * 2


def test_tokens_that_share_the_limit_are_all_kept():
    logits = everywhere([4, 3, 3, 3, 1, 0])
    state = batch(*(settings(temperature=1.0, **one) for one in ({"top_k": 2}, {"top_p": 0.6})))
    for kept in probabilities(logits, state, 6)[:2] > 0:
        assert np.flatnonzero(kept).tolist() == [0, 1, 2, 3]


def test_the_largest_vocabulary_does_not_overflow_the_sum_of_its_shares():
    state = batch(settings(temperature=1.0, top_p=0.9), rows=1, vocab=260_000)
    logits = np.zeros((1, 260_000), np.float32)
    logits[0, 1::2] = -0.01
    assert (probabilities(logits, state, 260_000) > 0).all()
    logits[0, 1::2] = -3
    assert (probabilities(logits, state, 260_000) > 0).sum() == 130_000


def test_draws_have_the_probabilities_of_the_reference():
    """20,000 draws: 200 seeds, 100 tokens of each."""
    sampling = {"temperature": 0.6, "top_p": 0.95}
    logits = normal(3, 24, scale=0.5)
    p = expected_probabilities(logits, settings(**sampling), 24)
    rows = jnp.tile(logits, (200, 1))

    def one(state, _):
        tokens = sample(rows, state, 24)
        return record(state, tokens, jnp.ones(200, bool)), tokens

    requests = [settings(seed=seed, **sampling) for seed in range(200)]
    state = batch(*requests, rows=200, vocab=24)
    _, tokens = jax.jit(lambda state: jax.lax.scan(one, state, length=100))(state)
    counts = np.bincount(np.ravel(tokens), minlength=24)
    kept = p > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - 20_000 * p)[kept] ** 2 / (20_000 * p[kept])).sum()
    freedom = kept.sum() - 1
    # Mean and variance are f and 2 f; this far beyond is less likely than 0.001.
    assert freedom > 8 and chi_square < freedom + 3.5 * np.sqrt(2 * freedom)


# ---------------------------------------------------------------------------------------------
# Single settings
# ---------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_the_likeliest_tokens():
    logits = normal(4, ROWS, VOCAB).round()
    greedy = [settings(top_k=40, top_p=0.9, seed=seed) for seed in range(3)]
    alone = SAMPLE(logits, batch(*greedy), VOCAB)
    mixed = SAMPLE(logits, batch(*greedy, *[settings(temperature=1.0)] * 3), VOCAB)
    assert alone[:3].tolist() == mixed[:3].tolist() == logits[:3].argmax(-1).tolist()
    assert alone.dtype == jnp.int32


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-45}, {"min_p": 1.0}]
)
def test_the_narrowest_limit_leaves_the_likeliest_token(narrow):
    logits = normal(5, ROWS, VOCAB)
    state = batch(*(settings(temperature=1.5, seed=seed, **narrow) for seed in range(ROWS)))
    assert SAMPLE(logits, state, VOCAB).tolist() == logits.argmax(-1).tolist()


def test_low_temperatures_approach_greedy_and_stay_finite():
    logits = normal(5, ROWS, VOCAB, scale=1000)
    low = [{"temperature": t, "top_p": p} for t in (1e-45, 1e-6, 1e-3) for p in (0.9, 1)]
    tokens = SAMPLE(logits, batch(*(settings(**one) for one in low)), VOCAB)
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_penalties_count_prompt_and_output_as_they_should():
    penalties = "repetition_penalty", "frequency_penalty", "presence_penalty"
    requests = [settings(temperature=1.0, **{name: 0.5}) for name in penalties]
    state = batch(*requests, prompts=[[0, 1]] * 3, outputs=[[2, 2, 3]] * 3)
    z = np.asarray(ADJUSTED(everywhere([4, -4, 4, -4, 4]), state, 5))[:3, :5]
    penalized = z - z[:, 4:] + 4  # the last token is in neither
    assert penalized.tolist() == [[8, -2, 8, -2, 4], [4, -4, 3, -4.5, 4], [4, -4, 3.5, -4.5, 4]]


def test_stop_tokens_wait_for_the_least_number_of_tokens():
    requests = (
        settings(min_tokens=3, stop_tokens=(3,)),
        settings(min_tokens=3, stop_tokens=(3,), ignore_eos=True),
        settings(min_tokens=3, stop_tokens=(3,), temperature=1.0, top_p=0.1),
    )
    state, made = batch(*requests), []
    for _ in range(4):
        tokens = SAMPLE(everywhere([1, 0, 9, 8, 0]), state, 5)
        state = RECORD(state, tokens, np.ones(ROWS, bool))
        made.append(tokens[:3].tolist())
    assert made == [[0, EOS, 0]] * 3 + [[EOS] * 3]


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    logits = everywhere(normal(6, 10))
    state = batch(*(settings(temperature=5.0, seed=s, logit_bias={30: 100}) for s in range(7)))
    for _ in range(5):
        tokens = SAMPLE(logits, state, 10)
        assert tokens.max() < 10
        state = RECORD(state, tokens, np.ones(ROWS, bool))
    assert (probabilities(logits, state, 10)[:, 10:] == 0).all()


def test_a_bias_against_everything_changes_nothing():
    against = {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS), -100)}
    samplings = {}, {"temperature": 1.0, "top_p": 0.9}
    state = batch(*(settings(**one, **bias) for bias in (against, {}) for one in samplings))
    tokens = SAMPLE(everywhere(normal(7, VOCAB)), state, VOCAB).tolist()
    assert VOCAB == MAX_LOGIT_BIAS and tokens[:2] == tokens[2:4]


def test_ids_outside_any_vocabulary_are_ignored():
    logits = everywhere([0] * VOCAB)
    logits[:, -1], logits[:4, -2] = 1, 2
    ids = dict.fromkeys((-1, VOCAB, 2**31 - 1, 2**40), 100.0)
    stops = settings(stop_tokens=tuple(ids), min_tokens=1)
    state = batch(*[settings(logit_bias=ids)] * 4, *[stops] * 4)
    assert SAMPLE(logits, state, VOCAB).tolist() == [VOCAB - 2] * 4 + [VOCAB - 1] * 4


def test_a_row_that_is_not_a_number_still_gets_a_token():
    for state in batch(), batch(settings(temperature=1.0, top_p=0.9, top_k=3)):
        assert SAMPLE(everywhere([np.nan] * VOCAB), state, 10).tolist() == [0] * ROWS


# ---------------------------------------------------------------------------------------------
# Rows, steps, programs
# ---------------------------------------------------------------------------------------------

NEIGHBOURS = (
    settings(),
    settings(temperature=1.0, top_k=7, seed=3, frequency_penalty=1.0),
    settings(temperature=0.9, top_p=0.5, logit_bias={3: 5.0}, min_tokens=9),
    settings(temperature=1.2, repetition_penalty=1.5, min_p=0.1),
)


def continued(request, row, neighbours, steps=12):
    """What a request in some row makes of fixed logits, and the last adjusted logits."""
    requests = [*neighbours[:row], request, *neighbours[row:]]
    rows, made, z = len(requests), [], None
    state = batch(*requests, prompts=[[5, 6]] * rows, rows=rows, vocab=1000)
    for step in range(steps):
        logits = normal([9, row, step], rows, 1000)
        logits[row] = normal([9, step], 1000)
        z = ADJUSTED(logits, state, 1000)[row]
        tokens = SAMPLE(logits, state, 1000)
        made.append(int(tokens[row]))
        state = RECORD(state, tokens, np.ones(rows, bool))
    return made, np.asarray(z)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.6, "top_p": 0.95, "seed": 11},
        {"temperature": 1.0, "seed": LARGEST_SEED},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "presence_penalty": 0.5, "seed": 5},
    ],
)
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(asked):
    alone, z = continued(settings(**asked), 0, ())
    among, same = continued(settings(**asked), 3, NEIGHBOURS)
    assert alone == among and len(set(alone)) > 6 and (z == same).all()


def test_seeds_and_steps_draw_differently():
    state, made = batch(*(settings(temperature=1.0, seed=seed) for seed in range(ROWS))), []
    for _ in range(5):
        tokens = SAMPLE(everywhere([0] * VOCAB), state, VOCAB)
        state = RECORD(state, tokens, np.ones(ROWS, bool))
        made += tokens.tolist()
    assert len(set(made)) > 30  # of 40 among 300


def test_several_positions_in_one_program_equal_one_step_after_another():
    logits = jnp.asarray(normal(10, 3, ROWS, VOCAB))
    state = batch(*NEIGHBOURS)
    active = jnp.arange(3)[:, None] < jnp.array([[3, 1, 2, 3, 0, 0, 0, 0]])

    @jax.jit
    def together(state):
        made = []
        for position in range(3):
            made.append(sample(logits[position], state, VOCAB))
            state = record(state, made[-1], active[position])
        return jnp.stack(made), state

    made, after = together(state)
    for position in range(3):
        tokens = SAMPLE(logits[position], state, VOCAB)
        state = RECORD(state, tokens, active[position])
        assert made[position].tolist() == tokens.tolist()
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert after.made.tolist() == after.counts.sum(-1).tolist() == [3, 1, 2, 3, 0, 0, 0, 0]


def test_no_setting_and_no_prompt_compiles_anything_again():
    functions = [jitted(f) for f in (set_row, mark_prompt, record, sample, adjusted, logprobs)]
    set_, mark, record_, sample_, adjusted_, logprobs_ = functions
    rng, state, logits = np.random.default_rng(0), SamplerState.empty(3, 90), normal(11, 3, 90)
    for step in range(30):
        state = set_(state, step % 3, row_params(random_settings(rng, 80), (4, 5)[: step % 3]))
        state = mark(state, step % 3, rng.integers(0, 80, CHUNK, np.int32), step % CHUNK)
        tokens = sample_(logits, state, 60 + step)
        adjusted_(logits, state, 60 + step)
        logprobs_(logits, tokens, 60 + step)
        state = record_(state, tokens, rng.integers(0, 2, 3).astype(bool))
    assert [f._cache_size() for f in functions] == [1] * len(functions)


def test_a_prompt_in_chunks_marks_what_it_holds_and_nothing_else():
    prompt = [3, 19, 3, 0, 7, 12, 5, 18, 1, 9]
    state = marked(batch(), 1, prompt)
    whole = MARK(batch(), 1, np.array(prompt, np.int32), len(prompt))
    assert np.flatnonzero(state.in_prompt[1]).tolist() == sorted(set(prompt))
    assert not state.in_prompt[0].any()
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_new_request_finds_nothing_of_the_one_before():
    requests = NEIGHBOURS[1], settings(temperature=0.5, seed=8)
    used = batch(*requests, prompts=[[1, 2], [3]], outputs=[[4, 4], [5]])
    fresh = SET(used, 0, row_params(requests[0], (EOS,)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), fresh, used)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), fresh, batch(*requests))


@pytest.mark.parametrize(("vocab", "known"), [(300, 300), (300, 250), (30, 12), (9, 9)])
def test_logprobs_are_those_of_the_model_over_the_known_tokens(vocab, known):
    logits, tokens = normal(12, 5, vocab), np.arange(5, dtype=np.int32)
    chosen, ids, values = jitted(logprobs)(logits, tokens, known)
    x = logits[:, :known].astype(np.float64)
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    best = np.argsort(-x, axis=-1)[:, :20]
    np.testing.assert_allclose(chosen, expected[np.arange(5), tokens], rtol=1e-5)
    np.testing.assert_array_equal(ids[:, : best.shape[1]], best)
    best_values = np.take_along_axis(expected, best, 1)
    np.testing.assert_allclose(values[:, : best.shape[1]], best_values, rtol=1e-5)
    assert ids.shape == values.shape == (5, min(20, vocab))
    assert (values[:, known:] == -np.inf).all()
