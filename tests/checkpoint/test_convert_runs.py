"""A training run's newest sound weights, converted."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from reference.configs import CONFIGS
from reference.weights import place, random_weights
from released_folders import assert_same

import dsjax
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.inspect import inspect, report
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config_files import load_pretrain_config
from dsjax.errors import UserError
from dsjax.model.layers import variables

CONFIG = CONFIGS["v3"]
STEPS = (1, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, each of other weights, with something beside the model."""
    folder = tmp_path_factory.mktemp("run")
    config = load_pretrain_config("cpu-tiny").model_copy(update={"model": CONFIG})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    with closing(CheckpointStore(folder / "checkpoints", keep=2)) as store:
        for step in STEPS:
            model = place(CONFIG, random_weights(CONFIG, seed=step))
            store.save(step, {"model": model, "count": np.int32(step) + np.zeros(3)}, {})
    return folder


@pytest.mark.parametrize("through", ["straight", "dsjax weights"])
def test_a_run_becomes_a_released_folder(run: Path, tmp_path: Path, through: str) -> None:
    source = run
    if through != "straight":
        source = tmp_path / "ours"
        convert(run, source, to="dsjax", verify=True)
    convert(source, tmp_path / "hf", verify=True)
    assert_same(tmp_path / "hf", random_weights(CONFIG, seed=2))
    assert (tmp_path / "hf/tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "hf") == CONFIG


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converted_weights_of_a_run_load_as_the_run_does(
    run: Path, tmp_path: Path, dtype: str | None
) -> None:
    convert(run, tmp_path / "ours", to="dsjax")
    ours, theirs = dsjax.load(tmp_path / "ours", dtype), dsjax.load(run, dtype)
    for (path, one), (_, other) in zip(variables(ours), variables(theirs), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one[...], other[...]), path
    assert theirs.embed.weight.dtype == theirs.dtype == (dtype or "float32")
    assert report(str(tmp_path / "ours"))["parameters"] == report(str(run))["parameters"]


def test_a_damaged_newest_step_falls_back_and_no_sound_one_is_refused(
    run: Path, tmp_path: Path, capsys
) -> None:
    copy = tmp_path / "run"
    for file in run.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    for step, seed in ((2, 1), (1, None)):
        extra = copy / f"checkpoints/{step:08d}/extra.json"
        extra.write_bytes(extra.read_bytes() + b" ")
        if seed is not None:
            convert(copy, tmp_path / "hf")
            assert_same(tmp_path / "hf", random_weights(CONFIG, seed=seed))
    with pytest.raises(UserError, match=r"no sound checkpoint \(step 2 is damaged.*step 1 is"):
        convert(copy, tmp_path / "none")
    with pytest.raises(UserError, match="no sound checkpoint"):
        inspect(str(copy), as_json=True, verify=True)
    # To say what a run is, its manifest and headers are enough: nothing large is read.
    assert report(str(copy))["parameters"] == report(str(run))["parameters"]
