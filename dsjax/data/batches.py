"""What training reads: batches without an end, whose position can be saved and taken back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dsjax.errors import UserError


class Batches(ABC, Iterator[dict[str, np.ndarray]]):
    """Microbatches, whose position can be saved as JSON, and is only taken back for the same data.

    Any iterator would take any other's position; here it carries what it is a position in.

    Args:
        identity: what the batches follow from; fit for JSON.
        fields: the arrays [rows, places] that a microbatch has, by name, and their dtypes.
    """

    def __init__(self, identity: Mapping[str, Any], fields: Mapping[str, DTypeLike]) -> None:
        self.fields = fields
        self._identity = identity

    def get_state(self) -> dict[str, Any]:
        """The position before the next microbatch, and the identity of the data; fit for JSON.

        It is of what is read here; `joined_state` makes one of several processes'.
        """
        return {"data": dict(self._identity), "position": self.position()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was taken; `UserError` when that was in other data."""
        for key, mine in self._identity.items():
            saved = state["data"].get(key)
            if saved != mine:
                raise UserError(
                    f"cannot resume from a position in other data: {key} was {saved}, is {mine}; "
                    "restore the data and settings of the saved run, or start another run"
                )
        self.move_to(state["position"])

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Of every stream that is read here."""

    @abstractmethod
    def move_to(self, position: dict[str, Any]) -> None:
        """Go on at a position, which may have streams that are not read here."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading ahead."""


def joined_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of the states of iterators that together read all rows."""
    position: dict[str, Any] = {}
    for state in states:
        position |= state["position"]
    return {"data": states[0]["data"], "position": position}
