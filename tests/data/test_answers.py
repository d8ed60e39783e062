"""Which tokens of a conversation are trained, by R1's template and by others."""

from __future__ import annotations

import json

import pytest

from dsjax.data.answers import AnswerEncoder
from dsjax.data.chat_template import ChatTemplate, TemplateError, make_chat_template
from dsjax.data.conversations import hold_out, read_conversation, read_conversations
from dsjax.data.thinking import split_thought
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from tests.data.spoken import TEMPLATE as R1
from tests.data.spoken import tokenizer

PLAIN = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}\
{{ eos_token }}{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
TOKENS = tokenizer()
EOS = TOKENS.decode([TOKENS.eos_id or 0])


def template(source: str, tmp_path) -> ChatTemplate:
    return make_chat_template(source, TOKENS, tmp_path)


def examples(source: str, tmp_path, record: dict, train_on: str = "all") -> list[tuple[str, str]]:
    """Each example as (all of it, what is trained of it)."""
    encoder = AnswerEncoder(template(source, tmp_path), TOKENS, train_on)
    return [
        (TOKENS.decode(e.tokens.tolist()), TOKENS.decode(e.tokens[e.trained].tolist()))
        for e in encoder.examples(read_conversation(record, "here"))
    ]


def said(*texts: str, **last: object) -> dict:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


def test_every_answer_and_its_end_are_trained_and_nothing_else(tmp_path):
    [(whole, trained)] = examples(PLAIN, tmp_path, said("hi", "hello", "stop?", "no"))
    assert trained == f"hello{EOS}no{EOS}"
    turns = ("<｜User｜>hi<｜Assistant｜>hello", "<｜User｜>stop?<｜Assistant｜>no")
    assert whole.endswith(EOS.join([*turns, ""]))


def test_only_the_last_answer_is_trained_where_that_is_asked_for(tmp_path):
    [(whole, trained)] = examples(PLAIN, tmp_path, said("hi", "hello", "stop?", "no"), "last")
    assert trained == f"no{EOS}" and "hello" in whole


def test_what_is_not_to_be_trained_is_not(tmp_path):
    record = said("hi", "hello", "stop?", "no")
    record["messages"][1]["trained"] = False
    assert [t for _, t in examples(PLAIN, tmp_path, record)] == [f"no{EOS}"]


def test_a_completion_is_trained_and_its_prompt_is_not(tmp_path):
    for prompt in ("hi", [{"role": "user", "content": "hi"}]):
        [(_, trained)] = examples(PLAIN, tmp_path, {"prompt": prompt, "completion": "hello"})
        assert trained == f"hello{EOS}"
    before = said("hi", "there", "again")["messages"]
    [(_, trained)] = examples(PLAIN, tmp_path, {"prompt": before, "completion": "hello"})
    assert trained == f"hello{EOS}"


def test_a_question_that_repeats_the_answer_changes_nothing(tmp_path):
    encoder = AnswerEncoder(template(PLAIN, tmp_path), TOKENS, "all")
    [example] = encoder.examples(read_conversation(said("hello", "hello"), "here"))
    answer = [*TOKENS.encode("hello"), TOKENS.eos_id]
    assert example.trained.tolist() == [False] * (len(example.tokens) - len(answer)) + [True] * len(
        answer
    )


def test_the_tokens_are_those_that_a_server_would_read_and_the_model_would_write(tmp_path):
    """So a special token that a message spells is its characters, in question and answer."""
    chat = template(PLAIN, tmp_path)
    record = said(f"{EOS}<｜User｜>", f"is <think>{EOS} stop")
    [example] = AnswerEncoder(chat, TOKENS, "all").examples(read_conversation(record, "here"))
    prompt = chat.encode(record["messages"][:1])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert (example.tokens == TOKENS.eos_id).sum() == 1 and example.tokens[-1] == TOKENS.eos_id
    assert TOKENS.added_tokens["<think>"] not in example.tokens.tolist()


def test_r1s_template_leaves_thoughts_out_so_each_turn_is_an_example(tmp_path):
    record = said("hi", "hello", "stop?", "no", reasoning_content="is it?")
    record["messages"][1]["reasoning_content"] = "greet"
    first, second = examples(R1, tmp_path, record)
    assert first[1] == f"greet\n</think>\n\nhello{EOS}"
    assert second[1] == f"is it?\n</think>\n\nno{EOS}"
    assert "greet" not in second[0] and f"<｜Assistant｜>hello{EOS}" in second[0]
    assert first[0].endswith(f"<｜Assistant｜><think>\n{first[1]}")


def test_a_thought_may_stand_in_the_content_and_means_the_same(tmp_path):
    apart = said("hi", "no", reasoning_content="is it?")
    inside = said("hi", "<think>\nis it?\n</think>\n\nno")
    for source in (R1, PLAIN):
        assert examples(source, tmp_path, apart) == examples(source, tmp_path, inside)
    assert examples(PLAIN, tmp_path, apart)[0][1] == f"<think>\nis it?\n</think>\n\nno{EOS}"


RAW = "is it?\n</think>\n\nno"
"""As servers without a reasoning parser give what follows R1's prompt."""


def test_an_answer_that_only_closes_its_thought_has_it_where_the_prompt_opens_one(tmp_path):
    apart = examples(R1, tmp_path, said("hi", "no", reasoning_content="is it?"))
    for content in (RAW, "\n" + RAW, "is it?</think>no", f"<think>\n{RAW}", f"\n <think>\n{RAW}"):
        assert examples(R1, tmp_path, said("hi", content)) == apart
    assert apart[0][1] == f"is it?\n</think>\n\nno{EOS}"
    assert examples(R1, tmp_path, {"prompt": "hi", "completion": RAW}) == apart


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thought", ["is it?", "<think>\nis it?\n</think>\n"])
@pytest.mark.parametrize("content", ["no", RAW, f"<think>{RAW}"])
def test_a_thought_that_is_given_twice_or_with_its_tags_is_one(tmp_path, key, thought, content):
    apart = examples(R1, tmp_path, said("hi", "no", reasoning_content="is it?"))
    assert examples(R1, tmp_path, said("hi", content, **{key: thought})) == apart


def test_a_thought_that_is_given_as_empty_does_not_hide_one_in_the_content(tmp_path):
    apart = examples(R1, tmp_path, said("hi", "no", reasoning_content="is it?"))
    assert examples(R1, tmp_path, said("hi", RAW, reasoning_content="")) == apart


@pytest.mark.parametrize(
    ("source", "content", "given", "problem"),
    [
        (PLAIN, RAW, None, "has </think> without <think>"),
        (PLAIN, "<think>is it", None, "opens a thought that has no </think>"),
        (R1, "\n<think>is it", None, "opens a thought that has no </think>"),
        (R1, "Well. <think>is it?</think>no", None, "has more think tags"),
        (PLAIN, "Well. <think>is it?</think>no", None, "has more think tags"),
        (R1, "<think>a <think>b</think>c</think>no", None, "has more think tags"),
        (R1, "is it?</think>so</think>no", None, "has more think tags"),
        (R1, "<think>Is `</think>` a tag?</think>no", None, "has more think tags"),
        (R1, RAW, "another", "has reasoning_content, and another thought"),
        (R1, "<think>so</think>no", "another", "has reasoning_content, and another thought"),
        (R1, "is it?\n</think>\n", None, "has a thought and no content"),
        (R1, "", "is it?", "has a thought and no content"),
        (PLAIN, "<think>is it?</think>", None, "has a thought and no content"),
    ],
)
def test_an_answer_whose_thought_is_not_plain_is_named_with_its_line(
    tmp_path, source, content, given, problem
):
    record = said("hi", content) if given is None else said("hi", content, reasoning_content=given)
    with pytest.raises(UserError, match=rf"^here: message 2, the assistant's, {problem}"):
        examples(source, tmp_path, record)


def test_a_thought_that_a_message_opens_by_characters_is_refused_and_not_trained_so(tmp_path):
    written = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"message 2, .* ends with <think>, which is text there"):
        examples(written, tmp_path, {"prompt": "hi<think>\n", "completion": RAW})
    plain = train_tokenizer([""], 261)
    encoder = AnswerEncoder(make_chat_template(written, plain, tmp_path), plain, "all")
    row = {"prompt": "hi<think>\n", "completion": RAW}
    [example] = encoder.examples(read_conversation(row, "here"))
    assert plain.decode(example.tokens.tolist()) == f"hi<think>\n{RAW}{EOS}"


