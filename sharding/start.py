"""Starting `jax.distributed`: where a process stands among all, and who stayed away.

How a process learns of the others is told in `sharding.distributed`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
from jax._src import clusters
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

from dsjax.config import DistributedConfig
from dsjax.errors import UserError
from sharding.cpu_devices import make_cpu_devices
from sharding.flags import set_flags
from sharding.watch import LOST, leave, on_abort


class Place(NamedTuple):
    """This process among all."""

    coordinator: str
    """HOST:PORT"""
    processes: int
    process: int
    devices: list[int] | None
    """Which of its host's devices it takes; None: all."""


def start(settings: DistributedConfig, devices: int = 1) -> None:
    """Start `jax.distributed`, before anything has asked jax for a device; at most once.

    XLA is told what helps on the accelerator that TPU_ACCELERATOR_TYPE names. Where there is none,
    CPUs stand for `devices` devices in all.

    Raises:
        UserError: settings contradict each other, are incomplete, or cannot be used.
    """
    set_flags(os.environ.get("TPU_ACCELERATOR_TYPE", ""))
    if jax.distributed.is_initialized():
        return
    place = find_place(settings)
    make_cpu_devices(devices, 1 if place is None else place.processes)
    if place is None or place.processes == 1:
        return
    # A SIGTERM is ours to answer, and its own way of telling all is not used.
    jax.config.update("jax_enable_preemption_service", False)
    _connect(place, settings.initialization_timeout)


def find_place(settings: DistributedConfig) -> Place | None:
    """Where this process stands, from configuration, environment or cluster; None: it is alone.

    Raises:
        UserError: an explicit coordinator is only half given, or a number is none.
    """
    explicit = {
        "coordinator_address": _setting(
            settings.coordinator_address, "JAX_COORDINATOR_ADDRESS", str
        ),
        "num_processes": _setting(settings.num_processes, "JAX_NUM_PROCESSES", int),
        "process_id": _setting(settings.process_id, "JAX_PROCESS_ID", int),
    }
    if explicit["num_processes"] == 1:
        return None
    if missing := [name for name, value in explicit.items() if value is None]:
        if len(missing) < 3:
            raise UserError(
                f"distributed: {', '.join(set(explicit) - set(missing))} is given, but not "
                f"{' and '.join(missing)}; give all three, in the configuration or as "
                f"{' and '.join(f'JAX_{name.upper()}' for name in missing)}"
            )
        seconds = settings.initialization_timeout
        return _slurm(seconds) or _cloud_tpu(seconds)
    place = Place(*explicit.values(), devices=None)
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"distributed: process_id={place.process} of num_processes={place.processes}; "
            f"expected 0 to {place.processes - 1}"
        )
    return place


def _setting(configured: Any, variable: str, kind: Callable[[str], Any]) -> Any:
    text = os.environ.get(variable)
    if configured is not None or not text:
        return configured
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{variable}={text!r}: expected a whole number") from None


def _slurm(seconds: int) -> Place | None:
    """What srun tells its tasks."""
    if not clusters.SlurmCluster.is_env_present():
        return None
    # "4(x2),3" is the number of tasks on each node.
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    alone = tasks is None or int(tasks[0]) == 1
    place = _place_in(clusters.SlurmCluster, seconds)
    return place if alone else place._replace(devices=[int(os.environ["SLURM_LOCALID"])])


def _cloud_tpu(seconds: int) -> Place | None:
    """What GKE has set, or the metadata of a TPU VM; all slices together."""
    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            return _place_in(cluster, seconds)
    return None


def _place_in(cluster: type[clusters.ClusterEnv], seconds: int) -> Place:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        address = cluster.get_coordinator_address(seconds, port)
    except RuntimeError as error:  # the name of its host is not known within `seconds`
        leave(f"process 0 did not come within {seconds} s: {error}; start all again", LOST)
    return Place(address, cluster.get_process_count(), cluster.get_process_id(), None)


def _connect(place: Place, seconds: int) -> None:
    """Wait for all processes, `seconds` at most, and leave with who stayed away."""
    make_service = _jax.get_distributed_runtime_service
    # The service names those that stayed away only when it gives up first, and jax lets it wait
    # for an hour.
    _jax.get_distributed_runtime_service = partial(make_service, cluster_register_timeout=seconds)
    try:
        with _kept_stderr() as said:
            on_abort(lambda: _stayed_away(said(), place, seconds))
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=seconds + 15,
                shutdown_timeout_seconds=60,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"distributed: cannot start at coordinator_address={place.coordinator}: {error}; "
            "choose an address of process 0 with a free port"
        ) from error
    finally:
        _jax.get_distributed_runtime_service = make_service
    on_abort(lambda: _coordinator_gone(place))


def _stayed_away(said: str, place: Place, seconds: int) -> str:
    """Who is missing at the start, from what the C++ library says before it aborts."""
    if names := re.search(r"timed out task names:\n((?:\d+\n)+)", said):
        missing = ", ".join(names[1].split())
        who = f"process {missing} of {place.processes}"
    elif "DEADLINE" in said or "UNAVAILABLE" in said:
        who = f"process 0 of {place.processes}, which coordinates at {place.coordinator},"
    else:
        return f"cannot join the other processes: {said.rpartition('absl::Status: ')[2]}"
    return (
        f"{who} did not come within {seconds} s; start all, or raise "
        "distributed.initialization_timeout"
    )


def _coordinator_gone(place: Place) -> str | None:
    """Why the C++ library aborts later on; None if it is not for this."""
    host, _, port = place.coordinator.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return None
    except OSError:
        return (
            f"lost process 0 of {place.processes}, which coordinates at {place.coordinator}: "
            "killed or out of reach; start all again, and the run goes on from its newest "
            "checkpoint"
        )


@contextmanager
def _kept_stderr() -> Iterator[Callable[[], str]]:
    """Keep what is written to stderr, and write it at the end; yields how to take it instead.

    The C++ library writes a page when it gives up, in which what matters is a number.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)

        def take() -> str:
            os.dup2(stderr, 2)
            kept.seek(0)
            return kept.read().decode(errors="replace")

        try:
            yield take
        finally:
            os.write(2, take().encode())
            os.close(stderr)
