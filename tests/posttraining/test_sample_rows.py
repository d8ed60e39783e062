"""How kept answers are written, with their provenance; which prompts are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from dsjax.checkpoint.manifest import write_manifest
from dsjax.config_files import CONFIGS, load_sample_config
from dsjax.data.answers import AnswerEncoder
from dsjax.data.chat_template import read_template_file
from dsjax.data.conversations import read_conversations
from dsjax.data.language import read_language
from dsjax.posttraining.sample_rows import origin_of
from tests.evaluation.stand_ins import ScriptedEngine
from tests.posttraining.sampled import checkpoint as checkpoint
from tests.posttraining.sampled import lines, says, write_config, write_prompts
from tests.posttraining.sampled import run as run


def test_messages_get_the_answer_behind_them_and_its_thought_beside_it(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    said = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    write_prompts(tmp_path, {"prompt": said, "answer": "4"})
    texts = ("<think>\nTwice two.\n</think>\n\n4", "4", "<think></think>\nfour")
    engine = ScriptedEngine(says(checkpoint, *texts))
    rows = lines(run(engine, "sampling.max_tokens=99", "filters=[]") / "sft.jsonl")
    earlier = [said[0], said[1] | {"trained": False}, said[2]]
    answer = {"role": "assistant", "content": "4"}
    expected = [answer | {"reasoning_content": "Twice two."}, answer, answer | {"content": "four"}]
    assert [row["messages"] for row in rows] == [[*earlier, each] for each in expected]


def test_texts_are_written_as_they_were_read_and_drawn(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "2+2", "answer": "4"})
    prompts = {"path": str(tmp_path / "prompts.jsonl"), "template": "Q: {prompt}\nA:"}
    texts = (" 4\n", "5", "6")
    folder = run(ScriptedEngine(says(checkpoint, *texts)), prompts=prompts)
    [row] = lines(folder / "sft.jsonl")
    assert (row["prompt"], row["completion"]) == ("Q: 2+2\nA:", " 4\n")


def test_every_row_says_where_it_comes_from(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "1?", "answer": "no"}, {"prompt": "2?", "answer": "4"})
    engine = ScriptedEngine(says(checkpoint, "4", "4 ", "5"))
    rewards = [{"name": "exact"}, {"name": "length", "limit": 20, "margin": 10, "weight": 0.5}]
    folder = run(engine, "sampling.temperature=0.7", rewards=rewards)
    [row] = lines(folder / "sft.jsonl")
    found = row["provenance"]
    digests = {name: found.pop(name) for name in ("weights", "prompt_digest", "dsjax")}
    assert all(digests.values())
    seeds = {request.id: request.sampling.seed for request in engine.submitted}
    assert len(set(seeds.values())) == 6
    assert found == {
        "checkpoint": str(checkpoint),
        "step": None,
        "manifest": None,
        "prompts": str(tmp_path / "prompts.jsonl"),
        "sampling": {"max_tokens": 24, "temperature": 0.7, "top_p": 1.0, "top_k": 0},
        "prompt": 1,
        "sample": 0,
        "seed": seeds["1/0"],
        "rewards": {"exact": 1.0, "length": 0.0},
    }
    assert lines(folder / "answers.jsonl")[3]["reward"] == 1.0


def test_a_row_from_a_run_names_the_step_and_the_digest_of_all_its_files(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints/00000007"
    step.mkdir(parents=True)
    (step / "extra.json").write_text("{}")
    write_manifest(step, 7, {})
    config = load_sample_config(write_config(tmp_path, tmp_path))
    found = origin_of(config, tmp_path, "stamp")
    digest = hashlib.sha256((step / "manifest.json").read_bytes()).hexdigest()
    assert (found["step"], found["manifest"]) == (7, digest)


def test_the_first_answers_of_many_are_those_of_few(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """So that unfiltered data to compare with needs one answer to each prompt, the same as here."""
    write_prompts(tmp_path, *({"prompt": f"{n}?", "answer": "x"} for n in range(5)))
    many = lines(run(ScriptedEngine(), f"output={tmp_path / 'many'}") / "answers.jsonl")
    one = run(ScriptedEngine(), "sampling.k=1", "filters=[]", f"output={tmp_path / 'one'}")
    firsts = [row["text"] for row in many if row["sample"] == 0]
    assert [row["completion"] for row in lines(one / "sft.jsonl")] == firsts


def test_held_out_prompts_are_left_out_and_a_limit_takes_some_of_the_rest(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = {"path": "comparison", "held_out_fraction": 0.5}
    found = []
    for seed in (0, 1):
        engine = ScriptedEngine(lambda request: [50])
        overrides = (f"output={tmp_path / str(seed)}", f"seed={seed}", "limit=40", "filters=[]")
        rows = lines(run(engine, *overrides, prompts=prompts) / "sft.jsonl")
        found.append({row["prompt"] for row in rows})
        assert len(found[-1]) == 40
    assert not found[0] & found[1]


def test_supervised_tuning_reads_a_text_token_for_token_as_it_was_drawn(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "2+2=", "answer": "4"})
    run(ScriptedEngine(says(checkpoint, "4", "5", "6")))
    language = read_language(str(checkpoint))
    template = read_template_file(CONFIGS / "as-written.jinja", language.tokenizer)
    encoder = AnswerEncoder(template, language.tokenizer, "all")
    [conversation] = read_conversations([str(tmp_path / "out/sft.jsonl")])
    [example] = encoder.examples(conversation)
    asked = language.text("2+2=")
    answer = [*language.tokenizer.encode("4"), language.tokenizer.eos_id]
    assert example.tokens.tolist() == [*asked, *answer]
    assert example.trained.tolist() == [False] * len(asked) + [True] * len(answer)
