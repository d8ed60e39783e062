"""A trace of some steps on the devices, made where the configuration asks for one.

`jax.profiler` writes it below `run_dir/profile`; xprof reads it: `pip install xprof`, then
`xprof --logdir RUN_DIR/profile`. JAX's guide to it: https://docs.jax.dev/en/latest/profiling.html
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from dsjax.config import ProfileConfig
from dsjax.places import ObjectPath


class StepProfiler:
    """Traces the steps that `config` names; without a `config`, none.

    The first process traces its own devices: all of them run one program. A run that is resumed
    beyond `start_step` traces nothing, and one that ends within its trace writes what there is.
    """

    def __init__(self, config: ProfileConfig | None, run_dir: Path) -> None:
        self._config = config if jax.process_index() == 0 else None
        self._folder = run_dir / "profile"
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    @contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Around the call that issues step `number`, counted from 1; `before` is what it reads.

        The host runs ahead of the devices, so a trace begins and ends by waiting for `before`: its
        steps are whole, and the first of them and the one after the last start on idle devices.
        """
        config = self._config
        if config is None:
            yield
            return
        if self._running and number >= config.start_step + config.steps:
            jax.block_until_ready(before)
            self.close()
        if number == config.start_step:
            jax.block_until_ready(before)
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def close(self) -> None:
        """Write the trace, if one is being made."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        if self._local is not None:
            _upload(Path(self._local.name), self._folder)
            self._local.cleanup()

    def _start(self) -> None:
        folder = self._folder
        if isinstance(folder, ObjectPath):  # the profiler writes files
            self._local = tempfile.TemporaryDirectory()
            folder = Path(self._local.name)
        jax.profiler.start_trace(str(folder))
        self._running = True


def _upload(source: Path, destination: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (destination / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
