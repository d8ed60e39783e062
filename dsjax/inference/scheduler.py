"""Who runs, on which pages, and what the next step does. Host values only; no device is touched.

Rows and pages come in groups, one for each part of the batch that lives on its own devices. Waiting
requests enter in order, when there is a row and pages for their prompt; pages for what they produce
are taken as they need them. When none are left, the one that entered last gives its pages up, waits
in front of all others, and goes on later from where it was: what it loses is time.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from dsjax.inference.pages import PagePool, page_keys
from dsjax.inference.request import Request, TokenLogprob


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far and where they lie."""

    request: Request
    tokens: list[int]
    """Prompt and output."""
    filled: int = 0
    """Tokens whose latents are in the cache."""
    cached: int | None = None
    """Tokens of the prompt that were found there when it first entered; None: it has not yet."""
    drafts: tuple[int, ...] = ()
    """What MTP expects to follow."""
    group: int = -1
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    shared: int = 0
    """Pages that others can find."""
    prompt_logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)
    """Which experts each token in the cache went to, [L, K], if somebody wants to know."""

    @property
    def made(self) -> int:
        """Tokens of output."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def unread(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.filled

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Its prompt is still to be read, and every token's log-probability is wanted."""
        return self.request.sampling.prompt_logprobs is not None and self.made == 0

    @property
    def reading(self) -> bool:
        """More than the newest token is still to be read."""
        return self.unread > 1 or self.made == 0


class Chunk(NamedTuple):
    """A sequence's part of a step: `count` tokens from `filled` on, drafts included."""

    sequence: Sequence
    count: int


class Plan(NamedTuple):
    """One step: its shape, and for each group the sequences in it."""

    rows: int
    """Rows a group."""
    queries: int
    reading: bool
    """Prompts are read; otherwise every row is continued."""
    groups: list[list[Chunk]]

    def placed(self) -> Iterator[tuple[int, Chunk]]:
        """Every chunk and its row of the step."""
        for group, chunks in enumerate(self.groups):
            for number, chunk in enumerate(chunks):
                yield group * self.rows + number, chunk


