"""Thought and content are told apart by their tags, in every form in which the tags come."""

import random
import time

import pytest

from dsjax.data.text import TextStream
from dsjax.data.thinking import (
    ReasoningParser,
    ThoughtfulSpeech,
    begins_in_thought,
    split_thought,
    think_tags,
)
from tests.data.spoken import byte_ids, ids, tokenizer

START, END = ids("<think></think>")
OPENED_PROMPT = "why?<think>\n"


def told(tokens, opened=False, stops=(), min_tokens=0):
    """The fields of some tokens, and the speech."""
    speech = ThoughtfulSpeech(TextStream(tokenizer()), stops, opened)
    fields = {}
    for place, token in enumerate(tokens):
        for field, part in speech.push(token, watch=place >= min_tokens):
            fields[field] = fields.get(field, "") + part
    for field, part in speech.finish():
        fields[field] = fields.get(field, "") + part
    return {field: text for field, text in fields.items() if text}, speech


def split(text, opened=False):
    """The same fields, of a whole text."""
    thought, content = split_thought(OPENED_PROMPT if opened else "why?", text)
    fields = {"reasoning_content": thought, "content": content}
    return {field: text for field, text in fields.items() if text}


CASES = [
    # With the opening tag in the prompt.
    ("so 中\n\nit\n</think>\n\nis 😀\n", True, "so 中\n\nit", "is 😀\n"),
    ("\n</think>\n\n  is", True, None, "  is"),
    ("</think>is", True, None, "is"),
    ("so</think>", True, "so", None),
    ("so</think>\n\n", True, "so", None),
    ("so</think> is", True, "so", " is"),
    ("", True, None, None),
    # And again in the output, as models write it.
    ("<think>\nso\n</think>\n\nis", True, "so", "is"),
    (" \n<think>\n<think>so</think>is", True, "so", "is"),
    ("\n so</think>is", True, " so", "is"),
    # In the output alone, behind white space or not, once or several times.
    ("<think>\nso\n</think>\n\nis", False, "so", "is"),
    ("\n<think>so</think>is", False, "so", "is"),
    (" \t\r\n  <think>so</think>is", False, "so", "is"),
    ("<think></think>is", False, None, "is"),
    ("<think>\n\n</think>\n\nis", False, None, "is"),
    ("<think><think>so</think>is", False, "so", "is"),
    # Nested and stray tags: the first </think> ends a thought, and behind it all is text.
    ("<think>a <think>b</think>c</think>is", False, "a <think>b", "c</think>is"),
    ("so</think>is</think>it<think>", True, "so", "is</think>it<think>"),
    ("so</think>`<think>x</think>`", True, "so", "`<think>x</think>`"),
    ("so</think><think>it</think>is", True, "so", "<think>it</think>is"),
    # No thought.
    ("is it", False, None, "is it"),
    ("\n\nis it", False, None, "\n\nis it"),
    ("is <think>it</think>", False, None, "is <think>it</think>"),
    ("so\n</think>\n\nis", False, None, "so\n</think>\n\nis"),
    ("</think>is", False, None, "</think>is"),
    ("<thinking>so</thinking>", False, None, "<thinking>so</thinking>"),
    ("<THINK>so</THINK>", False, None, "<THINK>so</THINK>"),
    (" <th", False, None, " <th"),
    (" \n", False, None, " \n"),
    # A thought that does not end.
    ("so it", True, "so it", None),
    ("so it\n\n", True, "so it", None),
    ("so </thin", True, "so </thin", None),
    ("so </think", True, "so </think", None),
    ("<", True, "<", None),
    ("<think>so it", False, "so it", None),
    ("<think>", False, None, None),
    ("so <</think></thin", True, "so <", "</thin"),
    ("so </</think>is", True, "so </", "is"),
]
EACH = pytest.mark.parametrize(("text", "opened", "thought", "content"), CASES)


@EACH
def test_text_goes_where_the_tags_say(text, opened, thought, content):
    fields = {"reasoning_content": thought, "content": content}
    expected = {k: v for k, v in fields.items() if v is not None}
    assert split(text, opened) == expected
    assert told(ids(text), opened)[0] == expected, "each tag is one token"
    assert told(byte_ids(text.encode()), opened)[0] == expected, "each tag is several tokens"


