"""Many requests through an engine: few are open at once, each has a seed of its own.

So what is drawn is the same whatever runs beside it, in whichever order, before or after a kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsjax.inference.request import LARGEST_SEED, FinishReason, Request

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine

QUEUE = 2
"""Requests that are open at once, for each row of the engine: one runs, and one waits."""


def seed_of(seed: int, key: tuple[Any, ...]) -> int:
    """The seed of the answer that `key` names; nothing else enters it."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (LARGEST_SEED + 1)


def draw(
    engine: Engine,
    requests: Iterable[Request],
    take: Callable[[str, list[int], FinishReason], None],
) -> Iterator[int]:
    """Run the requests, and let `take` have each as soon as it is whole: id, tokens, how it ended.

    After each step yields the tokens made so far.
    """
    waiting = iter(requests)
    open_: dict[str, list[int]] = {}
    made = 0
    while True:
        while len(open_) < QUEUE * engine.settings.rows and (request := next(waiting, None)):
            engine.submit(request)
            open_[request.id] = []
        if not open_:
            return
        for update in engine.step():
            open_[update.request_id] += update.tokens
            made += len(update.tokens)
            if update.finish is not None:
                take(update.request_id, open_.pop(update.request_id), update.finish)
        yield made
