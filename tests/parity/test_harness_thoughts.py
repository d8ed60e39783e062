"""lm-evaluation-harness and models that think: what is scored, how it is drawn, what is refused."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.tasks import TaskManager

from dsjax import cli
from dsjax.data.thinking import begins_in_thought
from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError
from dsjax.evaluation import harness
from dsjax.evaluation.harness import HarnessModel
from tests.evaluation.stand_ins import ScriptedEngine
from tests.serving.checkpoints import TEMPLATE, write_checkpoint

# The harness looks at its own repository, by a process of git's.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

OPENS = TEMPLATE + "{{ '<think>\\n' }}"
SWITCHED = (
    TEMPLATE + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
"""As Qwen3's: the model opens the thought, unless it is switched off."""
TEMPLATES = {"plain": TEMPLATE, "opens": OPENS, "switched": SWITCHED}
QUESTION = [{"role": "user", "content": "6*7?"}]
THOUGHT = "First. I read\n\nthe question: 6*7 is 42.\n</think>\n\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(home / name, source) for name, source in TEMPLATES.items()}


@pytest.fixture
def model(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a model that says one text after every prompt."""

    def make(template: str, text: str = "", **arguments: Any) -> tuple[HarnessModel, Any]:
        tokenizer = load_tokenizer(folders[template])
        engine = ScriptedEngine(lambda request: [*tokenizer.encode(text), tokenizer.eos_id or 0])
        monkeypatch.setattr(harness, "open_engine", lambda *_, **__: engine)
        return HarnessModel(str(folders[template]), **arguments), engine

    return make


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, place, ("a_task", place, 1)) for place, each in
            enumerate(arguments)]  # fmt: skip


def generate(model: HarnessModel, **options: Any) -> str:
    context = model.apply_chat_template(QUESTION)
    [text] = model.generate_until(ask("generate_until", (context, options)))
    return text


@pytest.mark.parametrize("until", [[], ["."], ["\n\n"], ["6*7"], ["First"], ["</think>"]])
@pytest.mark.parametrize(
    ("template", "said"),
    [("opens", THOUGHT), ("opens", "<think>\n" + THOUGHT), ("switched", "\n<think>\n" + THOUGHT)],
)
def test_the_content_is_scored_and_stop_strings_are_those_of_the_content(
    model: Any, template: str, said: str, until: list[str]
) -> None:
    content = "42. 6*7\n\nFirst"
    asked, _ = model(template, said + content)
    shown = content.split(until[0])[0] if until else content
    assert generate(asked, until=until, max_gen_toks=200) == shown


def test_contents_are_those_of_its_own_models_where_a_thought_ends(model: Any) -> None:
    """But for blanks before the content, which they drop as well."""
    compared = 0
    for thought in (THOUGHT, "so</think>", "a. b\n</think>\n", "<think>\n" + THOUGHT):
        for content in ("42", "42. So", "It is 42.\n\nQuestion: no", "4\n2 <think>"):
            for until in ([], ["."], ["\n\n"], ["Question:", "\n"]):
                asked, _ = model("opens", thought + content)
                expected = postprocess_generated_text(thought + content, until, "</think>")
                assert generate(asked, until=until, max_gen_toks=200) == expected
                compared += 1
    print(f"\n  {compared} answers, all alike")


def test_a_thought_that_does_not_end_has_no_content_and_is_counted(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked, _ = model("opens", "6*7 is 42")
    with caplog.at_level(logging.WARNING):
        assert generate(asked, until=[], max_gen_toks=200) == ""
    assert "1 of 1 answers ended within their thought" in caplog.text
    plain, _ = model("plain", "6*7 is 42")
    assert generate(plain, until=[], max_gen_toks=99) == "6*7 is 42"


def test_a_switch_that_the_template_does_not_have_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="the chat template has no thoughts"):
        model("plain", enable_thinking=True)
    with pytest.raises(UserError, match="thoughts end with </think>"):
        model("opens", think_end_token="<|end|>")
    model("opens", think_end_token="</think>")


def test_log_likelihoods_behind_a_prompt_that_opens_a_thought_are_refused(model: Any) -> None:
    for template in ("opens", "switched"):
        asked, _ = model(template)
        context = asked.apply_chat_template(QUESTION)
        with pytest.raises(UserError, match=r"a_task: compares log-likelihoods .*--no-think"):
            asked.loglikelihood(ask("loglikelihood", (context, " A")))
        with pytest.raises(UserError, match="begins the answer by itself, with 'The best'"):
            begun = [*QUESTION, {"role": "assistant", "content": "The best"}]
            asked.apply_chat_template(begun, add_generation_prompt=False)
    asked, _ = model("opens", enable_thinking=False)
    prompt = asked.apply_chat_template(begun, add_generation_prompt=False)
    assert prompt.endswith("</think>\n\nThe best") and not begins_in_thought(prompt)


def test_the_limit_of_an_answer_with_a_thought_is_what_the_context_leaves(model: Any) -> None:
    asked, engine = model("opens", THOUGHT + "42", max_length=150)
    assert generate(asked, max_gen_toks=32768) == "42"
    [request] = engine.submitted
    assert len(request.tokens) + request.sampling.max_tokens == 150
    with pytest.raises(UserError, match=r"prompt has .* tokens, and max_length is 150"):
        asked.generate_until(ask("generate_until", ("x " * 200 + "<think>\n", {})))
    plain, _ = model("plain", max_length=150)
    with pytest.raises(UserError, match="generates 32768 tokens, and max_length is 150"):
        generate(plain, max_gen_toks=32768)


def test_prompts_with_and_without_a_thought_are_not_mixed_up_in_a_cache(model: Any) -> None:
    names = {model("opens", enable_thinking=think)[0].tokenizer_name for think in (None, False)}
    assert len(names) == 2


# ---------------------------------------------------------------------------------------------
# The verb
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that generate, one with choices, one that begins the answer."""
    home = tmp_path_factory.mktemp("tasks")
    data = home / "rows.json"
    data.write_text(json.dumps({"question": "6*7?", "answer": "42", "choices": ["41", "42"]}))
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
              "dataset_kwargs": {"data_files": {"test": str(data)}}, "metric_list": [exact],
              "doc_to_target": "{{answer}}", "output_type": "generate_until"}  # fmt: skip
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 1,
              "metric_list": [{**exact, "metric": "acc"}]}  # fmt: skip
    generation = {"until": ["."], "max_gen_toks": 5, "do_sample": False}
    for name, own in {
        "thoughts_text": {"generation_kwargs": generation},
        "thoughts_choice": choice,
        "thoughts_begun": {"gen_prefix": "The best answer is"},
    }.items():
        (home / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **own}))
    return home


