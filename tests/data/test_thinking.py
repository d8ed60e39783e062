"""Thought and content are told apart by their tags, in every form in which the tags come."""

import pytest

from dsjax.data.text import TextStream
from dsjax.data.thinking import ThoughtfulSpeech, opens_thought, split_thought
from tests.data.spoken import ids, tokenizer

START, END = ids("<think></think>")


def told(text, thinking=False, stops=(), start=START):
    """The fields of a text, and the speech."""
    new_stream = lambda: TextStream(tokenizer(), stops, tokenizer().special_ids)  # noqa: E731
    speech = ThoughtfulSpeech(new_stream, start, END, thinking)
    fields = {}
    for token in ids(text):
        field, part = speech.push(token)
        fields[field] = fields.get(field, "") + part
    field, part = speech.finish()
    fields[field] = fields.get(field, "") + part
    return {field: text for field, text in fields.items() if text}, speech


CASES = pytest.mark.parametrize(
    ("text", "thinking", "thought", "content"),
    [
        ("so 中\n\nit\n</think>\n\nis 😀\n", True, "so 中\n\nit", "is 😀\n"),
        ("<think>\nso\n</think>\n\nis", False, "so", "is"),
        ("<think></think>is", False, None, "is"),
        ("\n</think>\n\n  is", True, None, "  is"),
        ("is it", False, None, "is it"),
        ("\n\nis it", False, None, "\n\nis it"),
        ("is <think>it</think>", False, None, "is <think>it</think>"),
        ("is</think>it", False, None, "is</think>it"),
        ("so</think>is</think>it<think>", True, "so", "is</think>it<think>"),
        ("so it", True, "so it", None),
        ("so it\n\n", True, "so it", None),
        ("<think>so it", False, "so it", None),
        ("<think><think>so</think>is", False, "<think>so", "is"),
        ("<think>", False, None, None),
        ("so</think>", True, "so", None),
        ("so</think>\n\n", True, "so", None),
    ],
)


@CASES
def test_text_goes_where_the_tags_say(text, thinking, thought, content):
    fields = {"reasoning_content": thought, "content": content}
    assert told(text, thinking)[0] == {k: v for k, v in fields.items() if v is not None}


@CASES
def test_a_whole_text_is_told_apart_alike(text, thinking, thought, content):
    found, said = split_thought("why?<think>\n" if thinking else "why?", text)
    assert (found or None, said or None) == (thought, content)


def test_a_model_without_tags_only_speaks():
    assert told("<think>so</think>is", start=None)[0] == {"content": "<think>so</think>is"}


def test_tokens_of_the_thought_are_counted_without_the_tags():
    assert told("<think>so it</think>is")[1].reasoning_tokens == len(ids("so it"))
    assert told("so it", thinking=True)[1].reasoning_tokens == len(ids("so it"))
    assert told("so it")[1].reasoning_tokens == 0


def test_half_a_character_does_not_run_over_a_tag():
    half = ids("😀")[0]
    new_stream = lambda: TextStream(tokenizer())  # noqa: E731
    speech = ThoughtfulSpeech(new_stream, START, END, True)
    said = [speech.push(token) for token in (half, END, *ids("is"))]
    assert ("reasoning_content", "\ufffd") in said
    assert "".join(text for field, text in said if field == "content") == "is"


def test_a_stop_string_ends_the_thought_too_but_reaches_over_no_tag():
    fields, speech = told("so it is</think>it", thinking=True, stops=[" is"])
    assert (fields, speech.stopped) == ({"reasoning_content": "so it"}, True)
    fields, speech = told("so</think>it", thinking=True, stops=["soit", "so</think>it"])
    assert (fields, speech.stopped) == ({"reasoning_content": "so", "content": "it"}, False)
    fields, speech = told("so</think>it is", thinking=True, stops=[" is"])
    assert (fields, speech.stopped) == ({"reasoning_content": "so", "content": "it"}, True)


def test_a_prompt_opens_a_thought_only_at_its_very_end():
    def opens(text):
        return opens_thought(ids(text), tokenizer(), START)

    assert opens("<｜Assistant｜><think>\n") and opens("<think>") and opens("a<think> \n\n")
    assert (
        not opens("<think>a")
        and not opens("<think></think>\n")
        and not opens("")
        and not opens("a")
    )
    assert not opens_thought(ids("<think>"), tokenizer(), None)
