"""Chat templates render as transformers renders them, or both refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dsjax.data.chat_template import ChatTemplate, TemplateError, read_chat_template
from dsjax.data.tokenizer import BOS, EOS, load_tokenizer
from dsjax.errors import UserError
from tests.data.spoken import tokenizer

from .chat_templates import CONVERSATIONS, TEMPLATES

NAMES = {"bos_token": BOS, "eos_token": EOS}
REFUSED = "refused"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rendered_by_us(source: str, conversation: dict[str, Any]) -> tuple[str, str]:
    """The text, or that it was refused; and why."""
    given = dict(conversation)
    prompting = given.pop("add_generation_prompt", False)
    try:
        template = ChatTemplate(source, tokenizer(), NAMES)
        return template.render(given.pop("messages"), prompting=prompting, **given), ""
    except (TemplateError, UserError) as error:
        return REFUSED, str(error)


def rendered_by_them(
    theirs: PreTrainedTokenizerFast, source: str, conversation: dict[str, Any]
) -> tuple[str, str]:
    given = dict(conversation)
    try:
        text = theirs.apply_chat_template(
            given.pop("messages"), chat_template=source, tokenize=False, **given
        )
    except Exception as error:  # jinja's, and those of Python that a template ran into
        return REFUSED, str(error)
    assert isinstance(text, str)
    return text, ""


def test_every_template_renders_every_conversation_as_in_transformers(theirs, capsys):
    refused, wrong = 0, []
    for name, source in TEMPLATES.items():
        for about, conversation in CONVERSATIONS.items():
            expected, why = rendered_by_them(theirs, source, conversation)
            found, ours = rendered_by_us(source, conversation)
            if found != expected:
                wrong.append(
                    f"{name}, {about}: {found[:300]!r} {ours}; expected {expected[:300]!r} {why}"
                )
            elif found == REFUSED:
                refused += 1
                said = " ".join(why.split())
                if "raise_exception" in source and said.startswith("Roles"):
                    assert said in ours  # what the template says is shown
    count = len(TEMPLATES) * len(CONVERSATIONS)
    with capsys.disabled():
        print(f"\n{len(TEMPLATES)} templates, {count} renderings: {refused} refused by both, "
              f"{len(wrong)} differ")  # fmt: skip
    assert not wrong, "\n".join(wrong)


SHOW = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ image_token }}|"
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "in the config": ({"chat_template": SHOW}, {}),
    "a file": ({"chat_template": "no"}, {"chat_template.jinja": SHOW}),
    "a list": (
        {"chat_template": [{"name": n, "template": n} for n in ("rag", "default", "tool_use")]},
        {},
    ),
    "a file and more": (
        {"chat_template": "no"},
        {"chat_template.jinja": SHOW, "additional_chat_templates/rag.jinja": "rag"},
    ),
    "only more": ({}, {"additional_chat_templates/default.jinja": "d"}),
    "without bos": ({"bos_token": None, "chat_template": SHOW}, {}),
    "more names": ({"chat_template": SHOW, "image_token": "<img>", "pad_token": EOS}, {}),
    "none called default": ({"chat_template": [{"name": "rag", "template": "r"}]}, {}),
    "of a processor": ({"chat_template": "c"}, {"chat_template.json": '{"chat_template": "p"}'}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, name: str) -> None:
    config, files = FOLDERS[name]
    tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    for file_name, text in files.items():
        (tmp_path / file_name).parent.mkdir(exist_ok=True)
        (tmp_path / file_name).write_text(text)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a"}]
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False)
    except ValueError:
        with pytest.raises(UserError, match="none called default"):
            read_chat_template(tmp_path, load_tokenizer(tmp_path))
        return
    found = read_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert found is not None and found.render(messages, prompting=False) == expected
