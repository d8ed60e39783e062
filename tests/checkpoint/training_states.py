"""Small training states with a leaf of every kind, and how to compare them bit for bit."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint.store import CheckpointStore


@jax.tree_util.register_dataclass
@dataclass
class Moments:
    mean: jax.Array
    square: jax.Array


def make_state(seed: int, size: int = 16) -> dict[str, Any]:
    """One leaf of every kind that a training state holds, with random bits in each."""
    bits = np.random.default_rng(seed).integers(0, 2**16, (4, size, 8), np.uint16)
    finite = jnp.asarray(bits & 0xBFFF)  # clears the exponent's top bit: no NaN, no infinity
    return {
        "params": {"layers": [jnp.asarray(finite[0], jnp.float32) / 7, jnp.int32(seed)]},
        "moments": Moments(
            mean=jax.lax.bitcast_convert_type(finite[1], jnp.bfloat16),
            square=jax.lax.bitcast_convert_type(finite[2], jnp.bfloat16),
        ),
        "key": jax.random.key(seed),
        "raw_key": jax.random.key_data(jax.random.key(seed + 1)),
        "bias": jnp.float32(1 / (seed + 3)),
        "empty": jnp.zeros((0, size), jnp.bfloat16),
    }


def abstract(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def bits_of(state: Any) -> list[tuple[str, str, bytes]]:
    """Path, dtype and bytes of every leaf."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(state):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(leaf) if is_key else leaf
        found.append((jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(data).tobytes()))
    return found


def save_steps(folder: Path, *steps: int, keep: int = 10) -> None:
    with closing(CheckpointStore(folder, keep)) as store:
        for step in steps:
            store.save(step, make_state(step), {"step": step})
