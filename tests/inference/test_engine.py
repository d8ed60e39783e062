"""The engine says what the model says, whatever runs beside a request and however it is run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.errors import UserError
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import Layout

from .conftest import CONTEXT, Finished, run, whole_logits

NEW = 16
SETTINGS = EngineSettings(rows=4, context=CONTEXT, drafts=0)


def make_prompts(count: int, vocab: int = 96, shared: int = 0) -> list[tuple[int, ...]]:
    """Of 1 to 100 tokens; the first `shared` are the same in every second one."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, vocab, shared)
    prompts = []
    for number in range(count):
        own = rng.integers(0, vocab, rng.integers(1, 100 - shared))
        tokens = np.concatenate([common, own]) if number % 2 else own
        prompts.append(tuple(tokens.tolist()))
    return prompts


def greedy(prompts: list[tuple[int, ...]], **settings: object) -> list[Request]:
    sampling = SamplingParams(**{"max_tokens": NEW, "logprobs": 2} | settings)
    return [Request(str(n), prompt, sampling) for n, prompt in enumerate(prompts)]


def tokens_of(found: dict[str, Finished]) -> list[list[int]]:
    return [found[str(number)].tokens for number in range(len(found))]


@pytest.fixture(scope="module")
def plain(random_model: Transformer) -> Engine:
    engine = Engine(random_model, SETTINGS)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def drafting(random_model: Transformer) -> Engine:
    return Engine(random_model, EngineSettings(rows=4, context=CONTEXT, drafts=2))


def test_greedy_tokens_are_the_likeliest_of_one_pass_over_everything(
    random_model: Transformer, plain: Engine
) -> None:
    """And log-probabilities are those of that pass, of the prompt's tokens too."""
    requests = greedy(make_prompts(12), prompt_logprobs=2)
    found = run(plain, requests)
    for request in requests:
        done = found[request.id]
        logits = whole_logits(random_model, [*request.tokens, *done.tokens])
        chances = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        assert done.tokens == logits.argmax(-1)[len(request.tokens) - 1 : -1].tolist()
        said = [*done.updates[0].prompt_logprobs[1:], *done.logprobs]
        after = [*request.tokens[1:], *done.tokens]
        assert [one.token for one in said] == after
        expected = chances[np.arange(len(after)), after]
        assert np.abs([one.logprob for one in said] - expected).max() < 1e-4
        best = np.sort(chances[:-1])[:, :-3:-1]
        assert np.abs(np.array([[v for _, v in one.top] for one in said]) - best).max() < 1e-4


@pytest.mark.slow
def test_two_hundred_prompts_say_the_same_alone_in_any_company_and_with_drafts(
    plain: Engine, drafting: Engine
) -> None:
    prompts = make_prompts(200, shared=40)
    alone = [tokens_of(run(plain, greedy([prompt])))[0] for prompt in prompts]
    margins = []
    for engine, order in ((plain, range(200)), (plain, range(199, -1, -1)), (drafting, range(200))):
        found = run(engine, greedy([prompts[number] for number in order]))
        together = tokens_of(found)
        for one in found.values():
            margins += [best[1] - second[1] for _, _, (best, second) in one.logprobs]
        assert together == [alone[number] for number in order]
    hits = plain.stats().prefix_hits
    print(f"\n  smallest top-2 margin {min(margins):.1e}; {hits} tokens of prompts were reused")
    assert hits > 2000
    assert drafting.stats().drafted > 0


def test_a_sampled_request_repeats_whatever_runs_beside_it(plain: Engine, drafting: Engine) -> None:
    """Its seed and its prompt say what it becomes; drafts change nothing but the time."""
    requests = [
        Request(str(n), prompt, SamplingParams(
            max_tokens=NEW, temperature=1.5, top_p=0.95, top_k=40, min_p=0.01, seed=n,
            repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.2,
            logit_bias={5: 2.0, 7: -50.0}, min_tokens=4, stop_tokens=(3, 4),
        ))
        for n, prompt in enumerate(make_prompts(24))
    ]  # fmt: skip
    alone = [run(plain, [request])[request.id].tokens for request in requests]
    assert [found.tokens for found in run(plain, requests).values()] == alone
    assert [found.tokens for found in run(drafting, requests).values()] == alone
    assert all(len(tokens) >= 4 for tokens in alone)
    assert {tokens[-1] for tokens in alone if len(tokens) < NEW} <= {3, 4}
    assert not any(7 in tokens for tokens in alone)


