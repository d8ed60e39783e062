"""Folders that store what follows from the rest, or leave it out, are read with a line about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference.configs import CONFIGS, DENSE_CONFIGS
from released_folders import FAMILIES, Weights, assert_same, weights_of, write_released

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.from_files import load_files
from dsjax.checkpoint.inspect import report
from dsjax.checkpoint.source import open_source

V3, TIED = CONFIGS["v3"], DENSE_CONFIGS["llama3_tied"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def assert_read_as(folder: Path, weights: Weights) -> None:
    """The source has these tensors, and no others."""
    source = open_source(folder)
    assert source.stored.keys() == weights.keys()
    for name, weight in weights.items():
        assert source.stored[name].read().tobytes() == weight.tobytes(), name


@pytest.mark.parametrize("family", ["moonlight", "kimi_k2", "llama3_tied"])
def test_rotary_frequencies_are_passed_over(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FAMILIES[family]
    weights = weights_of(config, "BF16")
    # Of a width that is not rotated, as in Kimi-K2's release.
    derived = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(56, np.float32),
        "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((4, 8), np.float32),
        "model.rotary_pos_emb.inv_freq": np.ones(4, np.float16),
    }
    folder = tmp_path / "hf"
    write_released(folder, config, "BF16", weights=weights | derived)
    assert_read_as(folder, weights)
    said = "3 rotary frequencies are passed over: config.json gives them"
    found = report(str(folder))
    assert found["remarks"] == [said]
    assert found["stored"]["tensors"] == len(weights) + 3  # what the headers say
    convert(folder, tmp_path / "out", to="hf")
    assert capsys.readouterr().err == f"{folder}: {said}\n"
    assert_same(tmp_path / "out", weights)
    load_files(folder)
    assert capsys.readouterr().err == f"{folder}: {said}\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [(0.0, "and it is the embedding's copy"), (1.0, "It DIFFERS from the embedding")],
)
def test_a_tied_models_own_head_is_passed_over(tmp_path: Path, change: float, says: str) -> None:
    weights = weights_of(TIED, "F32")
    head = {HEAD: weights[EMBEDDING] + np.float32(change)}
    write_released(tmp_path / "hf", TIED, "F32", weights=weights | head)
    assert_read_as(tmp_path / "hf", weights)
    [remark] = open_source(tmp_path / "hf").remarks
    assert remark.startswith("lm_head.weight is passed over: tie_word_embeddings is true")
    assert says in remark
    [remark] = report(str(tmp_path / "hf"))["remarks"]  # from headers alone
    assert remark == "lm_head.weight is passed over: tie_word_embeddings is true"


def test_a_tied_model_that_stores_the_head_alone_has_its_embedding(tmp_path: Path) -> None:
    weights = weights_of(TIED, "F32")
    renamed = {HEAD if name == EMBEDDING else name: w for name, w in weights.items()}
    write_released(tmp_path / "hf", TIED, "F32", weights=renamed)
    assert_read_as(tmp_path / "hf", weights)
    assert (
        "lm_head.weight, to which it is tied, is taken" in open_source(tmp_path / "hf").remarks[0]
    )


@pytest.mark.parametrize("absent", ["embed_tokens", "shared_head.head", ""])
@pytest.mark.parametrize("config", [V3, CONFIGS["two_depths_and_unequal_mscales"]])
def test_mtp_layers_share_what_they_do_not_store(
    tmp_path: Path, config: ModelConfig, absent: str
) -> None:
    """Both copies, or one of them, may be left out."""
    weights = weights_of(config, "BF16")
    ends = (f"{absent}.weight",) if absent else ("3.embed_tokens.weight", "shared_head.head.weight")
    layers = f"model.layers.{config.num_hidden_layers}."
    left = {n: w for n, w in weights.items() if not (n.startswith(layers) and n.endswith(ends))}
    assert len(weights) - len(left) == len(ends)
    write_released(tmp_path / "hf", config, "BF16", weights=left)
    assert_read_as(tmp_path / "hf", weights)
    [remark] = open_source(tmp_path / "hf").remarks
    assert remark.endswith(" not stored: the MTP layer shares the main model's")
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same(tmp_path / "back", weights)


def test_a_factor_that_vllm_alone_reads_is_named(tmp_path: Path) -> None:
    """R1-0528-Qwen3-8B's, which cancels YaRN's amplitude in vLLM."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = DENSE_CONFIGS["qwen3_yarn"]
    for name, more, count in (
        ("read by vLLM", {"attn_factor": 0.8782488562869419}, 1),
        ("replaced", {"attn_factor": 0.878, "attention_factor": 1.0}, 0),
        ("without effect", {"attn_factor": 1.0}, 0),
    ):
        write_released(tmp_path / name, config, "BF16", rope_scaling=rope | more)
        remarks = open_source(tmp_path / name).remarks
        assert len(remarks) == count
        for remark in remarks:
            assert "rope_scaling.attn_factor=0.8782488562869419 is not used" in remark
            assert remark.endswith("set attention_factor=1")
