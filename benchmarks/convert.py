"""Speed and memory of `dsjax convert` beside `cp`: an FP8 checkpoint in V3's layout to bfloat16.

    python benchmarks/convert.py --gigabytes 12 --folder /some/disk       needs 3 times that room

A synthetic checkpoint has V3's true widths and its MTP layer, and as many layers as the size leaves
room for; then fewer experts, then fewer words. It is converted to a Hugging Face folder in
bfloat16. The rate that counts is bytes read plus bytes written, by the seconds from the command's
start to its end, everything on the disk. Beside it stands cp, with every file flushed, of as many
bytes read plus written: the source, and a file of half the difference. Before each the kernel's
cache is dropped where that is permitted, and the last line says whether it was. Runs take turns;
medians are compared. Memory is what the kernel says of the process. With --kills, one more
conversion is killed so many times, at moments drawn over the time that a whole one takes, and must
end with the same manifest and verify. Prints one table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.export_config import make_config, with_dtype
from dsjax.checkpoint.families import FP8, ROUTER_BIAS, tensors
from dsjax.checkpoint.manifest import MANIFEST
from dsjax.checkpoint.safetensors import DTYPES, INDEX
from dsjax.config_files import load_model_config

SHARD_BYTES = 4_300_000_000
ROOT = Path(__file__).resolve().parents[1]


def config_of(size: int) -> DeepSeekConfig:
    """V3 cut to about this many bytes, no fewer: layers first, then experts, then vocabulary."""
    config = load_model_config("v3-671b")
    assert isinstance(config, DeepSeekConfig)
    cuts: list[dict[str, int]] = [
        {"num_hidden_layers": n, "first_k_dense_replace": min(3, n - 1)} for n in range(61, 1, -1)
    ]
    cuts += [{"n_routed_experts": n, "n_group": 1, "topk_group": 1} for n in range(248, 7, -8)]
    cuts += [{"vocab_size": n} for n in (65536, 32768, 16384, 8192)]
    for cut in cuts:
        smaller = config.model_copy(update=cut)
        if _bytes(smaller) < size:
            break
        config = smaller
    return config


def _bytes(config: ModelConfig) -> int:
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in _described(config))


def _described(config: ModelConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of the release: name, dtype, shape."""
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for tensor in tensors(config):
        rest = "F32" if tensor.kind == ROUTER_BIAS else "BF16"
        found.append((tensor.name, FP8 if tensor.scale else rest, tensor.shape))
        if tensor.scale:
            found.append((tensor.scale[0], "F32", tensor.scale[1]))
    return found


def write_checkpoint(folder: Path, config: ModelConfig) -> int:
    """Write it, its numbers repeating after a megabyte or so; return its bytes."""
    rng = np.random.default_rng(0)
    few = {
        FP8: rng.integers(0, 0x7F, 1_000_003, dtype=np.uint8).tobytes(),
        "BF16": rng.normal(size=500_001).astype(DTYPES["BF16"]).tobytes(),
        "F32": rng.uniform(1e-4, 1e-3, 250_001).astype(np.float32).tobytes(),
    }
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for described in _described(config):
        nbytes = math.prod(described[2]) * DTYPES[described[1]].itemsize
        if shards[-1] and nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(described)
        room -= nbytes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(with_dtype(make_config(config), FP8)))
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor[0]: name for tensor in shard}
        _write_shard(folder / name, shard, few)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return _size(folder)


