"""Text comes as early as it is certain, and is what decoding everything would have given."""

import random
import re
import time

import pytest

from dsjax.data.text import StopMatcher, TextStream, encode_with_added_tokens
from dsjax.data.tokenizer import BOS, EOS
from tests.data.spoken import byte_ids, ids, tokenizer

MIXED = "naïve 中文字 😀 hello e\u0301 🇩🇪 \U0010ffff\n"


def streamed(tokens, stops=()):
    stream = TextStream(tokenizer(), stops)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()], stream


def test_a_byte_is_the_same_in_the_stream_and_in_the_tokenizer():
    for token in range(tokenizer().vocab_size):
        assert tokenizer().token_bytes(token).decode(errors="replace") == tokenizer().decode(
            [token]
        )
    assert tokenizer().token_bytes(tokenizer().vocab_size + 3) == b""


def test_a_character_that_is_cut_between_tokens_waits_until_it_is_whole():
    pieces, _ = streamed(byte_ids(MIXED.encode()))
    assert "".join(pieces) == MIXED
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(MIXED), "each as soon as it is whole"


@pytest.mark.parametrize("seed", range(3))
def test_any_tokens_stream_to_what_they_decode_to(seed):
    """Bytes that are no UTF-8, at every place."""
    draw = random.Random(seed)
    for _ in range(300):
        tokens = draw.choices(range(tokenizer().vocab_size + 4), k=draw.randrange(12))
        pieces, stream = streamed(tokens)
        assert "".join(pieces) == tokenizer().decode(tokens)
        assert stream.characters == len(tokenizer().decode(tokens))


def test_half_a_character_at_the_end_is_told_at_the_end():
    tokens = tokenizer().encode("a😀")[:-1]
    pieces, _ = streamed(tokens)
    assert "".join(pieces) == tokenizer().decode(tokens) == "a\ufffd"
    assert "\ufffd" in pieces[-1]


def test_hidden_tokens_are_not_shown_but_in_the_prompt():
    bos, eos = tokenizer().bos_id, tokenizer().eos_id
    stream = TextStream(tokenizer(), hidden=tokenizer().special_ids)
    assert [stream.echo(bos), stream.push(eos), stream.push(ids("<think>")[0])] == [
        BOS, "", "<think>",
    ]  # fmt: skip


STOPS = ["stop", "top here", "\n\n", "aab", "字 😀", "aaab", "ab"]


def cut(text, stops):
    """The plain meaning: up to the stop string that ends first, the longest of those."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, length, stop = min(ends)
    return text[: end + length], stop


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_are_found_wherever_tokens_are_cut(seed):
    draw = random.Random(seed)
    for _ in range(400):
        text = "".join(draw.choices(["a", "b", "s", "st", "top", " here", "\n", "字", " 😀"], k=20))
        stops = draw.sample(STOPS, k=draw.randrange(4))
        matcher = StopMatcher(stops)
        shown = ""
        at = 0
        while at < len(text) and matcher.found is None:
            size = draw.randrange(1, 6)
            shown += matcher.push(text[at : at + size])
            at += size
        shown += "" if matcher.found else matcher.release()
        assert (shown, matcher.found) == cut(text, stops)


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_are_found_across_tokens_and_bytes(seed):
    draw = random.Random(seed)
    text = "is it 中文字 😀 naïve? stop here"
    for _ in range(200):
        start = draw.randrange(len(text) - 1)
        stop = text[start : draw.randrange(start + 1, len(text) + 1)]
        # Words as the tokenizer has them, and characters cut into bytes.
        tokens = []
        for part in re.split("( )", text):
            tokens += ids(part) if draw.random() < 0.5 else byte_ids(part.encode())
        pieces, stream = streamed(tokens, [stop])
        assert ("".join(pieces), stream.stopped_by) == cut(text, [stop])


def test_only_the_longest_possible_beginning_of_a_stop_string_is_held_back():
    matcher = StopMatcher(["stop here"])
    assert [matcher.push(text) for text in ("a st", "op", " th", "stop he")] == [
        "a ", "", "stop th", "",
    ]  # fmt: skip
    assert matcher.release() == "stop he"


def test_no_stop_string_is_found_before_the_watch():
    stream = TextStream(tokenizer(), ["ab"])
    a, b = tokenizer().encode("a")[0], tokenizer().encode("b")[0]
    assert [stream.push(a, watch=False), stream.push(b, watch=True)] == ["a", "b"]
    assert [stream.push(a), stream.push(b), stream.push(a)] == ["", "", ""]
    assert stream.stopped_by == "ab"
    assert stream.finish() == ""


def test_the_work_is_linear_in_the_output():
    """A stop string that nearly matches all the time, of the greatest length."""
    a = tokenizer().encode("a")[0]

    def seconds(count):
        stream = TextStream(tokenizer(), ["a" * 1023 + "b"])
        start = time.perf_counter()
        for _ in range(count):
            stream.push(a)
        return time.perf_counter() - start

    seconds(2000)
    assert seconds(20_000) < 40 * max(seconds(2000), 1e-3)


def test_added_tokens_are_read_out_of_text_unless_they_are_literal():
    think, user = ids("<think>")[0], ids("<｜User｜>")[0]
    text = "a<think><｜User｜>b<"
    both = encode_with_added_tokens(tokenizer(), text)
    assert both == ids(text)
    assert think in both and user in both
    one = encode_with_added_tokens(tokenizer(), text, {1})
    assert think not in one and user in one
    assert tokenizer().decode(one) == text
    none = encode_with_added_tokens(tokenizer(), text * 3, range(100))
    assert not set(none) & set(tokenizer().added_tokens.values())
    assert tokenizer().decode(none) == text * 3
    assert encode_with_added_tokens(tokenizer(), EOS) == [tokenizer().eos_id]


def test_a_spelling_that_is_partly_literal_is_text():
    think = ids("<think>")[0]
    for place in range(len("<think>")):
        found = encode_with_added_tokens(tokenizer(), "a<think>b", {1 + place})
        assert think not in found and tokenizer().decode(found) == "a<think>b"


def test_a_long_text_of_literal_tokens_is_encoded_in_linear_time():
    text = "<think>" * 20_000
    begin = time.perf_counter()
    found = encode_with_added_tokens(tokenizer(), text, range(len(text)))
    assert time.perf_counter() - begin < 5
    assert tokenizer().decode(found) == text
