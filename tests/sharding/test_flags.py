"""XLA is told what helps on an accelerator, and what the user says comes before it."""

import os

import pytest

from sharding.flags import FLAGS, set_flags


@pytest.mark.parametrize("accelerator", ["v5p", "v5p-1024"])
def test_a_generation_has_its_flags_and_the_user_has_the_last_word(monkeypatch, accelerator):
    mine = {"xla_tpu_enable_async_ragged_all_to_all": "false", "xla_other": "1"}
    asked = [f"--{flag}={value}" for flag, value in mine.items()]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", " ".join(asked))

    set_flags(accelerator)
    words = os.environ["LIBTPU_INIT_ARGS"].split()
    assert words[-2:] == asked
    found = dict(word.removeprefix("--").split("=") for word in words)
    assert found == FLAGS["v5p"] | {
        "xla_tpu_enable_async_ragged_all_to_all": "false",
        "xla_other": "1",
    }
    set_flags(accelerator)
    assert os.environ["LIBTPU_INIT_ARGS"].split() == words


@pytest.mark.parametrize("accelerator", ["", "v5litepod-16", "a GPU"])
def test_others_are_left_alone(monkeypatch, accelerator):

    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    set_flags(accelerator)
    assert "LIBTPU_INIT_ARGS" not in os.environ
