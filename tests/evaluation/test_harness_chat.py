"""Chats with models that think, as lm-evaluation-harness asks them; it is not needed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dsjax.data.text import TextStream
from dsjax.data.thinking import ThoughtfulSpeech
from dsjax.errors import UserError
from dsjax.evaluation.harness_chat import ChatPrompts
from dsjax.evaluation.harness_requests import Content
from dsjax.evaluation.settings import HarnessSettings, Settings
from dsjax.inference.request import Update
from tests.data.spoken import ids, template, tokenizer

ASKED = "<｜User｜>{{ messages[0].content }}<｜Assistant｜>"
TEMPLATES = {
    "plain": ASKED,
    "opens": ASKED + "{{ '<think>\\n' }}",
    # As Qwen3's: the model opens the thought, unless it is switched off.
    "switched": ASKED
    + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    # As DeepSeek-V3.1's: no thought, unless it is switched on.
    "closes": ASKED + "{% if thinking %}<think>{% else %}</think>{% endif %}",
}
QUESTION = [{"role": "user", "content": "6*7?"}]


def prompts(name: str, think: bool | None = None) -> ChatPrompts:
    return ChatPrompts(template(TEMPLATES[name]), think)


@pytest.mark.parametrize(
    ("name", "think", "ends", "thinks"),
    [
        ("plain", None, "<｜Assistant｜>", False),
        ("plain", False, "<｜Assistant｜>", False),
        ("opens", None, "<｜Assistant｜><think>\n", True),
        ("opens", True, "<｜Assistant｜><think>\n", True),
        ("opens", False, "<｜Assistant｜><think>\n\n</think>\n\n", False),
        ("switched", None, "<｜Assistant｜>", True),
        ("switched", True, "<｜Assistant｜>", True),
        ("switched", False, "<｜Assistant｜><think>\n\n</think>\n\n", False),
        ("closes", None, "<｜Assistant｜></think>", False),
        ("closes", True, "<｜Assistant｜><think>", True),
        ("closes", False, "<｜Assistant｜></think>", False),
    ],
)
def test_whether_to_think_is_the_templates_or_what_is_asked_for(
    name: str, think: bool | None, ends: str, thinks: bool
) -> None:
    chat = prompts(name, think)
    assert not chat.thinks_after("6*7?"), "a prompt without the template"
    assert chat.render(QUESTION).endswith(ends)
    assert chat.thinks is thinks is chat.thinks_after("6*7?")


def test_a_beginning_of_the_answer_follows_the_thought_or_has_no_place() -> None:
    assert prompts("plain").render(QUESTION, "It is").endswith("<｜Assistant｜>It is")
    assert prompts("opens", False).render(QUESTION, "It is").endswith("</think>\n\nIt is")
    for name in ("opens", "switched"):
        with pytest.raises(UserError, match="begins the answer by itself, with 'It is'"):
            prompts(name).render(QUESTION, "It is")


@pytest.mark.parametrize(
    ("kind", "begun", "problem"),
    [
        ("multiple_choice", None, "a_task: compares log-likelihoods .*--no-think"),
        ("loglikelihood", None, "a_task: compares log-likelihoods"),
        ("generate_until", "It is", "a_task: begins the answer by itself, with 'It is'"),
        ("generate_until", None, None),
        ("loglikelihood_rolling", None, None),
    ],
)
def test_a_task_without_a_place_for_the_thought_is_refused(
    kind: str, begun: str | None, problem: str | None
) -> None:
    config = SimpleNamespace(gen_prefix=begun)
    task = SimpleNamespace(OUTPUT_TYPE=kind, config=config, task_name="a_task")
    for chat in (prompts("plain"), prompts("opens", False), prompts("closes")):
        chat.check([task])
    for chat in (prompts("opens"), prompts("switched"), prompts("closes", True)):
        if problem is None:
            chat.check([task])
            continue
        with pytest.raises(UserError, match=problem):
            chat.check([task])


def test_a_switch_that_the_template_does_not_have_and_no_template_are_refused() -> None:
    with pytest.raises(UserError, match="the chat template has no thoughts"):
        prompts("plain", True)
    with pytest.raises(UserError, match="the chat template has no thoughts"):
        ChatPrompts(None, True)
    with pytest.raises(UserError, match="has no chat template"):
        ChatPrompts(None, None).render(QUESTION)
    assert not ChatPrompts(None, None).thinks
    with pytest.raises(UserError, match="has no user"):
        ChatPrompts(template("{{ raise_exception('has no user') }}"), None).render(QUESTION)


@pytest.mark.parametrize(
    ("said", "until", "content", "finished"),
    [
        ("a. 42\n\n</think>\n\n42. So", ["."], "42", True),
        ("a. 42\n\n</think>\n\n42\n\nSo", ["\n\n"], "42", True),
        ("a. 42\n\n", ["."], "", False),
        ("a</think>", ["."], "", True),
    ],
)
def test_the_content_up_to_a_stop_string_in_it_is_collected(
    said: str, until: list[str], content: str, finished: bool
) -> None:
    found = Content(ThoughtfulSpeech(TextStream(tokenizer()), until, opened=True))
    stopped = any(found.take(Update("x", (token,))) for token in ids(said))
    assert stopped is bool(content)
    if not stopped:
        found.take(Update("x", (), "stop"))
    assert found.result() == (content, finished)


def test_settings_change_the_tasks_own_only_where_they_are_given_or_the_model_thinks() -> None:
    assert HarnessSettings().gen_kwargs(False) == {}
    given = HarnessSettings(temperature=0, max_tokens=9).gen_kwargs(False)
    assert given == {"max_gen_toks": 9, "temperature": 0, "do_sample": False}
    protocol: dict[str, Any] = {
        "max_gen_toks": Settings.max_tokens, "temperature": 0.6, "top_p": 0.95, "do_sample": True,
    }  # fmt: skip
    assert HarnessSettings(chat=True).gen_kwargs(True) == protocol
    changed = HarnessSettings(chat=True, max_tokens=9).gen_kwargs(True)
    assert changed == {**protocol, "max_gen_toks": 9}
