"""A step compiled for chips that are not there, by the compiler that would be used there.

The compiler of `jax[tpu]` needs no TPU. Which version of it reads a program matters: it is part of
what a plan says, and of the name under which its result is kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from dsjax.errors import UserError, one_line
from dsjax.small_files import write_whole

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that change what the compiler does."""

_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)")
"""How the compiler says what a program needs that does not fit, its arguments included."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
        text: the optimized program of one device; "" when it does not fit.
        hbm: bytes that a device holds at most at once, what the program is given among them.
        refusal: what the compiler says when that is more than there is; else "".
        seconds: what compiling took.
    """

    text: str
    hbm: float
    refusal: str
    seconds: float


def versions() -> dict[str, str]:
    """Of the packages that decide what a program becomes.

    Raises:
        UserError: the compiler is not installed.
    """
    try:
        return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    except PackageNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed, and with it the compiler for TPUs: "
            "pip install 'dsjax[plan]'"
        ) from None


def described_devices(topology: str) -> list[Any]:
    """The devices of a slice that is not there, such as v5p:8x8x8.

    Raises:
        UserError: the compiler is not installed, or knows no such slice.
    """
    versions()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology}: the compiler refuses it: {error}") from None


def compile_once(lowered: jax.stages.Lowered, folder: Path) -> Compiled:
    """Compile, or read what the same compiler made of the same program before.

    Kept in `folder` as DIGEST.json and, beside it, DIGEST.hlo.gz.
    """
    # With the names in it: they tell how often loops turn.
    named = lowered.as_text(debug_info=True)
    asked = [named, versions(), {flag: os.environ.get(flag, "") for flag in FLAGS}]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    record, program = folder / f"{digest}.json", folder / f"{digest}.hlo.gz"
    if record.exists():
        text = gzip.decompress(program.read_bytes()).decode()
        return Compiled(text, **json.loads(record.read_text()))
    compiled = compile_now(lowered)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(program, gzip.compress(compiled.text.encode(), mtime=0))
    plain = {key: value for key, value in vars(compiled).items() if key != "text"}
    write_whole(record, json.dumps(plain).encode())
    return compiled


def compile_now(lowered: jax.stages.Lowered) -> Compiled:
    """Compile, whatever was compiled before."""
    begin = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        size = float(needed[1]) * 1024 ** " KMGT".index(needed[2] or " ")
        return Compiled("", size, one_line(error), time.monotonic() - begin)
    memory: Any = compiled.memory_analysis()
    # Not the sum of arguments and temporaries, which never are all there at once.
    peak = memory.peak_memory_in_bytes
    return Compiled(compiled.as_text() or "", peak, "", time.monotonic() - begin)