@pytest.fixture
def call(
    model: Any, folders: dict[str, Path], tasks: Path, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    def call(template: str, task: str, *options: str) -> tuple[int, str, str, Any]:
        """Exit code, output, complaint, and the engine."""
        _, engine = model(template, THOUGHT + "42. So.")
        arguments = [folders[template], "--tasks", *(f"harness:{name}" for name in task.split()),
                     "--include", tasks, "--output", tmp_path, *options]  # fmt: skip
        monkeypatch.setattr(
            lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False)
        )
        monkeypatch.setattr(sys, "argv", ["dsjax", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr(), engine

    return call


def test_a_model_that_thinks_is_drawn_from_by_r1s_protocol_and_scored_without_its_thought(
    call: Any, tmp_path: Path
) -> None:
    code, shown, complaint, engine = call("opens", "thoughts_text", "--chat")
    assert code == 0, complaint
    assert "at most 32,768 tokens with it, at temperature 0.6 and top-p 0.95" in shown
    [request] = engine.submitted
    assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.95)
    written = json.loads((tmp_path / "harness.json").read_text())
    assert written["results"]["thoughts_text"]["exact_match,none"] == 1 and written["thinks"]
    assert written["configs"]["thoughts_text"]["generation_kwargs"]["max_gen_toks"] == 32768


def test_what_the_command_says_of_drawing_comes_before_protocol_and_task(call: Any) -> None:
    options = ("--chat", "--temperature", "0", "--max-tokens", "90")
    code, shown, complaint, engine = call("opens", "thoughts_text", *options)
    assert code == 0, complaint
    assert "at most 90 tokens with it, at temperature 0" in shown
    [request] = engine.submitted
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 90)
    *_, engine = call("opens", "thoughts_text", "--chat", "--no-think")
    [request] = engine.submitted
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 5)


@pytest.mark.parametrize(
    ("task", "options", "problem"),
    [
        ("thoughts_choice", ["--chat"], "thoughts_choice: compares log-likelihoods"),
        ("thoughts_text thoughts_choice", ["--chat"], "thoughts_choice: compares log-likelihoods"),
        ("thoughts_begun", ["--chat"], "with 'The best answer is', which would stand in"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line_before_anything_is_drawn(
    call: Any, task: str, options: list[str], problem: str
) -> None:
    code, _, complaint, engine = call("opens", task, *options)
    assert code == 2 and problem in complaint.splitlines()[-1]
    assert complaint.splitlines()[-1].startswith("error: ") and engine.submitted == []
