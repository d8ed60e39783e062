"""The exit code of a process says whether starting all of them again helps."""

from __future__ import annotations

import json
from typing import NoReturn

import pytest
from jax._src import clusters
from jax.errors import JaxRuntimeError

from sharding import start, watch
from sharding.watch import LOST, Watch


class Client:
    """The coordination service of one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, overwrite: bool = False) -> None:
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JaxRuntimeError("UNAVAILABLE: Connection reset by peer"), LOST),
        (JaxRuntimeError("DATA_LOSS: uncorrectable error of a device's memory"), LOST),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (JaxRuntimeError("INVALID_ARGUMENT: shapes"), 1),
        (RuntimeError("UNAVAILABLE"), 1),
    ],
)
def test_a_broken_connection_or_device_is_worth_another_start(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "TROUBLED_SECONDS", 0.0)
    monkeypatch.setattr(watch, "leave", lambda text, code: (_ for _ in ()).throw(SystemExit(code)))
    client = Client()
    watching = Watch(client, 1, 2)
    watching._stopped.set()  # no other process will say a word
    with pytest.raises(SystemExit) as left:
        watching.fail(error)
    assert left.value.code == code
    assert json.loads(client.values["dsjax/end/why"])["code"] == code


def test_a_first_host_that_is_not_there_yet_is_worth_another_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In GKE its name is known once its pod is scheduled."""

    def find(seconds: int, port: str | None) -> str:
        raise RuntimeError("Failed to recognize coordinator address slice-0-0")

    left: list[tuple[str, int]] = []

    def leave(text: str, code: int) -> NoReturn:
        left.append((text, code))
        raise SystemExit

    monkeypatch.setattr(start, "leave", leave)
    monkeypatch.setattr(clusters.GkeTpuCluster, "get_coordinator_address", find)
    with pytest.raises(SystemExit):
        start._place_in(clusters.GkeTpuCluster, 5)
    [(text, code)] = left
    assert text.startswith("process 0 did not come within 5 s: Failed") and code == LOST


def test_its_code_is_none_that_means_anything_else() -> None:
    """0 done, 1 failed, 2 wrong input; from 126 on shells, docker and signals."""
    assert 2 < LOST < 126