def test_a_stream_cut_anywhere_says_what_the_whole_text_does():
    draw = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<thi",
        "nk>",
        "</",
        "<",
        ">",
        "\n",
        " ",
        "so",
        "中",
        "😀",
        "\r",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        opened = draw.random() < 0.5
        expected = split(text, opened)
        assert told(ids(text), opened)[0] == expected
        assert told(byte_ids(text.encode()), opened)[0] == expected
        parser, found = ReasoningParser(opened), {}
        while text:
            cut = draw.randrange(len(text) + 1)
            for field, part in parser.push(text[:cut]):
                found[field] = found.get(field, "") + part
            text = text[cut:]
        for field, part in parser.finish():
            found[field] = found.get(field, "") + part
        assert found == expected


def test_text_is_shown_as_soon_as_its_field_is_certain():
    parser = ReasoningParser(opened=True)
    assert parser.push("a <") == [("reasoning_content", "a ")]
    assert parser.push("b") == [("reasoning_content", "<b")]
    assert parser.push("\n") == []
    assert parser.push("c</think>\n") == [("reasoning_content", "\nc")]
    assert parser.push("<") == [("content", "<")], "no tag is looked for in the content"


def test_whole_texts_tell_an_unfinished_thought_from_an_empty_content():
    assert split_thought(OPENED_PROMPT, "so") == ("so", None)
    assert split_thought(OPENED_PROMPT, "so</think>") == ("so", "")
    assert split_thought("why?", "<think></think>") == ("", "")
    assert split_thought("why?", "") == (None, "")


def test_long_runs_take_time_that_grows_with_their_length():
    began = time.monotonic()
    for run in ("\n", " ", "<", "<think>", "</think", "a\n"):
        parser = ReasoningParser(opened=False)
        for _ in range(100_000):
            parser.push(run)
        parser.finish()
    assert time.monotonic() - began < 20


def test_tokens_of_the_thought_are_counted_without_the_tags():
    assert told(ids("<think>so it</think>is"))[1].reasoning_tokens == len(ids("so it"))
    assert told(ids("so it"), opened=True)[1].reasoning_tokens == len(ids("so it"))
    assert told(ids("so it"))[1].reasoning_tokens == 0


def test_half_a_character_does_not_run_over_a_tag():
    fields, _ = told([ids("😀")[0], END, *ids("is")], opened=True)
    assert fields == {"reasoning_content": "\ufffd", "content": "is"}


@pytest.mark.parametrize("tokens", [ids, lambda text: byte_ids(text.encode())])
def test_stop_strings_end_the_content_alone_and_reach_over_no_tag(tokens):
    fields, speech = told(tokens("so it is</think>it"), opened=True, stops=[" is"])
    assert (fields, speech.stopped) == ({"reasoning_content": "so it is", "content": "it"}, False)
    spans = ["soit", "so</think>it", "</think>", "<think>", "think>it"]
    fields, speech = told(tokens("<think>so</think>it"), stops=spans)
    assert (fields, speech.stopped) == ({"reasoning_content": "so", "content": "it"}, False)
    fields, speech = told(tokens("so is</think>it is, is"), opened=True, stops=[" is"])
    assert (fields, speech.stopped) == ({"reasoning_content": "so is", "content": "it"}, True)


def test_newlines_between_thought_and_content_are_no_stop_string():
    fields, speech = told(ids("a\n\nb\n</think>\n\nit\n\nis"), opened=True, stops=["\n\n"])
    assert (fields, speech.stopped) == ({"reasoning_content": "a\n\nb", "content": "it"}, True)
    assert told(ids("\n\nit"), stops=["\n\n"])[0] == {}, "without a thought they are content"


def test_no_stop_string_is_looked_for_before_min_tokens():
    text = ids("so</think>it is it is")
    assert told(text, opened=True, stops=[" is"])[0]["content"] == "it"
    late = told(text, opened=True, stops=[" is"], min_tokens=len(ids("so</think>it is")))[0]
    assert late["content"] == "it is it"


def test_a_prompt_opens_a_thought_only_at_its_very_end():
    assert all(map(begins_in_thought, ("<｜Assistant｜><think>\n", "<think>", "a<think> \n\n")))
    assert not any(map(begins_in_thought, ("<think>a", "<think></think>\n\n", "", "a", "<think")))


def test_tags_are_listed_with_that_of_the_prompt():
    assert think_tags(OPENED_PROMPT, "so</think>is") == ["<think>", "</think>"]
    assert think_tags("why?", "is") == []
    assert think_tags(OPENED_PROMPT, "<think>so") == ["<think>", "<think>"]
