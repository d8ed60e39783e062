"""Eight CPU devices, strict numerics, checked shapes, and a cache of compiled programs.

Set in the environment, so that programs which a test starts have them too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Eight devices; and independent collectives in one order: XLA's CPU backend otherwise lets devices
# start them in different orders, and over `tensor` they wait for one another for ever.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
])  # fmt: skip
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is XLA's: the second run takes what the first one compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# And hardly any is the programs' own: they are compiled hastily, but under `thorough_compiler`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

from tests.object_store import store as store

jax.config.update("jax_numpy_rank_promotion", "raise")

CHECKED = [
    "dsjax.inference.sampler_state",
    "dsjax.inference.sampling",
    "dsjax.kernels",
    "dsjax.model",
    "dsjax.numerics",
    "dsjax.training",
    "sharding",
]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="module")
def thorough_compiler() -> Iterator[None]:
    """Compiles as outside of tests: for kernels, for number formats, and for long computations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end, no process waits long for another one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
