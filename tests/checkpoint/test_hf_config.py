import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsjax.architecture import DeepSeekConfig
from dsjax.checkpoint.hf_config import read_config
from dsjax.errors import UserError

# What DeepseekV3Config.save_pretrained of transformers 5.23 writes for the model of `config_json`.
EXPORT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "kv_lora_rank": 8,
    "max_position_embeddings": 128,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 12,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "output_router_logits": False,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "q_lora_rank": 8,
    "qk_head_dim": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "v_head_dim": 10,
    "vocab_size": 48,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[object], DeepSeekConfig]:
    def read(tree: object) -> DeepSeekConfig:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        return read_config(tmp_path)

    return read


Read = Callable[[object], DeepSeekConfig]


def refusal(read: Read, tree: object) -> str:
    with pytest.raises(UserError) as error:
        read(tree)
    assert "config.json: " in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_released_config_is_read(read: Read, config_json: dict, config: DeepSeekConfig) -> None:
    assert read(config_json) == config


def test_an_export_of_transformers_is_read(read: Read, config: DeepSeekConfig) -> None:
    assert read(EXPORT) == config


def test_yarn_is_understood_in_all_three_spellings(
    read: Read, config_json: dict, config: DeepSeekConfig
) -> None:
    rope, theta = config_json.pop("rope_scaling"), config_json.pop("rope_theta")
    rope.pop("type")
    for tree in (
        {"rope_scaling": rope | {"type": "yarn"}, "rope_theta": theta},
        {"rope_scaling": rope | {"rope_type": "yarn"}, "rope_theta": theta},
        {"rope_parameters": rope | {"rope_type": "yarn", "rope_theta": theta}},
    ):
        assert read(config_json | tree) == config


def test_no_yarn_is_understood_in_all_three_spellings(read: Read, config_json: dict) -> None:
    del config_json["rope_scaling"], config_json["rope_theta"]
    for tree in (
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ):
        found = read(config_json | tree)
        assert (found.rope_scaling, found.rope_theta) == (None, 5e4)


def test_v2_scores_by_softmax_and_its_nulls_mean_one_group(read: Read, config_json: dict) -> None:
    config_json |= {"model_type": "deepseek_v2", "topk_method": "greedy"}
    config_json |= {"n_group": None, "topk_group": None, "q_lora_rank": None}
    config_json.pop("scoring_func")
    found = read(config_json)
    assert (found.scoring_func, found.n_group, found.topk_group) == ("softmax", 1, 1)
    assert found.q_lora_rank is None


def test_kimi_k2_is_read(read: Read, config_json: dict) -> None:
    assert read(config_json | {"model_type": "kimi_k2"}).model_type == "kimi_k2"


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "first_k_dense_replace", "n_group", "routed_scaling_factor", "rope_theta"],
)
def test_a_missing_key_is_named_although_we_have_a_default(
    read: Read, config_json: dict, key: str
) -> None:
    del config_json[key]
    assert f"the key {key!r} is missing" in refusal(read, config_json)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"hidden_size": 16.5}, "hidden_size=16.5"),
        ({"eos_token_id": [1, 48]}, "eos_token_id=48 is outside vocab_size=48"),
        ({"eos_token_id": "1"}, "eos_token_id: found '1'; expected a token or a list"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than n_routed_experts=4"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 is odd"),
        ({"model_type": "gpt2"}, "model_type='gpt2'; expected one of deepseek_v3"),
        ({"model_type": ["deepseek_v3"]}, "model_type=['deepseek_v3']"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported for"),
        ({"attention_bias": True}, "attention_bias=True; only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' is supported"),
        ({"rope_scaling": "yarn"}, "rotary settings are 'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "of type 'longrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 4, "mscale_all_dim": 1}}, "expected yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(
    read: Read, config_json: dict, change: dict, says: str
) -> None:
    assert says in refusal(read, config_json | change)


def test_what_is_no_json_object_is_refused(read: Read, tmp_path: Path) -> None:
    assert "expected a JSON object, found list" in refusal(read, [1])
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="not the JSON expected"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)
