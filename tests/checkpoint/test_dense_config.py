"""The `config.json` of R1's distills, as their authors and as transformers write it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsjax.architecture import DenseConfig, Llama3Config, YarnConfig
from dsjax.checkpoint.export_config import make_config
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.hf_config import read_config
from dsjax.config_files import load_model_config, parse_model
from dsjax.errors import UserError

# DeepSeek-R1-Distill-Qwen-7B's.
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = QWEN2 | {
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "attn_factor": 0.8782488562869419,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_type": "yarn",
    },
    "rope_theta": 1000000,
    "sliding_window": None,
    "vocab_size": 151936,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[dict[str, Any]], DenseConfig]:
    def read(tree: dict[str, Any]) -> DenseConfig:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        found = read_config(tmp_path)
        assert isinstance(found, DenseConfig)
        return found

    return read


Read = Callable[[dict[str, Any]], DenseConfig]


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        (QWEN2, "r1-distill-qwen-7b"),
        (LLAMA, "r1-distill-llama-8b"),
        (QWEN3, "r1-0528-qwen3-8b"),
    ],
)
def test_a_distills_config_is_the_one_in_configs(read: Read, tree: dict, name: str) -> None:
    assert read(tree) == load_model_config(name)


def test_rotary_settings_are_found_where_transformers_writes_them(read: Read) -> None:
    tree = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    config = read(tree | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}})
    assert config == read(LLAMA)
    assert isinstance(config.rope_scaling, Llama3Config)
    assert isinstance(read(QWEN3).rope_scaling, YarnConfig)


def test_heads_share_the_hidden_size_where_nothing_else_is_said(read: Read) -> None:
    assert read(LLAMA).head_dim == 4096 // 32
    assert read(LLAMA | {"head_dim": None}).head_dim == 4096 // 32
    assert read(LLAMA | {"head_dim": 64}).head_dim == 64


def test_what_transformers_reads_as_the_default_is_the_default(read: Read) -> None:
    """Nulls, empty objects, other names of the same thing, and keys that Llama 1 and 2 lack."""
    expected = read(LLAMA | {"rope_scaling": None, "rope_theta": 10000.0})
    for rope in ({}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None}):
        assert read(LLAMA | {"rope_scaling": rope, "rope_theta": 10000.0}) == expected
    old = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "num_key_value_heads")}
    assert read(old | {"rope_scaling": None}) == read(
        LLAMA | {"rope_scaling": None, "rope_theta": 10000.0, "num_key_value_heads": 32}
    )
    for change in (
        {"num_key_value_heads": None, "num_attention_heads": 8},
        {"tie_word_embeddings": None},
        {"hidden_act": "swish"},
        {"pad_token_id": None},
    ):
        plain = LLAMA | {"num_attention_heads": change.get("num_attention_heads", 32)}
        assert read(LLAMA | change) == read(plain)
    full = {"use_sliding_window": True, "max_window_layers": 28}  # of 28 layers: none is windowed
    assert read(QWEN2 | full) == read(QWEN2)
    assert read(QWEN3 | {"layer_types": ["full_attention"] * 36}) == read(QWEN3)


def test_every_token_of_a_list_is_an_end(read: Read) -> None:
    """As Llama 3.1's, 3.2's and 3.3's Instruct have it."""
    several = read(LLAMA | {"eos_token_id": [128001, 128008, 128009, 128008]})
    assert several.eos_token_id == several.eos_token_ids == (128001, 128008, 128009)
    one, none = read(LLAMA | {"eos_token_id": [128001]}), read(LLAMA | {"eos_token_id": []})
    assert (one.eos_token_id, one.eos_token_ids) == (128001, (128001,))
    assert (none.eos_token_id, none.eos_token_ids) == (None, ())
    tree = json.loads(json.dumps(make_config(several)))
    assert tree["eos_token_id"] == [128001, 128008, 128009]
    assert read(tree) == several
    assert parse_model(yaml.safe_load(yaml.safe_dump(several.model_dump())), "here") == several


def test_a_tied_model_has_no_head_of_its_own(read: Read) -> None:
    apart, tied = (
        {tensor.name for tensor in tensors(read(LLAMA | {"tie_word_embeddings": tied}))}
        for tied in (False, True)
    )
    assert apart - tied == {"lm_head.weight"} and tied < apart


@pytest.mark.parametrize(
    ("tree", "change", "says"),
    [
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 14}, "sliding window"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        (QWEN2, {"num_key_value_heads": 3}, "num_attention_heads=28 do not share"),
        (QWEN2, {"num_attention_heads": 27}, "does not divide by num_attention_heads=27"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True; only False is supported"),
        (QWEN2, {"attention_bias": False}, "attention_bias=False; only True is supported"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True; only False is supported"),
        (LLAMA, {"head_dim": 7}, "head_dim=7 is odd"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "is not below"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "is missing"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "of type 'dynamic'"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "of type 'longrope'"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only whole heads"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        (LLAMA, {"eos_token_id": [1, "2"]}, "eos_token_id: found [1, '2']; expected a token"),
        (LLAMA, {"eos_token_id": list(range(9))}, "eos_token_id names 9 tokens, at most 8"),
        (QWEN3, {"eos_token_id": 151936}, "eos_token_id=151936 is outside vocab_size=151936"),
    ],
)
def test_a_dense_config_that_cannot_be_built_is_refused(
    read: Read, tree: dict, change: dict, says: str
) -> None:
    with pytest.raises(UserError) as error:
        read(tree | change)
    assert says in str(error.value) and "\n" not in str(error.value)
