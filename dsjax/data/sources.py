"""Which documents are trained on and which are held out.

Deduplication and the split are made here, once, before any token is: what is held out is never
trained on, under any name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.formats import Documents, open_documents
from dsjax.errors import UserError


@dataclass(frozen=True, eq=False)
class Selection:
    """Some documents of one source, in its order, each read when it is asked for.

    `weight` is the source's share of the training tokens, relative to the others'.
    """

    documents: Documents
    indices: Int64[np.ndarray, " N"]
    weight: float

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.documents[int(self.indices[index])]

    def __iter__(self) -> Iterator[str]:
        return self.documents.read(map(int, self.indices))


@dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of a run: one selection a source to train on, one a source held out.

    `fingerprint` changes when what could be trained on changes: kinds, weights, names and sizes of
    files, their contents where `open_corpus` read them, the split, deduplication.
    """

    train: tuple[Selection, ...]
    held_out: tuple[Selection, ...]
    fingerprint: str

    def held_out_texts(self) -> Iterator[str]:
        """The held-out documents, source after source."""
        return chain.from_iterable(self.held_out)


def open_corpus(config: DataConfig) -> Corpus:
    """Find, deduplicate and split the documents of `config.sources`.

    Of documents with the same content only the first is kept, across sources. A document is held
    out when a SHA-256 of its name falls below `held_out_fraction`; without deduplication, copies
    of it are still kept out of training. Empty documents are dropped. For this every document is
    read once, and checked; 64 bits of its SHA-256 stay in memory, so that one of some 10^9 others
    may be taken for a copy. Only with `deduplicate` off and nothing held out is nothing read; the
    fingerprint then rests on names and sizes, and broken data show when training reads them.

    Raises `UserError` for missing, empty or broken data and for a split that leaves one side empty.
    """
    sources = [open_documents(source) for source in config.sources]
    reads_all = config.deduplicate or config.held_out_fraction > 0
    digests = np.fromiter((_digest(t) for t in chain(*sources)), np.uint64) if reads_all else None
    train, held_out = _split(sources, digests, config)
    return Corpus(
        train=_select(sources, train, config.sources),
        held_out=_select(sources, held_out, config.sources),
        fingerprint=_fingerprint(sources, digests, config),
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


_EMPTY = np.uint64(_digest(""))


def _split(
    sources: list[Documents], digests: UInt64[np.ndarray, " N"] | None, config: DataConfig
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Masks over the documents of all sources: those to train on, those held out."""
    if digests is None:
        everything = np.ones(sum(map(len, sources)), bool)
        return everything, ~everything
    kept = digests != _EMPTY
    if not kept.any():
        paths = ", ".join(source.path for source in config.sources)
        raise UserError(f"{paths}: all {len(kept)} documents are empty; expected text")
    if config.deduplicate:
        is_first = np.zeros_like(kept)
        is_first[np.unique(digests, return_index=True)[1]] = True
        kept &= is_first
    names = (documents.key(i) for documents in sources for i in range(len(documents)))
    drawn = np.fromiter((_draw(name) < config.held_out_fraction for name in names), bool)
    held_out = kept & drawn
    train = kept & ~np.isin(digests, digests[held_out])
    _check_split(sources, train, held_out, config)
    return train, held_out


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _check_split(
    sources: list[Documents],
    train: Bool[np.ndarray, " N"],
    held_out: Bool[np.ndarray, " N"],
    config: DataConfig,
) -> None:
    fraction = config.held_out_fraction
    for source, part, held in zip(
        config.sources, _parts(sources, train), _parts(sources, held_out), strict=True
    ):
        if not part.any():
            raise UserError(
                f"{source.path}: none of its {len(part)} documents is left to train on: "
                f"data.held_out_fraction={fraction:g} holds out {held.sum()}, the others are empty "
                "or copies; give it more documents, or leave the source out"
            )
    if fraction > 0 and not held_out.any():
        raise UserError(
            f"data.held_out_fraction={fraction:g} holds out none of {len(train)} documents; "
            "raise it, or set it to 0"
        )


def _parts(sources: list[Documents], mask: Bool[np.ndarray, " N"]) -> list[Bool[np.ndarray, " M"]]:
    """The mask of all documents, cut into one for each source."""
    return np.split(mask, np.cumsum([len(documents) for documents in sources])[:-1])


def _select(
    sources: list[Documents], mask: Bool[np.ndarray, " N"], configs: list[SourceConfig]
) -> tuple[Selection, ...]:
    return tuple(
        Selection(documents, np.flatnonzero(part), config.weight)
        for documents, part, config in zip(sources, _parts(sources, mask), configs, strict=True)
    )


def _fingerprint(
    sources: list[Documents], digests: UInt64[np.ndarray, " N"] | None, config: DataConfig
) -> str:
    described = {
        "sources": [
            {
                "kind": source.kind,
                "weight": source.weight,
                "text_key": source.text_key,
                "files": [[file.name, file.size] for file in documents.files],
            }
            for source, documents in zip(config.sources, sources, strict=True)
        ],
        "held_out_fraction": config.held_out_fraction,
        "deduplicate": config.deduplicate,
        "contents": None if digests is None else hashlib.sha256(digests.tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
