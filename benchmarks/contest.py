"""Two libraries in turns on the same two cores: what the benchmarks against transformers share."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dsjax.architecture import DeepSeekConfig

THREADS = 2
ATTENTION = ("sdpa", "eager")
EXPERTS = ("eager", "grouped_mm")
"""Not `batched_mm`: it copies a matrix for every (token, choice) pair, 18 GB in a training step."""
PEAK_SIZE = 2048
TURN = 1.0
"""Seconds that a turn lasts at least."""

Contestants = dict[str, Callable[[], object]]


class Times(NamedTuple):
    """What one call took, in seconds."""

    wall: float
    processor: float
    """Over all threads: less disturbed than `wall` when other programs run."""


class Worker:
    """A process that holds some contestants and times one of them when asked."""

    def __init__(self, make: Callable[[], Contestants]):
        # Scratch memory in pages of 2 MB: else every step waits for hundreds of thousands of pages.
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        context.Process(target=_serve, args=(other, make), daemon=True).start()
        self.names: list[str] = self._pipe.recv()

    def seconds(self, name: str) -> Times:
        """Time of one call, the mean of a turn's.

        The first call of a turn does not count: the other process's threads may still wait for
        work by spinning, and the caches are full of its arrays.
        """
        self._pipe.send(name)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)


def _serve(pipe: Connection[Any, Any], make: Callable[[], Contestants]) -> None:
    warnings.filterwarnings("ignore")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    contestants = make()
    pipe.send(list(contestants))
    for name in iter(pipe.recv, None):
        run = contestants[name]
        run()
        calls, wall = 0, 0.0
        begin, used = time.perf_counter(), time.process_time()
        while wall < TURN:
            run()
            calls, wall = calls + 1, time.perf_counter() - begin
        pipe.send(Times(wall / calls, (time.process_time() - used) / calls))


def measure(
    workers: list[Worker], rounds: int, team: Callable[[str], str] = lambda name: name
) -> dict[str, list[Times]]:
    """Times of the contestants, `rounds` times each; neighbours in time belong to one round.

    Of each `team` only the one runs that was fastest in a first turn of all.
    """
    owner = {name: worker for worker in workers for name in worker.names}
    warm: dict[str, dict[str, float]] = {}
    for name, worker in owner.items():
        warm.setdefault(team(name), {})[name] = worker.seconds(name).wall
    best = {min(team, key=lambda name: team[name]) for team in warm.values()}
    owner = {name: worker for name, worker in owner.items() if name in best}
    times: dict[str, list[Times]] = {name: [] for name in owner}
    for _ in range(rounds):
        for name, worker in owner.items():
            times[name].append(worker.seconds(name))
    for worker in workers:
        worker.close()
    return times


def model_config() -> DeepSeekConfig:
    """The 81M parameters that are large enough to time kernels."""
    from dsjax.architecture import DeepSeekConfig
    from dsjax.config_files import load_model_config

    config = load_model_config("cpu-81m")
    assert isinstance(config, DeepSeekConfig)
    return config


def transformers_model(attention: str, experts: str) -> Any:
    """The same architecture in transformers, with one pair of its backends."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(THREADS)
    fields = model_config().model_dump()
    fields.pop("model_type")
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields.pop("rope_scaling")
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = DeepseekV3Config(**fields, rope_parameters=rope)
    config._attn_implementation = attention
    config._experts_implementation = experts
    return DeepseekV3ForCausalLM(config)


def large_product() -> Callable[[], float]:
    """A float32 product of two square matrices in XLA: 2 * PEAK_SIZE^3 operations."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    product = jax.jit(lambda a: (a @ a)[0, 0])
    return lambda: float(product(a))
