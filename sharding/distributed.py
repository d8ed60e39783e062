"""Many processes: how they start, agree, wait for one another, and divide the rows of a batch.

All run the same program on the same configuration. How a process learns of the others, the first of

    an explicit coordinator: `distributed.coordinator_address`, `num_processes`, `process_id`, each
        from the configuration or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    Slurm: `srun` tells; with one task a node it has all devices, with several each has one
    Cloud TPU: the metadata of the TPU VM, or what GKE has set, tells, several slices included
    none of them: it is the only process

What is exchanged here goes through the coordination service of `jax.distributed`, never through a
collective: so it has time limits, and may be used from any thread.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as _jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from dsjax.config import DistributedConfig
from dsjax.errors import UserError
from sharding.start import start
from sharding.watch import LOST, Watch, name_of

T = TypeVar("T")

BARRIER_SECONDS = 60.0
"""How long processes that do the same work may be apart."""

WORK_SECONDS = 6 * 3600.0
"""How long all wait for the work that one does for them. If it is lost, the watch says so."""


class MissingProcessError(RuntimeError):
    """Some processes did not come to a barrier in time; the message names them."""


@contextmanager
def processes(settings: DistributedConfig, devices: int = 1) -> Iterator[None]:
    """Join the other processes, and leave together with them.

    A mesh will want so many `devices` of all: CPUs can stand for them.

    A `UserError` that leaves the context in one process ends all of them with exit code 2, a
    process that is lost with `LOST`, any other exception with 1: each with one line, within a
    minute. A single process is left alone.
    """
    start(settings, devices)
    if is_alone():
        yield
        return
    watch = Watch(_client(), jax.process_index(), jax.process_count())
    try:
        yield
    except UserError as error:
        watch.end_all(str(error), 2)
    except MissingProcessError as error:
        watch.end_all(str(error), LOST)
    except KeyboardInterrupt:
        watch.end_all("interrupted", 130)
    except Exception as error:
        watch.fail(error)
    except SystemExit:
        _end(watch)
        raise
    _end(watch)


def _end(watch: Watch) -> None:
    try:
        barrier("the end")
    except MissingProcessError as error:
        watch.end_all(str(error), LOST)
    watch.stop()


def is_first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def write_note(name: str, value: Any) -> None:
    """Leave a note for all to read, unless somebody has left one of this name."""
    try:
        _client().key_value_set(f"dsjax/note/{name}/text", json.dumps(value))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def read_note(name: str) -> Any:
    """The note of this name; None if there is none."""
    found = _client().key_value_dir_get(f"dsjax/note/{name}/")
    return json.loads(found[0][1]) if found else None


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Return when every process has come here; the n-th call of a name meets the others' n-th.

    Raises:
        MissingProcessError: some did not come within `seconds`; it names them.
    """
    if is_alone():
        return
    _meet(_unique(f"barrier/{name}"), "", name, seconds)


def _meet(key: str, value: str, name: str, seconds: float) -> None:
    """`barrier`, where everybody leaves a value that lasts until the next but one."""
    client, me, count = _client(), jax.process_index(), jax.process_count()
    client.key_value_set(f"{key}/{me}", value)
    try:
        client.wait_at_barrier(key, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        came = {int(k.rpartition("/")[2]) for k, _ in client.key_value_dir_get(f"{key}/")}
        missing = [name_of(client, other, count) for other in range(count) if other not in came]
        if not missing:  # came, but after the first one had given up
            missing = ["some processes (too late)"]
        raise MissingProcessError(
            f"{', '.join(missing)} did not come to {name!r} within {seconds:g} s"
        ) from error
    # All are here, so all have read what was left the last time.
    stem, _, call = key.rpartition("/")
    client.key_value_delete(f"{stem}/{int(call) - 1}/{me}")


def share(name: str, make: Callable[[], T], seconds: float = WORK_SECONDS) -> T:
    """What `make` returns on process 0, on every process; anything that JSON can hold.

    An exception of `make` is process 0's own; the others are ended by `processes`.

    Raises:
        MissingProcessError: it did not come within `seconds`.
    """
    if is_alone():
        return make()
    key = _unique(f"share/{name}")
    if is_first():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(_client().blocking_key_value_get(key, round(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        raise MissingProcessError(
            f"process 0 did not finish {name!r} within {seconds:g} s"
        ) from error


def gather(
    name: str, value: Any, seconds: float = BARRIER_SECONDS, *, first_only: bool = False
) -> list[Any]:
    """Every process's `value`, in their order, on every process; small, and fit for JSON.

    With `first_only` the other processes get only their own, in a list of one: what is not quite
    small need not travel to all of them.

    Raises:
        MissingProcessError: some did not come within `seconds`.
    """
    if is_alone():
        return [value]
    key = _unique(f"gather/{name}")
    _meet(key, json.dumps(value), name, seconds)
    if first_only and not is_first():
        return [value]
    found = {int(k.rpartition("/")[2]): v for k, v in _client().key_value_dir_get(f"{key}/")}
    return [json.loads(found[process]) for process in range(jax.process_count())]


def agree(name: str, value: Mapping[str, Any]) -> None:
    """Make sure that `value`, nested and fit for JSON, is the same on every process.

    Raises:
        UserError: here it differs from process 0's: it names the first key, and both values.
        MissingProcessError: some process did not come.
    """
    theirs = share(name, lambda: dict(value), BARRIER_SECONDS)
    mine = _flat(json.loads(json.dumps(value)))
    first = _flat(theirs)
    for key in sorted(mine.keys() | first.keys()):
        here, there = mine.get(key, "not there"), first.get(key, "not there")
        if here != there:
            raise UserError(
                f"the processes disagree on {name}: {key} is {here!r} here and {there!r} on "
                "process 0; start all of them with the same"
            )
    barrier(name)


def local_rows(sharding: Sharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The indices along `axis` of a global array that this process's devices hold, sorted.

    Processes whose devices share rows (along context or tensor) get the same ones.
    """
    held = sharding.addressable_devices_indices_map(shape).values()
    parts = {index[axis].indices(shape[axis]) for index in held if index is not None}
    return np.unique(np.concatenate([np.arange(*part) for part in parts]))


def place_rows(
    sharding: Sharding, shape: tuple[int, ...], axis: int, rows: np.ndarray, local: np.ndarray
) -> jax.Array:
    """The global array of `shape` whose `rows` along `axis` are `local`, on this process's devices.

    `rows` has all that `local_rows` says. No process needs another's.
    """

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        begin, end, _ = index[axis].indices(shape[axis])
        at = int(np.searchsorted(rows, begin))
        return local[(*index[:axis], slice(at, at + end - begin), *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, sharding, part)


def fetch(tree: T) -> T:
    """Arrays on the host, whole, on every process; all processes call it for the same arrays."""

    def whole(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(whole, tree)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys."""
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    else:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in inner:
        flat |= _flat(value, f"{path}.{key}".lstrip("."))
    return flat


_calls: Counter[str] = Counter()


def _unique(name: str) -> str:
    """A key that no earlier call has used; every process makes the same calls of a name."""
    _calls[name] += 1
    return f"dsjax/{name}/{_calls[name]}"


def _client() -> Any:
    """The coordination service, which jax does not offer under a public name."""
    return _jax_distributed.global_state.client
