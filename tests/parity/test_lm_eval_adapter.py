"""lm-evaluation-harness gives the same numbers through our adapter as through its own `hf`.

One small model of transformers, saved as a folder; a task of each type, from YAML and JSON written
here. Values of each document are compared, not only their means.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from dsjax import cli
from dsjax.data.tokenizer import BOS, train_tokenizer
from dsjax.errors import UserError
from dsjax.evaluation.harness import HarnessModel
from tests.serving.checkpoints import TEMPLATE, TEXT

from .models import CASES, make_model

# The harness looks at its own repository, by a process of git's: nothing of jax is in it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

LENGTH = 60
"""Of windows: the longest document has several."""


def _metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


DOCUMENTS = [TEXT[cut:] + TEXT[:cut] for cut in range(0, 80, 9)]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 1,
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [_metric("perplexity", "perplexity"), _metric("acc")],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity"),
            _metric("bits_per_byte", "bits_per_byte"),
        ],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        # No stop string may stand in a special token's name: `hf` would stop there, and show none.
        "generation_kwargs": {"until": ["\n", "u"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [_metric("exact_match")],
    },
}


def write_tasks(folder: Path) -> Path:
    """YAML files, and the JSON that they read."""
    rows = [
        {
            "question": text[:40],
            "choices": [text[40:43], "return", " user asks", "0 1 2"],
            "answer": number % 4,
            "text": text * (1 + number % 3),
        }
        for number, text in enumerate(DOCUMENTS)
    ]
    folder.mkdir()
    data = folder / "documents.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test",
              "dataset_kwargs": {"data_files": {"test": str(data)}}}  # fmt: skip
    for name, task in TASKS.items():
        written = {"task": f"parity_{name}", **shared, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(written))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def write_model(folder: Path, add_bos: bool) -> Path:
    """A model of transformers with a tokenizer of ours, as `transformers` wants it."""
    tokenizer = train_tokenizer([TEXT * 20], 300)
    kind, make_config = next(iter(CASES.values()))
    config = make_config()
    config.vocab_size = tokenizer.vocab_size
    config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    make_model(kind, config, 0).save_pretrained(folder)
    if add_bos:
        ends = [(BOS, tokenizer.bos_id)]
        tokenizer._backend.post_processor = TemplateProcessing(f"{BOS} $A", None, ends)
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text()) | {"add_bos_token": add_bos}
    file.write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def open_both(folder: Path) -> tuple[HFLM, HarnessModel]:
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=LENGTH,
                  batch_size=4)  # fmt: skip
    return theirs, HarnessModel(str(folder), rows=2, max_length=LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), add_bos=True)


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[HFLM, HarnessModel]:
    return open_both(folder)


def evaluate(model: Any, tasks: Path, name: str, **options: Any) -> Any:
    manager = TaskManager(include_path=str(tasks))
    return simple_evaluate(
        model, tasks=[f"parity_{name}"], bootstrap_iters=0, task_manager=manager, **options
    )


def answers(found: Any) -> list[Any]:
    [samples] = found["samples"].values()
    return [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("name", TASKS)
def test_the_numbers_are_those_of_hf(
    models: tuple[HFLM, HarnessModel], tasks: Path, name: str, chat: bool
) -> None:
    theirs, ours = (evaluate(m, tasks, name, apply_chat_template=chat) for m in models)
    assert len(answers(ours)) == len(DOCUMENTS)
    if name == "generate":
        assert answers(ours) == answers(theirs)
        texts = [text for [text] in answers(ours)]
        assert len(set(texts)) > 3 and {"\n", "u"}.isdisjoint("".join(texts))
    else:
        values, theirs_values = (np.array(answers(f), float) for f in (ours, theirs))
        gap = np.abs(values - theirs_values).max()
        print(f"\n  {name}: {values.size} numbers, largest difference {gap:.1e}")
        assert gap < 2e-4
        assert np.ptp(theirs_values[..., 0]) > 1  # there is something to tell apart
    [numbers], [expected] = (list(found["results"].values()) for found in (ours, theirs))
    for metric, value in expected.items():
        if isinstance(value, float):
            assert numbers[metric] == pytest.approx(value, rel=1e-5), metric


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokens_are_those_of_hf(tmp_path: Path, add_bos: bool) -> None:
    theirs, ours = open_both(write_model(tmp_path, add_bos))
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in (TEXT, BOS + TEXT, "", " a", f"a{BOS}b"):
        for added in (None, False):
            assert ours.tok_encode(text, added) == theirs.tok_encode(text, added)
    assert (ours.tok_encode(TEXT)[0] == ours.prefix_token_id) is add_bos


def test_prompts_of_a_chat_are_those_of_hf(models: tuple[HFLM, HarnessModel]) -> None:
    chat = [{"role": "user", "content": "self"}, {"role": "assistant", "content": "return"}]
    theirs, ours = models
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    prompt = ours.apply_chat_template(chat[:1])
    assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)
    assert ours.apply_chat_template(chat, add_generation_prompt=False) == prompt + "return"


def test_sampling_repeats_and_samples_differ(models: tuple[HFLM, HarnessModel]) -> None:
    from lm_eval.api.instance import Instance

    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = [Instance("generate_until", {}, ("self", options), n) for n in range(3)]
    first, second = (models[1].generate_until(asked) for _ in range(2))
    assert first == second and len(set(first)) == 3
    with pytest.raises(UserError, match="num_beams=4, which is not known"):
        models[1].generate_until([Instance("generate_until", {}, ("a", {"num_beams": 4}), 0)])


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dsjax", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_verb_runs_tasks_of_the_harness(
    models: tuple[HFLM, HarnessModel],
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = call(monkeypatch, folder, "--tasks", "harness:parity_choice", "--include", tasks,
                "--output", tmp_path, "--context", LENGTH + 2)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "harness.json").read_text())["results"]["parity_choice"]
    expected = evaluate(models[0], tasks, "choice")["results"]["parity_choice"]
    assert written["acc_norm,none"] == expected["acc_norm,none"]
    assert "parity_choice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["harness:none"], "harness:none: lm-evaluation-harness knows no such task"),
        (["harness:parity_choice", "letters"], "in a call of their own"),
        (["harness:parity_choice", "--context", "9999"], "max_length is 9997; expected 1 to 254"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str],
    problem: str,
) -> None:  # fmt: skip
    code = call(monkeypatch, folder, "--tasks", *arguments, "--include", tasks)
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and complaint.startswith("error: ") and problem in complaint
