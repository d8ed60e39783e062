"""Prompts of lm-evaluation-harness in a checkpoint's chat template, with or without a thought."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from dsjax.data.chat_template import ChatTemplate, TemplateError
from dsjax.data.thinking import begins_in_thought, close_thought
from dsjax.errors import UserError

WITHOUT_THOUGHT = "evaluate without thought (--no-think, enable_thinking=False) or without --chat"

Messages = Sequence[Mapping[str, Any]]


class ChatPrompts:
    """Render prompts, and refuse tasks that cannot be scored for a model that thinks.

    Args:
        template: the checkpoint's, if it has one.
        think: whether an answer begins with a thought; None: the template's default. It is passed
            to the template; if False, a thought that the prompt opens anyway is closed.

    Raises:
        UserError: the template has no thoughts to switch on.
    """

    def __init__(self, template: ChatTemplate | None, think: bool | None):
        if think and "think" not in (template.source if template else ""):
            raise UserError("enable_thinking (--think): the chat template has no thoughts")
        self._template = template
        self._think = think
        self._used = False

    def render(self, messages: Messages, begun: str = "") -> str:
        """The prompt for the answer to `messages`, of which `begun` stands there already.

        Raises:
            UserError: there is no template, it does not take them, or `begun` would stand in a
                thought.
        """
        self._used = True
        if begun and self.thinks:
            self._refuse_begun("a task", begun)
        try:
            prompt = self._render(messages, self._think)
        except TemplateError as error:
            raise UserError(str(error)) from None
        return (close_thought(prompt) if self._think is False else prompt) + begun

    def _render(self, messages: Messages, think: bool | None) -> str:
        if self._template is None:
            raise UserError("the checkpoint has no chat template; ask without one")
        if think is None:
            return self._template.render(messages)
        return self._template.with_thought(think).render(messages)

    @cached_property
    def thinks(self) -> bool:
        """Whether an answer begins with a thought: the prompt opens it, or a switch is on."""
        if self._think is not None or self._template is None:
            return bool(self._think)
        question = [{"role": "user", "content": "Hello"}]
        try:
            prompt, without = (self._render(question, think) for think in (None, False))
        except TemplateError:  # what tasks ask it may take
            return False
        return begins_in_thought(prompt) or prompt != without

    def thinks_after(self, context: str) -> bool:
        """Whether the model thinks after a prompt, which may be none of the template's."""
        return begins_in_thought(context) or (self._used and self.thinks)

    def check(self, tasks: Iterable[Any]) -> None:
        """Check that tasks can be scored in the template, before any runs.

        Raises:
            UserError: the model thinks, and one has no place for it.
        """
        for task in tasks if self.thinks else ():
            if task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
                self.refuse_likelihood(task.task_name)
            if begun := getattr(task.config, "gen_prefix", None):
                self._refuse_begun(task.task_name, begun)

    def refuse_likelihood(self, task: str | None) -> NoReturn:
        """Say why log-likelihoods are none of a model that thinks."""
        raise UserError(
            f"{task or 'a task'}: compares log-likelihoods of answers right after the prompt, "
            f"where this model begins to think; choose a task that generates, or {WITHOUT_THOUGHT}"
        )

    def _refuse_begun(self, task: str, begun: str) -> NoReturn:
        raise UserError(
            f"{task}: begins the answer by itself, with {begun[:40]!r}, which would stand in the "
            f"thought; {WITHOUT_THOUGHT}"
        )
