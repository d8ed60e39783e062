"""Which page of the cache belongs to whom, and which of them hold a beginning worth keeping.

A page is written once and never changed when it is full: so sequences that begin alike share pages,
and a page that nobody uses keeps its tokens until its place is needed. A full page's key is a
digest of all tokens up to its end.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PagePool:
    """The pages of one group: free, in use (by how many), or unused but remembered."""

    def __init__(self, count: int, size: int):
        self.count = count
        self.size = size
        self._free = list(range(count))[::-1]
        self._users = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._experts_of: dict[int, Sequence[np.ndarray]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Remembered pages without a user, the one longest without first."""

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._unused)

    def take(self) -> int | None:
        """An empty page for one user, forgetting the one longest unused if need be."""
        if self._free:
            page = self._free.pop()
        elif self._unused:
            page, _ = self._unused.popitem(last=False)
            del self._page_of[self._key_of.pop(page)], self._experts_of[page]
        else:
            return None
        self._users[page] = 1
        return page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest remembered beginning; nothing is taken yet."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            pages.append(page)
        return pages

    def unused(self, pages: Sequence[int]) -> int:
        """How many of these nobody uses: sharing them costs that many available pages."""
        return sum(self._users[page] == 0 for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """One more user for pages that `find` found."""
        for page in pages:
            self._unused.pop(page, None)
            self._users[page] += 1

    def remember(self, page: int, key: bytes, experts: Sequence[np.ndarray] = ()) -> None:
        """A page is full, and its tokens are known by this key; the first such page counts.

        `experts` is what its tokens went through, if somebody wants to know.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self._experts_of[page] = experts

    def experts_of(self, page: int) -> Sequence[np.ndarray]:
        """What came with a page that is remembered."""
        return self._experts_of[page]

    def release(self, pages: Sequence[int]) -> None:
        """One user less. The end of a sequence is forgotten before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)


def page_keys(tokens: Sequence[int], size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The key of every full page of these tokens; `known` are those of the first pages."""
    keys = list(known)
    for begin in range(len(keys) * size, len(tokens) - size + 1, size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(np.asarray(tokens[begin : begin + size], np.int32).tobytes())
        keys.append(digest.digest())
    return keys
