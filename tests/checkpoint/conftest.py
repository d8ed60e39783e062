"""A tiny model: its config.json, its weights under released names, and a way to write both."""

import gzip
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from released_folders import write_shards
from safetensors.numpy import save_file

from dsjax import cli
from dsjax.architecture import DeepSeekConfig
from dsjax.checkpoint import conversion, weights_folder
from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.config_files import load_model_config
from tests.object_store import ObjectStore

Weights = dict[str, np.ndarray]

Said = tuple[int | str | None, str, str]
"""A command's exit code, and what it wrote to stdout and stderr."""

SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

CONFIG_JSON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "first_k_dense_replace": 1,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

CONFIG = DeepSeekConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=3,
    max_position_embeddings=128,
    initializer_range=0.02,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    rope_scaling={
        "factor": 4,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    first_k_dense_replace=1,
    intermediate_size=24,
    moe_intermediate_size=12,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture
def config_json() -> dict:
    """The released form of `config`; a test may change its copy."""
    return json.loads(json.dumps(CONFIG_JSON))


@pytest.fixture
def config() -> DeepSeekConfig:
    return CONFIG


def make_weights(config: DeepSeekConfig, dtype: np.dtype) -> Weights:
    """Random weights under released names; repeats repeat, and router biases are float32."""
    rng = np.random.default_rng(0)
    weights: Weights = {}
    for tensor in tensors(config):
        if tensor.repeats:
            weights[tensor.name] = weights[tensor.repeats]
        else:
            value = rng.normal(size=tensor.shape).astype(np.float32)
            weights[tensor.name] = value if tensor.kind == ROUTER_BIAS else value.astype(dtype)
    return weights


@pytest.fixture
def weights(config: DeepSeekConfig) -> Weights:
    return make_weights(config, np.dtype(np.float32))


@pytest.fixture
def weights_bfloat16(config: DeepSeekConfig) -> Weights:
    return make_weights(config, np.dtype(ml_dtypes.bfloat16))


@pytest.fixture
def write_folder(tmp_path: Path, config_json: dict) -> Callable[..., Path]:
    """Write weights and the config as a released folder, in one file or several shards."""

    def write(weights: Weights, shards: int = 1, config: dict = config_json) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "np"})
            return folder
        write_shards(folder, weights, shards)
        return folder

    return write


@pytest.fixture(scope="session")
def released() -> dict[str, dict]:
    """Shape, dtype and file of all 91,991 tensors of the released DeepSeek-R1."""
    listing = Path(__file__).parent / "deepseek_r1_tensors.json.gz"
    return json.loads(gzip.decompress(listing.read_bytes()))


@pytest.fixture
def released_folder(released: dict[str, dict], tmp_path: Path) -> Iterator[Path]:
    """DeepSeek-R1 as released, but for its numbers: true headers, and 688 GB of holes."""
    folder = tmp_path / "r1"
    folder.mkdir()
    config = load_model_config("r1").model_dump()
    config["rope_scaling"] |= {"type": "yarn"}
    (folder / "config.json").write_text(json.dumps(config))
    headers: dict[str, dict] = defaultdict(dict)
    ends: dict[str, int] = defaultdict(int)
    for name, listed in released.items():
        begin, file = ends[listed["file"]], listed["file"]
        ends[file] += math.prod(listed["shape"]) * SIZES[listed["dtype"]]
        headers[file][name] = {
            "dtype": listed["dtype"],
            "shape": listed["shape"],
            "data_offsets": [begin, ends[file]],
        }
    for file, header in headers.items():
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + ends[file])
    index = {"weight_map": {name: listed["file"] for name, listed in released.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, chunks and windows: several of each."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 150_000)
    monkeypatch.setattr(weights_folder, "CHUNK_BYTES", 150_000)


@pytest.fixture
def command(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Call the `dsjax` command in this process."""

    def call(*arguments: str) -> Said:
        monkeypatch.setattr("sys.argv", ["dsjax", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return call
