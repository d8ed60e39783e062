from pathlib import Path

import jax
import pytest

from dsjax.architecture import DeepSeekConfig
from dsjax.checkpoint.families import match, tensors, without_absent_mtp
from dsjax.checkpoint.safetensors import Entry
from dsjax.config_files import load_model_config
from dsjax.errors import UserError
from dsjax.model.layers import variables
from dsjax.model.transformer import Transformer

FOLDER = Path("model")

SMALL = ["cpu-tiny", "v2-lite-16b"]
LARGE = ["v3-671b", "r1", "v2-236b", "moonlight-16b", "kimi-k2"]

PLACES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "mtp.enorm.weight": "model.layers.{mtp}.enorm.weight",
    "mtp.hnorm.weight": "model.layers.{mtp}.hnorm.weight",
    "mtp.eh_proj.weight": "model.layers.{mtp}.eh_proj.weight",
    "mtp.norm.weight": "model.layers.{mtp}.shared_head.norm.weight",
}
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.q_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.q_b.weight": "self_attn.q_b_proj.weight",
    "attn.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
DENSE = BLOCK | {f"ffn.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
MOE = (
    BLOCK
    | {
        "ffn.router.weight": "mlp.gate.weight",
        "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    }
    | {f"ffn.experts.{x}": f"mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")}
    | {
        f"ffn.shared.{x}.weight": f"mlp.shared_experts.{x}_proj.weight"
        for x in ("gate", "up", "down")
    }
)


def entries(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Entry]:
    return {name: Entry(FOLDER / "x", dtype, shape, 0) for name, shape in shapes.items()}


def complete(config: DeepSeekConfig) -> dict[str, Entry]:
    return entries({tensor.name: tensor.shape for tensor in tensors(config)})


def test_every_name_and_shape_of_the_released_list_is_accounted_for(released: dict) -> None:
    config = load_model_config("r1")
    stored = {
        name: Entry(FOLDER / listed["file"], listed["dtype"], tuple(listed["shape"]), 0)
        for name, listed in released.items()
    }
    named = {tensor.name for tensor in match(config, stored, FOLDER)}
    scales = {tensor.scale[0] for tensor in tensors(config) if tensor.scale}
    assert len(released) == 91_991
    assert named | scales == set(released)
    assert len(named) + len(scales) == len(released)


def test_the_released_files_quantize_what_the_table_says(released: dict) -> None:
    config = load_model_config("r1")
    for tensor in tensors(config):
        assert (released[tensor.name]["dtype"] == "F8_E4M3") == (tensor.scale is not None)


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_the_table_and_the_model_have_the_same_parameters(name: str) -> None:
    config = load_model_config(name)
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    stacks: dict[str, set[tuple[int, ...]]] = {}
    inner: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(config):
        if not tensor.repeats:
            assert tensor.index not in stacks.setdefault(tensor.path, set()), tensor.name
            stacks[tensor.path].add(tensor.index)
            inner[tensor.path] = tensor.inner
    shapes = {
        path: (*(max(places) + 1 for places in zip(*indices, strict=True)), *inner[path])
        for path, indices in stacks.items()
    }
    assert shapes == {path: variable.shape for path, variable in variables(model)}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("v3-671b", 671_026_419_200),
        ("v2-236b", 235_741_434_880),
        ("v2-lite-16b", 15_706_484_224),
        ("moonlight-16b", 15_960_110_208),
        ("kimi-k2", 1_026_408_232_448),
    ],
)
def test_main_models_have_the_published_parameter_counts(name: str, numbers: int) -> None:
    config = load_model_config(name).model_copy(update={"num_nextn_predict_layers": 0})
    assert sum(tensor.size for tensor in tensors(config)) == numbers


def test_each_released_name_goes_to_its_own_parameter(config: DeepSeekConfig) -> None:
    expected = {}
    for path, name in PLACES.items():
        expected[name.format(mtp=3)] = (path, (0,) if path.startswith("mtp.") else ())
    for stack, block, layers in (
        ("dense_layers", DENSE, [0]),
        ("moe_layers", MOE, [1, 2]),
        ("mtp.block", MOE, [3]),
    ):
        for i, layer in enumerate(layers):
            for path, name in block.items():
                for e in range(4) if "{e}" in name else [None]:
                    index = (i,) if e is None else (i, e)
                    full = f"model.layers.{layer}.{name.format(e=e)}"
                    expected[full] = (f"{stack}.{path}", index)
    found = {t.name: (t.path, t.index) for t in tensors(config) if not t.repeats}
    assert found == expected
    assert {t.name: t.repeats for t in tensors(config) if t.repeats} == {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
    }


def test_a_second_mtp_depth_is_the_next_layer_of_the_file(config: DeepSeekConfig) -> None:
    deeper = config.model_copy(update={"num_nextn_predict_layers": 2})
    places = {t.name: (t.path, t.index) for t in tensors(deeper)}
    assert places["model.layers.4.enorm.weight"] == ("mtp.enorm.weight", (1,))


def test_all_missing_unknown_and_misshaped_tensors_are_reported_at_once(
    config: DeepSeekConfig,
) -> None:
    stored = complete(config)
    del stored["model.norm.weight"]
    for e in range(4):
        del stored[f"model.layers.2.mlp.experts.{e}.up_proj.weight"]
    stored |= entries({"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)})
    stored |= entries({"lm_head.weight": (16, 48)})
    with pytest.raises(UserError) as error:
        match(config, stored, FOLDER)
    message = str(error.value)
    assert "\n" not in message
    assert "5 missing (model.norm.weight, " in message
    assert "experts.1.up_proj.weight, ...)" in message
    assert "1 unknown (model.layers.0.self_attn.rotary_emb.inv_freq)" in message
    assert "1 misshaped (lm_head.weight is [16, 48], expected [48, 16])" in message


def test_fp8_weights_need_their_scales_and_others_have_none(config: DeepSeekConfig) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    shape = next(tensor.shape for tensor in tensors(config) if tensor.name == name)
    fp8 = complete(config) | entries({name: shape}, "F8_E4M3")
    scale = entries({f"{name}_scale_inv": (1, 1)}, "F32")
    match(config, fp8 | scale, FOLDER)
    with pytest.raises(UserError, match=r"1 missing .*o_proj.weight_scale_inv"):
        match(config, fp8, FOLDER)
    with pytest.raises(UserError, match=r"1 unknown .*o_proj.weight_scale_inv"):
        match(config, complete(config) | scale, FOLDER)


def test_only_a_folder_without_any_mtp_tensor_goes_without_mtp(config: DeepSeekConfig) -> None:
    whole = complete(config)
    ahead = [name for name in whole if name.startswith("model.layers.3.")]
    none = {name: entry for name, entry in whole.items() if name not in ahead}
    assert without_absent_mtp(config, whole) == config
    assert without_absent_mtp(config, none).num_nextn_predict_layers == 0
    half = none | {name: whole[name] for name in ahead[::2]}
    assert without_absent_mtp(config, half) == config
    with pytest.raises(UserError, match=f"{len(ahead[1::2])} missing .model.layers.3"):
        match(config, half, FOLDER)
