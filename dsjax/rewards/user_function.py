"""The reward `python`: a function of the user's own, called in a jail with a step's answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.config_rewards import PythonReward
from dsjax.errors import UserError
from dsjax.rewards import jail
from dsjax.rewards.answer import Answer
from dsjax.rewards.namespaces import Limits
from dsjax.rewards.sandbox import PYTHON, Keeper, require_ready
from dsjax.rewards.value import Value

_CULPRITS = 2
"""As many answers that hang are found among a call's; a function that always does would hang for
every one of them otherwise."""


class UserFunction:
    """`function(answers) -> values` of the user's file.

    The file is imported once, outside of any jail: it is the user's, and no text of a model is
    there yet. Each call runs in a jail that can read installed packages and the file's folder.
    State that it changes is lost after the call.
    """

    def __init__(self, config: PythonReward):
        """Import it.

        Raises:
            UserError: there is no such file or function, importing it raises, or there is no
                isolation on this machine.
        """
        path = Path(config.path)
        self._what = f"the reward 'python': {path}"
        if not path.is_file():
            raise UserError(f"{self._what}: no such file")
        network = "network" if config.network else "offline"
        self._config = config
        self._keeper = Keeper(PYTHON, str(path.resolve()), config.function, network)
        self._limits = Limits(config.seconds, config.memory_bytes, output_bytes=64 << 20)
        try:
            require_ready(self._keeper, self._what)
        except BaseException:
            self.close()
            raise

    def __call__(self, answers: Sequence[Answer]) -> list[Value]:
        """Values of all. Where a call raises or ends its halves are tried: one answer spoils one.

        Raises:
            UserError: it returned something else than one value for each answer.
        """
        values = [Value(0.0)] * len(answers)
        parts = [range(len(answers))] if answers else []
        timeouts = _CULPRITS * len(answers).bit_length()
        for part in parts:  # which grows as long as there are halves to try
            found = self._call([answers[number] for number in part])
            if not isinstance(found, str):
                for number, value in zip(part, found, strict=True):
                    values[number] = value
                continue
            timeouts -= found == jail.TIME
            if len(part) > 1 and timeouts > 0:
                half = len(part) // 2
                parts += [part[:half], part[half:]]
            else:
                for number in part:
                    values[number] = Value(0.0, found)
        return values

    def check(self, answers: Sequence[Answer]) -> None:
        """Call it with answers that were made up, before a model spends time on real ones.

        Raises:
            UserError: it fails; the message names the line and the exception.
        """
        found = self._call(answers)
        values = [Value(0.0, found)] if isinstance(found, str) else found
        if reason := next((value.reason for value in values if value.reason), ""):
            seconds, memory_bytes = self._config.seconds, self._config.memory_bytes
            said = {
                jail.TIME: f"it did not end within seconds={seconds} of the processor",
                jail.MEMORY: f"it took more than memory_bytes={memory_bytes}",
                jail.CRASH: "its process ended",
            }.get(reason, reason)
            raise UserError(f"{self._what}: called once with made-up answers, it fails: {said}")

    def _call(self, answers: Sequence[Answer]) -> list[Value] | str:
        """A value for each answer, or why there are none."""
        job = {"answers": [dataclasses.asdict(answer) for answer in answers]}
        outcome = self._keeper.do(job, self._limits)
        if outcome.ended != jail.OK:
            return outcome.ended
        said: Any = json.loads(outcome.output or b'{"raised": "crash"}')
        if isinstance(said, list):
            return [Value(*value) for value in said]
        if "wrong" in said:
            raise UserError(f"{self._what}: {said['wrong']}")
        return said["raised"]

    def close(self) -> None:
        """End its process."""
        self._keeper.close()
