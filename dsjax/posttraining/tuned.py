"""What a run that begins at a checkpoint trains: all of its weights, or adapters beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.checkpoint.adapters import adapted
from dsjax.checkpoint.load import load_on, with_config
from dsjax.config_sft import TuningConfig
from dsjax.errors import UserError
from dsjax.model.layers import Frozen, RouterBias, tree_shardings
from dsjax.model.lora import add_adapters
from dsjax.model.transformer import Transformer
from dsjax.places import ObjectPath, as_path
from dsjax.training.step import TrainState, state_of
from sharding.rules import Layout


@dataclass(frozen=True)
class Tuned:
    """The state of a run, as shapes and from `init`.

    Weights that are trained are float32; under adapters they are frozen, and held in the dtype that
    is computed in. A checkpoint of a run with adapters has no frozen weights: they are read from
    `init` again.
    """

    config: TuningConfig
    layout: Layout

    def __post_init__(self) -> None:
        """Raise `UserError` for adapters that cannot be, before anything is read."""
        lora = self.config.lora
        if lora is None:
            return
        adapted(self.config.model, lora.target_modules)
        for key, path in (("run_dir", self.config.run_dir), ("init", self.config.init)):
            if isinstance(as_path(path), ObjectPath):
                raise UserError(f"{key}={path}: adapters are read together with `init`, on a disk")

    @property
    def abstract(self) -> TrainState:
        """Shapes and dtypes of all of it."""

        def start(key: jax.Array) -> TrainState:
            config = self.config
            model = Transformer(
                config.model, key, param_dtype=self._held, dtype=config.training.compute_dtype
            )
            return self._start(model)

        state: TrainState = jax.eval_shape(start, jax.random.key(0))
        return state

    def begin(self) -> TrainState:
        """The checkpoint's weights on the mesh, new adapters, and moments of zero."""
        model = load_on(self.config.init, self._held, self.layout)
        model = with_config(model, self.config.model)
        model.dtype = jnp.dtype(self.config.training.compute_dtype)
        shardings = tree_shardings(jax.eval_shape(self._start, model), self.layout)
        state: TrainState = jax.jit(self._start, out_shardings=shardings, donate_argnums=0)(model)
        return state

    def complete(self, saved: TrainState) -> TrainState:
        """A state out of what `kept` left of one."""
        if self.config.lora is None:
            return saved
        graph, _, frozen = nnx.split(self.begin().model, (nnx.Param, RouterBias), Frozen)
        return saved._replace(model=nnx.merge(graph, saved.model, frozen))

    @property
    def _held(self) -> Any:
        computed = self.config.training.compute_dtype
        return jnp.dtype("float32" if self.config.lora is None else computed)

    @cached_property
    def _paths(self) -> list[str]:
        lora = self.config.lora
        return [] if lora is None else list(adapted(self.config.model, lora.target_modules))

    def _start(self, model: Transformer) -> TrainState:
        if (lora := self.config.lora) is not None:
            key = jax.random.fold_in(jax.random.key(self.config.seed), 2)
            model = add_adapters(model, self._paths, key, rank=lora.rank, alpha=lora.alpha)
        return state_of(model, self.config)