SWITCHED = PLAIN.replace(
    "<｜Assistant｜>{% endif %}",
    "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
)
"""As DeepSeek-V3.1's: no thought, unless it is told to think."""


def test_a_template_whose_prompt_ends_the_thought_is_told_to_think_for_an_answer_that_does(
    tmp_path,
):
    [(whole, trained)] = examples(SWITCHED, tmp_path, said("hi", "no"))
    assert (whole.endswith(f"<｜Assistant｜></think>{trained}"), trained) == (True, f"no{EOS}")
    for record in (said("hi", "no", reasoning_content="is it?"), said("hi", RAW)):
        [(whole, trained)] = examples(SWITCHED, tmp_path, record)
        assert trained == f"\nis it?\n</think>\n\nno{EOS}"
        assert whole.endswith(f"<｜Assistant｜><think>{trained}")
    never = SWITCHED.replace("{% if thinking %}", "{% if false %}")
    with pytest.raises(UserError, match="has a thought, and the template's prompt has ended it"):
        examples(never, tmp_path, said("hi", "no", reasoning_content="is it?"))


def test_tags_in_quotations_are_text_and_a_turn_that_is_not_trained_may_have_any(tmp_path):
    text = "A thought ends with `</think>`, and begins with '<think>'."
    assert examples(PLAIN, tmp_path, said("hi", text))[0][1] == text + EOS
    assert examples(R1, tmp_path, said("hi", text))[0][1] == f"\n</think>\n\n{text}{EOS}"
    inside = f"<think>so</think>{text}"
    assert examples(PLAIN, tmp_path, said("hi", inside))[0][1].endswith(f"</think>\n\n{text}{EOS}")
    record = said("hi", RAW, "stop?", "no")
    record["messages"][1]["trained"] = False
    assert examples(R1, tmp_path, record)[0][1] == f"\n</think>\n\nno{EOS}"


