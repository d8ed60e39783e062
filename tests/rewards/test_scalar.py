"""A reward model's values: the head times the last hidden state, whatever else is in the batch."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import dsjax
from dsjax.config_rewards import ModelReward
from dsjax.errors import UserError
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Scorer
from tests.serving.checkpoints import write_checkpoint

HIDDEN = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("reward") / "model")
    head = np.random.default_rng(0).normal(size=(1, HIDDEN)).astype(np.float32)
    save_file({"weight": head}, folder / "reward_head.safetensors")
    return folder


@pytest.mark.slow
def test_a_value_is_the_head_times_the_last_hidden_state(folder: Path):
    texts = ["xxxx", "x", "1xx1"]
    answers = [Answer("the assistant", text, 9, text == "x", {}) for text in texts]
    with Scorer([ModelReward(checkpoint=str(folder), batch_size=2)]) as scorer:
        found = [score.total for score in scorer.score(answers)]
        assert scorer.score([]) == []

    hidden = jax.jit(lambda model, tokens: model(tokens).hidden)
    model, tokenizer = dsjax.load(folder), dsjax.load_tokenizer(folder)
    head = np.fromfile(folder / "reward_head.safetensors", np.float32)[-HIDDEN:]
    expected = []
    for answer in answers:
        tokens = tokenizer.encode(answer.prompt + answer.text)
        tokens += [] if answer.truncated else [tokenizer.eos_id]
        expected.append(np.asarray(hidden(model, np.asarray([tokens], np.int32)))[0, -1] @ head)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(found) > 0.1


def test_a_head_that_is_missing_or_does_not_fit_is_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"reward_head.safetensors: no such file; it holds"):
        Scorer([ModelReward(checkpoint=str(tmp_path))])
    for name, size in (("weight", HIDDEN + 1), ("score.weight", HIDDEN)):
        wrong = tmp_path / name
        wrong.mkdir()
        for file in folder.iterdir():
            (wrong / file.name).symlink_to(file)
        (wrong / "reward_head.safetensors").unlink()
        save_file({name: np.zeros((1, size), np.float32)}, wrong / "reward_head.safetensors")
        with pytest.raises(UserError, match=rf"expected one tensor 'weight' \(1, {HIDDEN}\)"):
            Scorer([ModelReward(checkpoint=str(wrong))])
