import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from dsjax.config import OptimizerConfig
from dsjax.config_files import load_model_config
from dsjax.model.layers import variables
from dsjax.model.transformer import Transformer
from dsjax.training.optimizer import decayed, make_optimizer, scale_by_bfloat16_adam


def test_adam_equals_numpy_with_moments_rounded_to_bfloat16():
    rng = np.random.default_rng(0)
    transform = scale_by_bfloat16_adam(0.9, 0.95, 1e-8)
    state = transform.init(jnp.zeros(50))
    m = v = np.zeros(50, np.float32)
    for step in range(1, 6):
        g = rng.normal(size=50).astype(np.float32)
        got, state = transform.update(jnp.asarray(g), state)
        m = 0.9 * m + np.float32(0.1) * g
        v = 0.95 * v + np.float32(0.05) * g * g
        want = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(got, want, rtol=2e-5)
        m = m.astype(ml_dtypes.bfloat16).astype(np.float32)
        v = v.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert state.mu.dtype == state.nu.dtype == jnp.bfloat16


def test_the_gradient_is_clipped_by_its_global_norm():
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = make_optimizer(config)
    params = {
        "a": nnx.Param(jnp.zeros(3), axes=("embed",)),
        "b": nnx.Param(jnp.zeros(4), axes=("embed",)),
    }
    grads = jax.tree.map(lambda p: jnp.full_like(p, 10.0), params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = state[1]
    np.testing.assert_allclose(np.float32(moments.mu["a"][...]), 0.1 / np.sqrt(7), rtol=1e-2)


def test_weight_decay_acts_on_matrices_and_not_on_norm_gains():
    model = jax.eval_shape(
        lambda key: Transformer(load_model_config("cpu-tiny"), key), jax.random.key(0)
    )
    mask = decayed(nnx.state(model, nnx.Param))
    flags = dict(zip([name for name, _ in variables(nnx.state(model, nnx.Param))],
                     jax.tree.leaves(mask), strict=True))  # fmt: skip
    assert not any("router.bias" in name for name in flags)
    for name, flag in flags.items():
        assert flag == ("norm" not in name), name
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.5)
    optimizer = make_optimizer(config)
    params = {
        "w": nnx.Param(jnp.ones(2), axes=("embed",)),
        "g": nnx.Param(jnp.ones(2), axes=("norm",)),
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"][...], 0.5)
    np.testing.assert_allclose(updates["g"][...], 0.0)
