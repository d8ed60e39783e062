"""What a conversion will do, from headers alone; what it holds in memory, seen from outside."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference.configs import V3
from released_folders import BLOCKS, tree_of, write_released

from dsjax.architecture import DeepSeekConfig
from dsjax.checkpoint.conversion import make_plan
from dsjax.checkpoint.export_config import make_config, with_dtype
from dsjax.checkpoint.families import FP8, ROUTER_BIAS, tensors
from dsjax.checkpoint.safetensors import DTYPES
from dsjax.checkpoint.source import open_source

REPOSITORY = Path(__file__).parents[2]
NO_JAX = """\
import sys
from dsjax import cli
try:
    cli.main()
finally:
    assert "jax" not in sys.modules and "orbax" not in sys.modules
"""


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NO_JAX, "convert", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_r1_is_planned_in_seconds_without_jax(released_folder: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = command(released_folder, tmp_path / "out", "--dry-run", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 20
    assert "stored tensors, scales included: 91,991, 45,808 of them scales" in done.stdout
    assert "NOT ENOUGH" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["r1"]


def test_r1s_plan_accounts_for_every_tensor(released_folder: Path) -> None:
    source = open_source(released_folder)
    released = set(source.stored)
    plan = make_plan(source, "hf", None)
    written = {name for job in plan.jobs for name in _names(job.outputs[0].header)}
    assert written == released
    headers = sum(len(output.header) for job in plan.jobs for output in job.outputs)
    weights = sum(entry.nbytes for entry in source.stored.values())
    assert sum(job.bytes_out for job in plan.jobs) == weights + headers
    plan = make_plan(source, "dsjax", None)
    repeats = 2 * 2 * 129280 * 7168
    assert sum(job.bytes_out for job in plan.jobs) == weights - repeats
    assert len(plan.repeats) == 2
    files = {output.path for job in plan.jobs for output in job.outputs}
    assert len(files) < 8000
    assert max(output.nbytes for job in plan.jobs for output in job.outputs) == repeats // 2


def _names(header: bytes) -> list[str]:
    assert len(header) == 8 + int.from_bytes(header[:8], "little")
    return [name for name in json.loads(header[8:]) if name != "__metadata__"]


@pytest.mark.parametrize("to", ["hf", "dsjax"])
def test_a_conversion_imports_no_jax_and_a_dry_run_writes_nothing(tmp_path: Path, to: str) -> None:
    write_released(tmp_path / "hf", BLOCKS, FP8)
    dry = command(tmp_path / "hf", tmp_path / "out", "--to", to, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    done = command(tmp_path / "hf", tmp_path / "out", "--to", to, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    # One line, and no bar where nobody watches.
    tensors = 135 if to == "hf" else 133
    assert done.stdout.startswith(f"{tmp_path}/out: {tensors} tensors, ")
    assert done.stdout.endswith(" s, verified\n")
    assert done.stdout.count("\n") == 1
    size = sum(map(len, tree_of(tmp_path / "out").values()))
    planned = make_plan(open_source(tmp_path / "hf"), to, None).bytes_out
    manifest = (tmp_path / "out/manifest.json").stat().st_size
    assert size == planned + manifest


def peak_memory(*arguments: object) -> int:
    """The largest resident set of the command, in bytes, as the kernel tells it."""
    code = "from dsjax import cli; cli.main()"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, *(1024 * int(size) for size in found), 0)
            time.sleep(0.01)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--to", "hf", "--dtype", "bfloat16"], ["--to", "dsjax"]])
def test_memory_stays_far_below_the_model(tmp_path: Path, options: list[str]) -> None:
    config = DeepSeekConfig(
        **V3
        | dict(
            vocab_size=32768,
            hidden_size=2048,
            num_hidden_layers=3,
            intermediate_size=8192,
            moe_intermediate_size=1024,
            n_routed_experts=48,
        )
    )
    size = _write_large(tmp_path / "hf", config)
    assert size > 700_000_000
    peak = peak_memory(tmp_path / "hf", tmp_path / "out", *options)
    assert peak < 350_000_000


def _write_large(folder: Path, config: DeepSeekConfig) -> int:
    """A folder in FP8 as released, written without holding it; its numbers repeat."""
    rng = np.random.default_rng(0)
    few = {
        FP8: rng.integers(0, 0x7F, 1 << 20, dtype=np.uint8).tobytes(),
        "BF16": np.ones(1 << 19, DTYPES["BF16"]).tobytes(),
        "F32": np.full(1 << 18, 1e-3, np.float32).tobytes(),
    }
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in tensors(config):
        rest = "F32" if tensor.kind == ROUTER_BIAS else "BF16"
        described[tensor.name] = (FP8 if tensor.scale else rest, tensor.shape)
        if tensor.scale:
            described[tensor.scale[0]] = ("F32", tensor.scale[1])
    header, end = {}, 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(with_dtype(make_config(config), FP8)))
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in described.values():
            left = math.prod(shape) * DTYPES[dtype].itemsize
            while left:
                left -= file.write(few[dtype][:left])
        os.fsync(file.fileno())
    return end
