"""Plans as the compiler for TPUs makes them; it comes with the extra `plan`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsjax.config_files import load_model_config
from dsjax.model.decoder import cache_shape

pytestmark = [
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the extra `plan`"),
    pytest.mark.slow,
]


def plan(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "dsjax", "plan", *arguments, "--json", "--cache", str(cache)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> dict[str, Any]:
    done = plan(cache, "cpu-tiny", "--topology", "v5e:2x2")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_small_run_is_planned_from_its_compiled_program(tiny: dict[str, Any]):
    assert tiny["fits"] is True
    assert tiny["topology"]["mesh"] == {"fsdp": 4}
    assert 0 < sum(tiny["memory"].values()) <= tiny["hbm_bytes"] * 1.01
    times = tiny["account"].values()
    spent = sum(time["core_seconds"] + time["waited_seconds"] for time in times)
    assert spent == pytest.approx(tiny["step_seconds"])
    assert tiny["account"]["gathers"]["link_bytes"] > 0
    assert 0 < tiny["mfu"] < 1


def test_the_second_plan_reads_what_was_compiled(tiny: dict[str, Any], cache: Path):
    kept = sorted(cache.iterdir())
    again = plan(cache, "cpu-tiny", "--topology", "v5e:2x2")
    assert json.loads(again.stdout) == tiny
    assert sorted(cache.iterdir()) == kept


def test_a_run_that_does_not_fit_says_which_setting_would_help(cache: Path):
    done = plan(cache, "cpu-tiny", "--topology", "v5e:2x2", "data.sequence_length=512",
                "training.microbatch_size=4096", "training.batch_size=4096")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is False
    assert found["hbm_bytes"] > 16e9
    assert found["step_seconds"] is None
    assert any("training.microbatch_size" in line for line in found["warnings"])


def test_a_step_of_the_engine_is_planned_like_any_other(cache: Path):
    done = plan(cache, "cpu-tiny", "--topology", "v5e:2x2", "--step", "decode", "--rows", "16",
                "--context", "64", "--drafts", "1", "--dtype", "fp8", "--mesh",
                "expert=2,tensor=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["topology"]["mesh"] == {"expert": 2, "tensor": 2}
    assert found["run"]["tokens_per_step"] == found["run"]["rows"] == 16
    model = load_model_config("cpu-tiny")
    layers, width = cache_shape(model, mtp=True, backend="tpu")
    assert found["memory"]["cache"] == 16 * 64 * layers * width * 2 / 2  # two parts of the batch
    assert 0 < found["run"]["memory_seconds"] < found["step_seconds"]
    assert found["run"]["chip_hours"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v5e:3x5"], "the compiler refuses it"),
        (["--topology", "v5e:2x2", "mesh.fsdp=3"], "there are 4"),
        (["--topology", "v5e:4x4"], "training.microbatch_size=8"),
        (["--topology", "v5e:2x2", "--step", "decode", "a=b"], "has no settings here"),
        (["--topology", "v5e:2x2", "--step", "decode", "--mesh", "fsdp=3"], "there are 4"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments: list[str], says: str, cache: Path):
    done = plan(cache, "cpu-tiny", *arguments)
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(error) == 1 and says in error[0]