def _write_shard(
    path: Path, shard: list[tuple[str, str, tuple[int, ...]]], few: dict[str, bytes]
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in shard:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape in shard:
            left = math.prod(shape) * DTYPES[dtype].itemsize
            while left:
                left -= file.write(few[dtype][:left])
        os.fsync(file.fileno())


def _fill(path: Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(block[:size])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def drop_caches() -> bool:
    """Make the kernel forget files, if it may be told to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def convert(source: Path, destination: Path) -> tuple[float, int]:
    """Seconds and peak bytes of the command."""
    begin, peak = time.perf_counter(), 0
    with _start(source, destination) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.02)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit("the conversion failed")
    return seconds, peak


def convert_killed(source: Path, destination: Path, kills: int, seconds: float) -> None:
    """Killed so many times while at work, and then to its end; what is written is verified."""
    rng = random.Random(0)
    while kills:
        with _start(source, destination) as process:
            try:
                process.wait(rng.uniform(0, seconds / 5))
            except subprocess.TimeoutExpired:
                process.kill()
                kills -= 1
        if destination.exists():  # it got through: begin again, so that kills meet a conversion
            shutil.rmtree(destination)
    convert(source, destination)
    verify = [sys.executable, "-m", "dsjax", "inspect", "--verify", str(destination)]
    subprocess.run(verify, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _start(source: Path, destination: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dsjax", "convert", str(source), str(destination)]
    command += ["--to", "hf", "--dtype", "bfloat16"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def _resident(pid: int) -> int:
    """The largest resident set so far; 0 when the process has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(found[0]) if found else 0


def copy(sources: list[Path], destination: Path) -> float:
    """Seconds of cp, and of flushing what it wrote."""
    destination.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *map(str, sources), str(destination)], check=True)
    for path in [*destination.iterdir(), destination]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def main() -> None:
    """Make, convert, copy, compare, and leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0, help="of one conversion more")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        result = measure(
            Path(place), int(arguments.gigabytes * 1e9), arguments.rounds, arguments.kills
        )
    print(f"{'':12}{'seconds':>10}{'GB read':>10}{'GB written':>12}{'GB/s':>8}{'peak MB':>10}")
    for name in ("convert", "cp"):
        row = result[name]
        memory = f"{row['peak_bytes'] / 1e6:10.0f}" if "peak_bytes" in row else ""
        print(
            f"{name:12}{row['seconds']:10.1f}{row['read'] / 1e9:10.2f}"
            f"{row['written'] / 1e9:12.2f}{row['gb_per_second']:8.2f}{memory}"
        )
    if result["kills"]:
        print(f"killed {result['kills']} times and resumed, it wrote the same bytes")
    print(f"convert runs at {result['share_of_cp']:.0%} of cp's rate; {result['caches']}")
    print(json.dumps(result))


_Raw = argparse.RawDescriptionHelpFormatter


def measure(place: Path, size: int, rounds: int, kills: int) -> dict[str, Any]:
    """Both in turns; each writes a folder that is removed before the next."""
    config = config_of(size)
    read = write_checkpoint(place / "fp8", config)
    converted, copied, peaks, written, manifest, dropped = [], [], [], 0, b"", True
    for _ in range(rounds):
        dropped &= drop_caches()
        seconds, peak = convert(place / "fp8", place / "out")
        converted.append(seconds)
        peaks.append(peak)
        written, manifest = _size(place / "out"), (place / "out" / MANIFEST).read_bytes()
        shutil.rmtree(place / "out")
        surplus = place / "surplus"
        if not surplus.exists():
            _fill(surplus, (written - read) // 2)
        drop_caches()
        copied.append(copy([*(place / "fp8").iterdir(), surplus], place / "out"))
        shutil.rmtree(place / "out")
    seconds, plain = statistics.median(converted), statistics.median(copied)
    if kills:
        convert_killed(place / "fp8", place / "out", kills, seconds)
        if (place / "out" / MANIFEST).read_bytes() != manifest:
            raise SystemExit("killed and resumed, it wrote something else")
    half = (read + written) // 2
    rate, cp_rate = (read + written) / seconds / 1e9, 2 * half / plain / 1e9
    row = {"seconds": seconds, "read": read, "written": written, "gb_per_second": rate}
    cp = {"seconds": plain, "read": half, "written": half, "gb_per_second": cp_rate}
    return {
        "kills": kills,
        "layers": config.num_hidden_layers,
        "experts": config.n_routed_experts,
        "convert": row | {"peak_bytes": max(peaks)},
        "cp": cp,
        "share_of_cp": rate / cp_rate,
        "caches": "caches dropped before each" if dropped else "caches warm: not permitted to drop",
    }


if __name__ == "__main__":
    main()
