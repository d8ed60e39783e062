"""What is saved from memory is what is loaded again, in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from reference.configs import CONFIGS, DENSE_CONFIGS
from reference.weights import place, random_weights

import dsjax
from dsjax.checkpoint import streams
from dsjax.checkpoint.inspect import report
from dsjax.errors import UserError
from dsjax.model.layers import RouterBias, tree_shardings, variables
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import Layout

MODELS: dict[str, Any] = {name: CONFIGS[name] for name in ("v3", "v2")} | DENSE_CONFIGS


def make(name: str) -> Transformer:
    return place(MODELS[name], random_weights(MODELS[name]))


def assert_same(found: Transformer, expected: Transformer) -> None:
    theirs = dict(variables(expected))
    for path, variable in variables(found):
        assert variable.dtype == theirs[path].dtype
        assert (variable[...] == theirs[path][...]).all(), path


@pytest.mark.parametrize("form", ["hf", "dsjax"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_loaded_again(tmp_path: Path, name: str, form: str) -> None:
    model = make(name)
    dsjax.save(model, tmp_path / "new" / "folder", format=form)
    found = dsjax.load(tmp_path / "new" / "folder")
    assert_same(found, model)
    kept = {"initializer_range", "embedding_initializer_range"}
    assert found.config.model_dump(exclude=kept) == model.config.model_dump(exclude=kept)
    assert report(str(tmp_path / "new" / "folder"))["family"] == model.config.model_type


@pytest.mark.parametrize("form", ["hf", "dsjax"])
def test_a_model_on_a_mesh_is_saved_in_pieces(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 over eight devices, some hundred numbers at a time."""
    monkeypatch.setattr(streams, "SLAB", 100)
    model = make("v3")
    for _, variable in variables(model):
        if not isinstance(variable, RouterBias):
            variable.set_value(variable[...].astype(jnp.bfloat16))
    layout = Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    dsjax.save(jax.device_put(model, tree_shardings(model, layout)), tmp_path / "out", form)
    assert_same(dsjax.load(tmp_path / "out"), model)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = make("qwen2")
    with pytest.raises(UserError, match="format 'gguf'; expected one of"):
        dsjax.save(model, tmp_path / "out", format="gguf")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        dsjax.save(model, tmp_path / "there")
    model.norm.weight.set_value(model.norm.weight[...].at[3].set(jnp.nan))
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        dsjax.save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
