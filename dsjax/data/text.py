"""Tokens to text while they come, stop strings, and text to tokens with special ones read out."""

from __future__ import annotations

import codecs
import itertools
from bisect import bisect_left
from collections.abc import Collection, Sequence

from tokenizers import Encoding

from dsjax.data.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out, as early as the text is certain.

    What `echo`, `push` and `finish` return, joined, is `tokenizer.decode` of the tokens, but for
    hidden ones and for what a stop string cuts. The bytes of a character may be spread over
    several tokens, and a stop string too: both are held back until they are whole. Each byte is
    looked at once, so that the work is linear in the output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        hidden: Collection[int] = (),
    ):
        self._tokenizer = tokenizer
        self._hidden = hidden
        # Both this and `tokenizers` write one U+FFFD for each longest beginning of a character.
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stops)
        self.characters = 0
        """Decoded so far, held back or not."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text; there is no more of it after that."""
        return self._matcher.found

    def echo(self, token: int) -> str:
        """Add a token of the prompt: none is hidden there, and none stops."""
        return self._decode(self._tokenizer.token_bytes(token), watch=False)

    def push(self, token: int, watch: bool = True) -> str:
        """Add a token; returns what is certain now. Without `watch` no stop string is looked for.

        A stop string that begins before the watch does is not found.
        """
        if token in self._hidden:
            return ""
        return self._decode(self._tokenizer.token_bytes(token), watch)

    def finish(self) -> str:
        """What was held back; half a character becomes U+FFFD. Nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._decode(b"", watch=True, final=True)
        return rest if self.stopped_by is not None else rest + self._matcher.release()

    def _decode(self, data: bytes, watch: bool, final: bool = False) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._bytes.decode(data, final)
        self.characters += len(text)
        return self._matcher.push(text) if watch else self._matcher.release() + text


class StopMatcher:
    """Finds the stop string that ends first, wherever the text is cut into pieces.

    Of several that end at the same character, the longest counts. For each stop string the length
    of its longest beginning that ends the text is kept up to date as Knuth, Morris and Pratt do;
    the longest of these is held back.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what can no longer belong to a stop string."""
        if not self._stops:
            return text
        before = len(self._held)
        text = self._held + text
        for end in range(before, len(text)):
            self._advance(text[end])
            if self.found is not None:
                self._held = ""
                return text[: end + 1 - len(self.found)]
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def release(self) -> str:
        """Give out what is held back, and begin anew."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> None:
        for place, (stop, borders) in enumerate(self._stops):
            length = self._matched[place]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            self._matched[place] = length
            if length == len(stop) and length > len(self.found or ""):
                self.found = stop


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`: the length of its longest proper beginning that ends it."""
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[length] != stop[place]:
            length = borders[length - 1]
        length += stop[length] == stop[place]
        borders[place] = length
    return borders


def encode_with_added_tokens(
    tokenizer: Tokenizer, text: str, literal: Collection[int] = frozenset()
) -> list[int]:
    """Encode `text`, in which the spelling of an added token is that token.

    Between added tokens text is encoded in one stretch, as `transformers` does.

    Args:
        tokenizer: of the checkpoint.
        text: what is encoded.
        literal: positions of characters that are no part of an added token. A spelling with such a
            character is text: it is split at that character, and both parts are encoded alone.

    Returns:
        Token ids; nothing is added to them.

    Raises:
        EncodingError: the text cannot be encoded.
    """
    if not literal:
        return tokenizer.encode_prompt(text).ids
    places = sorted(literal)
    ids: list[int] = []
    cuts = _spelled(tokenizer, text, places)
    todo = list(itertools.pairwise([0, *cuts, len(text)]))[::-1]  # the next part last
    while todo:
        begin, end = todo.pop()
        encoding = tokenizer.encode_prompt(text[begin:end])
        cuts = _cuts(tokenizer, encoding, begin, places)
        if cuts:
            todo += reversed([*itertools.pairwise([begin, *cuts, end])])
        else:
            ids += encoding.ids
    return ids


def _spelled(tokenizer: Tokenizer, text: str, places: Sequence[int]) -> list[int]:
    """Where to split a text so that no added token begins at `places`, before anything is encoded.

    `_cuts` finds the rest, but in an encoding: a text with many spellings would be encoded twice.
    """
    added, lengths = tokenizer.added_tokens, tokenizer.added_lengths
    return [
        place + 1
        for place in places
        if any(text[place : place + n] in added for n in lengths.get(text[place : place + 2], ()))
    ]


def _cuts(tokenizer: Tokenizer, encoding: Encoding, begin: int, places: Sequence[int]) -> list[int]:
    """Where to split a part of a text that begins at `begin`, so that literal spellings are none.

    A single character that is an added token cannot be split, and stays one.
    """
    added = tokenizer.added_ids
    if added.isdisjoint(encoding.ids):
        return []
    cuts = []
    for token, (first, after) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in added and after - first > 1:
            at = bisect_left(places, begin + first)
            if at < len(places) and places[at] < begin + after:
                cuts.append(max(places[at], begin + first + 1))
    return cuts
