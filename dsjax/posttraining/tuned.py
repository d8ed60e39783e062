"""What a run that begins at a checkpoint trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from dsjax.checkpoint.load import load_on
from dsjax.config_sft import SftConfig
from dsjax.model.layers import tree_shardings
from dsjax.training.step import TrainState, init_state, state_of
from sharding.rules import Layout


@dataclass(frozen=True)
class Tuned:
    """The state of a run, as shapes and from `init`; weights that are trained are float32."""

    config: SftConfig
    layout: Layout

    @property
    def abstract(self) -> TrainState:
        """Shapes and dtypes of all of it."""
        state: TrainState = jax.eval_shape(partial(init_state, self.config))
        return state

    def begin(self) -> TrainState:
        """The checkpoint's weights on the mesh, and moments of zero."""
        model = load_on(self.config.init, jnp.float32, self.layout)
        model.dtype = jnp.dtype(self.config.training.compute_dtype)
        shardings = tree_shardings(self.abstract, self.layout)
        start = jax.jit(partial(state_of, config=self.config), out_shardings=shardings,
                        donate_argnums=0)  # fmt: skip
        state: TrainState = start(model)
        return state
