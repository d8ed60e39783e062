"""Several real processes on this machine, joined by `jax.distributed` over the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class End(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What it says is wrong, line by line."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def start_all(
    count: int,
    arguments: Sequence[str],
    *,
    devices: int = 1,
    absent: Sequence[int] = (),
    folder: str = str(ROOT),
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` so often, but for those `absent`, each with some CPU devices.

    `{process}` in an argument, or in the folder that it works in, is the process's number.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for process in range(count):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            "PYTHONPATH": str(ROOT),
        }
        command = [argument.replace("{process}", str(process)) for argument in arguments]
        if process not in absent:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=folder.replace("{process}", str(process)),
                    env=environment,
                )
            )
    return started


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[End]:
    """Wait for all of them; those that are not done in time are killed, and that is a failure."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            found.append(End(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found
