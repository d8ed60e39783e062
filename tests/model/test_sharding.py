"""Meshes and rules that cannot work are refused on one line that says what would."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from sharding.mesh import AXES, make_mesh
from sharding.rules import TRAIN_RULES, Layout


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))


def test_one_axis_takes_what_the_others_leave() -> None:
    assert dict(make_mesh().shape) == dict(data=1, fsdp=8, expert=1, context=1, tensor=1)
    mesh = make_mesh({"fsdp": "auto", "tensor": 4})
    assert dict(mesh.shape) == dict(data=1, fsdp=2, expert=1, context=1, tensor=4)
    assert dict(make_mesh({}, jax.devices()[:1]).shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline": 2}, r"unknown axis 'pipeline'; expected one of"),
        ({"fsdp": "auto", "data": "auto"}, r"\['fsdp', 'data'\] are all auto"),
        ({"fsdp": 3}, r"needs 3 devices, but there are 8"),
        ({"fsdp": "auto", "tensor": 3}, r"needs 6 devices, but there are 8"),
        ({"fsdp": "auto", "tensor": 16}, r"needs 16 devices, but there are 8"),
    ],
)
def test_impossible_meshes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_mesh(sizes)
    assert "\n" not in str(error.value)


def test_names_become_mesh_axes(layout: Layout) -> None:
    assert layout.spec(("expert", "expert_embed", "mlp"), (8, 4, 6)) == PartitionSpec(
        ("expert",), ("fsdp", "context"), ("tensor",)
    )
    assert layout.spec((None, "norm"), (3, 5)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "hats"), (4, 4), r"unknown logical axis 'hats'; known: \["),
        (("embed",), (4, 4), r"name 1 dimensions, the array has \(4, 4\)"),
        (("embed", "q_lora"), (4, 4), r"use a mesh axis twice \(\['fsdp', 'expert', 'fsdp', "),
        (("vocab",), (7,), r"vocab=7 is not divisible by the 2 devices .*'tensor'"),
        (("batch",), (6,), r"batch=6 is not divisible by the 4 devices .*choose 1 or 2"),
    ],
)
def test_impossible_layouts_are_refused(
    layout: Layout, axes: tuple, shape: tuple, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        layout.sharding(axes, shape)
    assert "\n" not in str(error.value)


def test_rules_that_name_no_axis_of_the_mesh_are_refused() -> None:
    with pytest.raises(UserError, match=r"'heads' goes to mesh axis 'tesnor', but the mesh has"):
        Layout(make_mesh(), {**TRAIN_RULES, "heads": ("tesnor",)})


def test_the_same_model_follows_another_table(model: Transformer) -> None:
    rules = {**TRAIN_RULES, "embed": (), "expert_embed": (), "mlp": ("fsdp", "tensor")}
    layout = Layout(make_mesh({"fsdp": 2, "tensor": 4}), rules)
    shardings = tree_shardings(model, layout)
    assert shardings.moe_layers.ffn.shared.gate.weight.get_value().spec == PartitionSpec(
        None, ("fsdp", "tensor"), None
    )


def test_a_weight_is_gathered_over_what_has_tokens_and_cannot_be_from_the_middle() -> None:
    layout = Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    assert layout.gathered_axes("embed") == ("fsdp", "expert")
    assert layout.gathered_axes("expert") == layout.gathered_axes("heads") == ()
    assert layout.split_axes("expert") == ("expert",) and layout.split_axes("heads") == ("tensor",)
    mixed = Layout(layout.mesh, {**TRAIN_RULES, "mlp": ("fsdp", "tensor")})
    with pytest.raises(UserError, match=r"'mlp' goes to .*stays split over \('tensor',\); name"):
        mixed.gathered_axes("mlp")
    assert Layout(layout.mesh, {**TRAIN_RULES, "mlp": ("tensor", "fsdp")}).gathered_axes("mlp")


def test_a_model_that_does_not_divide_is_refused(model: Transformer) -> None:
    rules = {**TRAIN_RULES, "latent": ("fsdp",)}
    with pytest.raises(UserError, match=r"q_lora|latent"):
        tree_shardings(model, Layout(make_mesh(devices=jax.devices()[:5]), rules))
