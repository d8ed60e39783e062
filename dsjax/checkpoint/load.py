"""`dsjax.load`: a model from whatever holds one, weights placed on the mesh."""

from __future__ import annotations

import contextlib
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.from_files import load_files, load_files_apart
from dsjax.checkpoint.source import RUN, kind_of, run_with_adapters
from dsjax.checkpoint.store import CheckpointStore, abstract_on
from dsjax.config_files import load_run_config
from dsjax.errors import UserError
from dsjax.model.decoder import Decoder, take_apart
from dsjax.model.layers import RouterBias, tree_shardings, variables
from dsjax.model.transformer import Transformer
from dsjax.places import as_path
from sharding.mesh import make_mesh
from sharding.rules import DECODE_RULES, Layout, use_layout


def load(path: str | Path, dtype: Any = None, mesh: Mesh | None = None) -> Transformer:
    """Load a model.

    Args:
        path: a Hugging Face folder of a family in `checkpoint/families.py`, weights that `dsjax
            convert` wrote, the directory of a run, whose adapters are merged, or a GGUF file; the
            first two also in a bucket, gs://BUCKET/PATH.
        dtype: float32 or bfloat16, to hold and compute in; None keeps what is stored, FP8 too, and
            computes as the embedding is stored, in float32 where that is float16. Router biases are
            always float32.
        mesh: made by `sharding.mesh.make_mesh`; None puts everything on the default device.

    Raises:
        UserError: nothing there can be loaded; the message says what was found.
    """
    return load_on(path, dtype, None if mesh is None else Layout(mesh, DECODE_RULES))


def load_decoder(path: str | Path, dtype: Any = None, mesh: Mesh | None = None) -> Decoder:
    """The same as decoding reads it, for `Engine`: no model is made first, where files hold one.

    A run's weights are loaded whole, and copied.
    """
    folder = as_path(path)
    layout = None if mesh is None else Layout(mesh, DECODE_RULES)
    if not _is_plain_run(folder):
        return load_files_apart(folder, dtype, layout)
    model = _load_run(folder, dtype, layout)
    with contextlib.nullcontext() if layout is None else use_layout(layout):
        return take_apart(model)


def load_on(path: str | Path, dtype: Any, layout: Layout | None) -> Transformer:
    """The same, placed by any layout: a run begins where another one, or a release, ended."""
    folder = as_path(path)
    if _is_plain_run(folder):
        return _load_run(folder, dtype, layout)
    return load_files(folder, dtype, layout)


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """Return the model with another configuration; every tensor must keep its shape."""
    abstract = jax.eval_shape(
        lambda key: Transformer(config, key, dtype=model.dtype), jax.random.key(0)
    )
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def _is_plain_run(folder: Path) -> bool:
    """Whether its weights are a run's own: adapters are merged as a file is read."""
    return kind_of(folder) == RUN and run_with_adapters(folder) is None


def _load_run(folder: Path, dtype: Any, layout: Layout | None) -> Transformer:
    """The newest sound weights of a run; its optimizer is left where it is."""
    config = load_run_config(folder / "config.yaml")
    layout = layout or Layout(make_mesh(devices=jax.local_devices()[:1]))
    abstract = jax.eval_shape(
        lambda key: Transformer(config.model, key, dtype=config.training.compute_dtype),
        jax.random.key(0),
    )
    placed = abstract_on(abstract, tree_shardings(abstract, layout))
    with closing(CheckpointStore(folder / "checkpoints", keep=None)) as store:
        restored = store.restore({"model": placed}, part=True)
    if restored is None:
        raise UserError(f"{folder}: the run has no checkpoint yet; let it train longer")
    model: Transformer = restored[1]["model"]
    if dtype is not None:
        model.dtype = jnp.dtype(dtype)
        for _, variable in variables(model):
            if not isinstance(variable, RouterBias):
                variable.set_value(variable[...].astype(dtype))
    return model
