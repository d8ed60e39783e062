import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.training.loss import cross_entropy, token_scores


def whole(hidden, head, targets, weights):
    logits = jnp.einsum("bsd,vd->bsv", hidden, head)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 11, 8))
    head = jax.random.normal(keys[1], (19, 8))
    targets = jax.random.randint(keys[2], (2, 11), 0, 19)
    weights = jax.random.uniform(keys[3], (2, 11)).at[:, -2:].set(0)
    return hidden, head, targets, weights


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunked_loss_and_its_gradients_equal_the_whole(case, chunk):
    want, want_grads = jax.value_and_grad(whole, (0, 1))(*case)
    got, grads = jax.value_and_grad(cross_entropy, (0, 1))(*case, chunk)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(*case, chunk), want, rtol=1e-6)
    for mine, theirs in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_with_what_comes_from_above(case):
    hidden, *rest = case
    once = jax.grad(lambda h: cross_entropy(h, *rest, 4))(hidden)
    thrice = jax.grad(lambda h: 3 * cross_entropy(h, *rest, 4))(hidden)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_no_array_of_tokens_by_vocabulary_is_ever_whole():
    hidden = jax.ShapeDtypeStruct((4, 256, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((1000, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    weights = jax.ShapeDtypeStruct((4, 256), jnp.float32)

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, 32)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, targets, weights).compile()
    whole_bytes = 4 * 256 * 1000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole_bytes
    assert "f32[4,256,1000]" not in compiled.as_text()
    assert "f32[1024,1000]" not in compiled.as_text()


def test_token_scores_are_those_of_the_whole(case):
    hidden, head, targets, _ = case
    nll, best = token_scores(hidden, head, targets, 4)
    logits = jnp.einsum("bsd,vd->bsv", hidden, head)
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(best, logits.argmax(-1))