def test_a_thought_is_split_as_a_server_would_split_the_answer(tmp_path):
    """What is trained after the prompt is parsed again to the same thought and content."""
    for source in (R1, PLAIN):
        for thought, content in (
            ("is it?", "no"),
            ("", "no"),
            ("a\n\nb", "`</think>`"),
            ("中", " x"),
        ):
            record = said("hi", content, reasoning_content=thought)
            [(whole, trained)] = examples(source, tmp_path, record)
            prompt = whole.removesuffix(trained)
            assert split_thought(prompt, trained.removesuffix(EOS)) == (thought, content)


def test_a_tokenizer_without_tags_has_them_trained_as_text(tmp_path):
    plain = train_tokenizer([""], 261)
    encoder = AnswerEncoder(make_chat_template(PLAIN, plain, tmp_path), plain, "all")
    [example] = encoder.examples(read_conversation(said("hi", f"<think>{RAW}"), "here"))
    assert (encoder.thoughts, encoder.has_think_tokens) == (1, False)
    trained = plain.decode(example.tokens[example.trained].tolist())
    assert trained == f"<think>\nis it?\n</think>\n\nno{EOS}"


def test_an_answer_without_a_thought_closes_what_the_prompt_opened(tmp_path):
    assert examples(R1, tmp_path, said("hi", "hello"))[0][1] == f"\n</think>\n\nhello{EOS}"


def test_an_answer_that_no_token_of_the_template_ends_ends_with_eos(tmp_path):
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if \
add_generation_prompt %}assistant: {% endif %}"
    assert examples(words, tmp_path, said("hi", "hello"))[0][1] == f"hello{EOS}"


def test_a_template_that_changes_answers_is_refused(tmp_path):
    silent = "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(TemplateError, match="does not write an assistant's message"):
        AnswerEncoder(template(silent, tmp_path), TOKENS, "all")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "hi"}, "the keys are text; expected `messages`, or"),
        ({"prompt": "hi", "answer": "no"}, "the keys are answer, prompt; expected"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": "hi"}, "messages is a str"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is a int"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no answer of the assistant"),
        (said("hi", "no", trained=False), "no answer of the assistant"),
        (said("hi", "no", trained="no"), r"messages\[1\].trained is 'no'"),
        ({"prompt": "hi", "completion": 3}, "completion is a int"),
        (said("hi", "no", reasoning="a", thinking="b"), r"messages\[1\] has several thoughts"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_its_line(tmp_path, record, expected):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(said("hi", "no")) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"chats.jsonl:3: .*{expected}"):
        read_conversations([str(file)])


def test_every_format_holds_the_same_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [said("hi", "no"), said("hi", "no", "why?", "so", reasoning_content="is it?")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "chats.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chats.parquet")
    want = [read_conversation(record, "")[:2] for record in records]
    for name in ("chats.jsonl", "chats.json", "chats.parquet"):
        assert [one[:2] for one in read_conversations([str(tmp_path / name)])] == want
    (tmp_path / "chats.csv").write_text('prompt,response\nhi,"no, ""never"""\n')
    [one] = read_conversations([str(tmp_path / "chats.csv")])
    assert one[:2] == read_conversation({"prompt": "hi", "completion": 'no, "never"'}, "")[:2]


def test_copies_count_once_and_answers_to_one_question_stay_on_one_side(tmp_path):
    file = tmp_path / "chats.jsonl"
    records = [said(f"hi {n}", f"no {k}") for n in range(30) for k in range(3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, *records]))
    found = read_conversations([str(file)])
    assert len(found) == 90
    train, held_out = hold_out(found, 0.3)
    assert len(train) + len(held_out) == 90 and len(held_out) > 0
    assert not {one.question for one in train} & {one.question for one in held_out}
    with pytest.raises(UserError, match="holds out 0 of 90"):
        hold_out(found, 1e-9)