class Scheduler:
    """Rows, pages and the queue."""

    def __init__(
        self, groups: int, rows: int, pages: int, page_size: int, shapes: Many[tuple[int, int]]
    ):
        """`rows` and `pages` are those of a group; `shapes` are (rows, tokens) of reading steps."""
        self.pools = [PagePool(pages, page_size) for _ in range(groups)]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order in which they entered."""
        self._free_rows = [list(range(rows))[::-1] for _ in range(groups)]
        self._shapes = shapes
        self._row_counts = row_counts(rows)
        self._read_last = False
        self.preempted = 0
        """How often a sequence had to give its pages up."""

    def enter(self) -> list[Sequence]:
        """Let waiting sequences in as long as there is room; returns those that entered."""
        entered = []
        while self.waiting and self._place(self.waiting[0]):
            entered.append(self.waiting.popleft())
        self.running += entered
        return entered

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence a row and pages in the group that remembers most of it."""
        size = self.pools[0].size
        sequence.keys = page_keys(sequence.tokens, size, sequence.keys)
        needed = -(-len(sequence.tokens) // size)
        best: tuple[int, int, int] | None = None
        for group, pool in enumerate(self.pools):
            found = self._remembered(sequence, pool)
            fresh = needed - len(found) + pool.unused(found)
            if self._free_rows[group] and fresh <= pool.available:
                best = max(best or (-1, 0, 0), (len(found), pool.available, group))
        if best is None:
            return False
        group = best[2]
        pool = self.pools[group]
        found = self._remembered(sequence, pool)
        pool.share(found)
        taken = [pool.take() for _ in range(needed - len(found))]
        sequence.pages = found + [page for page in taken if page is not None]
        sequence.group, sequence.row = group, self._free_rows[group].pop()
        sequence.filled, sequence.shared = len(found) * size, len(found)
        sequence.experts = [one for page in found for one in pool.experts_of(page)]
        return True

    def _remembered(self, sequence: Sequence, pool: PagePool) -> list[int]:
        """Pages to share; at least one token is left to read, for there must be logits."""
        if sequence.wants_prompt_logprobs:
            return []  # every position's logits are wanted
        return pool.find(sequence.keys[: (len(sequence.tokens) - 1) // pool.size])

    def forget(self) -> None:
        """No page holds anything worth keeping any more; nothing runs and nothing waits."""
        self.pools = [PagePool(pool.count, pool.size) for pool in self.pools]

    def leave(self, sequence: Sequence) -> None:
        """Give row and pages back; full pages are remembered."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pools[sequence.group].release(sequence.pages)
        self._free_rows[sequence.group].append(sequence.row)
        sequence.pages, sequence.row, sequence.drafts = [], -1, ()
        sequence.filled = 0

    def remember(self, sequence: Sequence) -> None:
        """Full pages of a sequence can be shared from now on."""
        pool = self.pools[sequence.group]
        full = sequence.filled // pool.size
        if full == sequence.shared:
            return
        sequence.keys = page_keys(sequence.tokens[: sequence.filled], pool.size, sequence.keys)
        for number in range(sequence.shared, full):
            experts = sequence.experts[number * pool.size : (number + 1) * pool.size]
            pool.remember(sequence.pages[number], sequence.keys[number], experts)
        sequence.shared = full

    @property
    def decoding_rows(self) -> int:
        """Rows a group of the program that would continue what can be continued; 0 for nothing."""
        groups = self._by_group([s for s in self.running if not s.reading])
        most = max(map(len, groups))
        return self._rows_for(most) if most else 0

    def plan(self, drafts: int) -> Plan | None:
        """What to do next: read prompts and continue sequences in turn; None when nothing runs."""
        reading = [s for s in self.running if s.reading]
        decoding = [s for s in self.running if not s.reading]
        if reading and not (decoding and self._read_last):
            self._read_last = True
            return self._reading_step(reading)
        self._read_last = False
        return self._decoding_step(decoding, drafts) if decoding else None

    def _reading_step(self, sequences: list[Sequence]) -> Plan:
        """The shape that reads most; on a tie the one with fewest rows."""
        groups = self._by_group(sequences)

        def reads(shape: tuple[int, int]) -> int:
            rows, queries = shape
            return sum(min(s.unread, queries) for group in groups for s in group[:rows])

        rows, queries = max(self._shapes, key=lambda shape: (reads(shape), -shape[0]))
        chunks = [[Chunk(s, min(s.unread, queries)) for s in g[:rows]] for g in groups]
        return Plan(rows, queries, True, chunks)

    def _decoding_step(self, sequences: list[Sequence], drafts: int) -> Plan:
        """Every sequence that has its pages, each with as many of its drafts as can count."""
        chunks = []
        for sequence in sequences:
            if sequence.row < 0:  # gave its pages up to one before it
                continue
            left = sequence.request.sampling.max_tokens - sequence.made
            count = 1 + min(drafts, len(sequence.drafts), left - 1)
            if self._has_pages(sequence, sequence.filled + count):
                chunks.append(Chunk(sequence, count))
        chunks = [chunk for chunk in chunks if chunk.sequence.row >= 0]
        groups: list[list[Chunk]] = [[] for _ in self.pools]
        for chunk in chunks:
            groups[chunk.sequence.group].append(chunk)
        return Plan(self._rows_for(max(map(len, groups))), 1 + drafts, False, groups)

    def _has_pages(self, sequence: Sequence, tokens: int) -> bool:
        """Take pages up to so many tokens, from the last that entered if need be."""
        pool = self.pools[sequence.group]
        while len(sequence.pages) * pool.size < tokens:
            page = pool.take()
            if page is not None:
                sequence.pages.append(page)
                continue
            last = next(s for s in reversed(self.running) if s.group == sequence.group)
            self.running.remove(last)
            self._give_back(last)
            self.preempted += 1
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        return True

    def _rows_for(self, most: int) -> int:
        return next(count for count in self._row_counts if count >= most)

    def _by_group(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        return [[s for s in sequences if s.group == g] for g in range(len(self.pools))]


def row_counts(rows: int) -> list[int]:
    """Rows that a step is compiled for: 1, then fourfold up to all."""
    counts = [1]
    while counts[-1] < rows:
        counts.append(min(rows, counts[-1] * (8 if counts[-1] == 1 else 4)))
    return counts
