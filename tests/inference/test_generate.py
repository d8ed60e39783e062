import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config_files import load_model_config
from dsjax.errors import UserError
from dsjax.inference.generate import generate
from dsjax.model.transformer import Transformer

PROMPTS = [[0, 5, 9], [0, 7], [0, 100, 200, 300, 400, 17, 3]]


@pytest.fixture(scope="module")
def model():
    config = load_model_config("cpu-tiny").model_copy(update={"initializer_range": 0.2})
    return Transformer(config, jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=12)


def test_greedy_takes_the_likeliest_token_of_the_whole_forward_pass(model, greedy):
    forward = jax.jit(lambda model, tokens: model(tokens).logits)
    for prompt, made in zip(PROMPTS, greedy, strict=True):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(prompt) + len(made)] = prompt + made
        logits = np.asarray(forward(model, jnp.asarray(row)))[0]
        best = logits.argmax(-1)[len(prompt) - 1 : len(prompt) + len(made) - 1]
        assert best.tolist() == made
    assert len({token for made in greedy for token in made}) > 8


def test_a_row_does_not_depend_on_its_neighbours(model, greedy):
    for prompt, made in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt] * 3, max_new_tokens=12)[1] == made


def test_it_stops_at_eos_and_keeps_it(model, greedy):
    token = greedy[2][4]
    unseen = next(t for t in range(90) if t not in greedy[2])
    for eos in (token, (unseen, token)):  # any of several ends it
        stopping = Transformer(
            model.config.model_copy(update={"eos_token_id": eos}), jax.random.key(0)
        )
        [made] = generate(stopping, [PROMPTS[2]], max_new_tokens=12)
        assert made == greedy[2][: greedy[2].index(token) + 1]


def test_sampling_repeats_with_its_seed_and_keeps_within_the_vocabulary(model):
    one, same, other = (
        generate(model, PROMPTS, max_new_tokens=12, temperature=2.0, seed=s, vocab_size=50)
        for s in (1, 1, 2)
    )
    assert one == same != other
    assert max(token for made in one for token in made) < 50


@pytest.mark.slow
def test_sampled_tokens_have_the_probabilities_of_the_softmax(model):
    logits = np.asarray(model(jnp.asarray([[0, 5]])).logits)[0, -1, :4]
    made = generate(model, [[0, 5]] * 4096, max_new_tokens=1, temperature=1.5, seed=3, vocab_size=4)
    counts = np.bincount([row[0] for row in made], minlength=4)
    p = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    chi_square = ((counts - 4096 * p) ** 2 / (4096 * p)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("prompts", "settings", "expected"),
    [
        ([[]], {}, "prompt 0: the prompt is empty"),
        ([[1], [512]], {}, "prompt 1: the prompt holds token 512, outside vocab_size=512"),
        ([[1] * 1020], {}, "beyond max_position_embeddings=1024"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"max_new_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, settings, expected):
    with pytest.raises(UserError, match=expected):
        generate(model, prompts, **{"max_new_tokens": 8} | settings)


def test_no_prompts_give_no_continuations(model):
    assert generate(model, [], max_new_tokens=3) == []