def test_nothing_compiles_after_the_warm_up(random_model: Transformer) -> None:
    engine = Engine(random_model, SETTINGS)
    engine.warm_up()
    compiled: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for count, lengths in ((1, 20), (7, 3), (13, 9)):
            run(engine, greedy(make_prompts(count)[::-1], max_tokens=lengths, prompt_logprobs=1))
            sampled = SamplingParams(
                max_tokens=5, temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=9
            )
            run(engine, [Request(str(n), (1, 2, n), sampled) for n in range(count)])
        assert compiled == []
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(17))
        assert compiled != []  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_requests_wait_for_pages_and_give_way_without_changing_a_token(
    random_model: Transformer, plain: Engine
) -> None:
    """Pages for one and a half of the four sequences that run at the same time."""
    requests = greedy(make_prompts(12), max_tokens=28)
    expected = tokens_of(run(plain, requests))
    settings = EngineSettings(rows=4, context=CONTEXT, cache_tokens=192, drafts=0)
    tight = Engine(random_model, settings)
    assert tokens_of(run(tight, requests)) == expected
    assert tight.stats().preempted > 0


def test_a_preempted_request_keeps_its_penalties(random_model: Transformer, plain: Engine) -> None:
    requests = [
        Request(str(n), (n,) * 20, SamplingParams(
            max_tokens=90, frequency_penalty=0.7, repetition_penalty=1.3, temperature=1.0, seed=n,
        ))
        for n in range(4)
    ]  # fmt: skip
    expected = tokens_of(run(plain, requests))
    tight = Engine(
        random_model, EngineSettings(rows=4, context=CONTEXT, cache_tokens=192, drafts=0)
    )
    assert tokens_of(run(tight, requests)) == expected
    assert tight.stats().preempted > 0


def test_a_cancelled_request_leaves_no_trace(plain: Engine) -> None:
    requests = greedy(make_prompts(9))
    expected = tokens_of(run(plain, requests))
    for request in requests:
        plain.submit(request)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    for number in range(200):
        if number == 3:
            plain.cancel("1")  # it runs
            plain.cancel("8")  # it waits
            plain.cancel("8")  # once more does no harm
        for update in plain.step():
            assert number < 3 or update.request_id not in ("1", "8")
            found[update.request_id] += update.tokens
        if plain.idle:
            break
    kept = [number for number in range(9) if number not in (1, 8)]
    assert [found[str(number)] for number in kept] == [expected[number] for number in kept]
    assert plain.stats().cache_usage == 0


def test_a_beginning_that_was_read_before_is_not_read_again(random_model: Transformer) -> None:
    engine = Engine(random_model, SETTINGS)
    [long] = [prompt for prompt in make_prompts(40) if len(prompt) > 95][:1]
    first = run(engine, greedy([long]))["0"]
    read = engine.stats().prompt_tokens
    again = run(engine, greedy([(*long[:70], 5, 6)]))["0"]
    assert again.updates[0].cached_tokens == 64
    assert engine.stats().prompt_tokens - read == 72 - 64
    fresh = run(Engine(random_model, SETTINGS), greedy([(*long[:70], 5, 6)]))["0"]
    assert again.tokens == fresh.tokens
    # What was made can be a beginning as well.
    whole = (*long, *first.tokens, 9)
    assert run(engine, greedy([whole], max_tokens=4))["0"].updates[0].cached_tokens == 96


def test_stop_tokens_end_a_request_and_are_its_last_token(
    random_model: Transformer, plain: Engine
) -> None:
    [tokens] = tokens_of(run(plain, greedy([(1, 2, 3)])))
    stop = tokens[5]
    expected = tokens[: tokens.index(stop) + 1]
    done = run(plain, greedy([(1, 2, 3)], stop_tokens=(stop,)))["0"]
    assert (done.tokens, done.finish) == (expected, "stop")
    done = run(plain, greedy([(1, 2, 3)], stop_tokens=(stop,), min_tokens=8))["0"]
    assert stop not in done.tokens[:7]
    assert run(plain, greedy([(1, 2, 3)]))["0"].finish == "length"


def test_a_mesh_says_what_one_device_says(random_model: Transformer, plain: Engine) -> None:
    requests = greedy(make_prompts(9))
    expected = tokens_of(run(plain, requests))
    layout = Layout(make_mesh({"data": 2, "expert": 2, "tensor": 2}))
    spread = jax.device_put(random_model, tree_shardings(random_model, layout))
    engine = Engine(spread, EngineSettings(rows=4, context=CONTEXT, drafts=1))
    assert tokens_of(run(engine, requests)) == expected


@pytest.mark.parametrize(
    ("tokens", "settings", "said"),
    [
        ((), {}, "the prompt is empty"),
        ((1, 96), {}, "token 96"),
        ((1, -1), {}, "token -1"),
        ((1,) * 120, {}, "beyond the context of 128"),
        ((1,), {"logit_bias": {96: 1.0}}, "token 96"),
        ((1,), {"stop_tokens": (-3,)}, "token -3"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    plain: Engine, tokens: tuple[int, ...], settings: dict, said: str
) -> None:
    sampling = SamplingParams(**{"max_tokens": 16} | settings)
    with pytest.raises(UserError, match=said):
        plain.submit(Request("refused", tokens, sampling))
    assert plain.idle


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"frequency_penalty": -3},
        {"presence_penalty": float("inf")},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": dict.fromkeys(range(301), 1.0)},
        {"logprobs": 21},
        {"seed": 2**32},
    ],
)
def test_sampling_parameters_outside_their_range_are_refused(settings: dict) -> None:
    [name] = settings
    with pytest.raises(UserError, match=name):
        SamplingParams(**{"max_tokens": 16} | settings)


def test_drawn_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(
    random_model: Transformer, plain: Engine
) -> None:
    """Temperature, then top-p over what is left, computed in numpy from one pass over all."""
    settings = {"temperature": 0.7, "top_p": 0.9, "logprobs": 0, "ignore_eos": True}
    prompts = make_prompts(6)
    found = run(plain, greedy(prompts, **settings))
    for number, prompt in enumerate(prompts):
        one = found[str(number)]
        logits = whole_logits(random_model, [*prompt, *one.tokens]).astype(np.float64)
        drawn = [value for update in one.updates for value in update.drawn_logprobs]
        assert len(drawn) == len(one.tokens) == NEW
        for place, (token, value) in enumerate(zip(one.tokens, drawn, strict=True)):
            row = logits[len(prompt) - 1 + place] / 0.7
            chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            order = np.argsort(-chances)
            kept = order[: np.searchsorted(chances[order].cumsum(), 0.9) + 1]
            assert value == pytest.approx(np.log(chances[token] / chances[kept].sum()), abs=1e-3)


def test_the_experts_of_every_token_are_told_whatever_was_found_in_the_cache(
    random_model: Transformer,
) -> None:
    """A second time the prompt's pages are there already; with few pages some have to wait."""
    prompts = make_prompts(6, shared=64)
    told = []
    for room in (None, CONTEXT + 64):
        settings = EngineSettings(
            rows=4, context=CONTEXT, drafts=0, experts=True, cache_tokens=room
        )
        engine = Engine(random_model, settings)
        for _ in range(2):
            found = run(engine, greedy(prompts))
            told.append([found[str(n)].updates[-1].experts for n in range(len(prompts))])
            assert all(u.experts is None for one in found.values() for u in one.updates[:-1])
        assert engine.stats().prefix_hits > 0
    assert engine.stats().preempted > 0
    for number, prompt in enumerate(prompts):
        first = told[0][number]
        assert first is not None and first.shape == (len(prompt) + NEW - 1, 2, 3)
        for other in told[1:]:
            np.testing.assert_array_equal(other[number], first)


def test_an_engine_goes_on_with_other_weights_and_remembers_nothing_of_the_old(
    random_model: Transformer,
) -> None:
    prompts = make_prompts(4, shared=64)
    engine = Engine(random_model, SETTINGS)
    before = tokens_of(run(engine, greedy(prompts)))
    other = jax.tree.map(lambda x: x, random_model)
    other.embed.weight[...] = other.embed.weight[...][:, ::-1]
    engine.take(other)
    after = tokens_of(run(engine, greedy(prompts)))
    assert after == tokens_of(run(Engine(other, SETTINGS), greedy(prompts))) != before
    engine.submit(greedy(prompts)[0])
    with pytest.raises(UserError, match="let them finish"):
        engine.take(random_model)
