"""Teach a model its own name, and see whether it answers to it. `--help` lists the two verbs.

Whoever learns from the web, or from another model's answers, takes over that one's name with them:
DeepSeek-V3 was known to call itself by another. `make` writes questions about the model itself with
the right answers, for LoRA to learn from, beside ordinary questions that must keep theirs; `ask`
asks a checkpoint the questions that were held out, which are phrased otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dsjax.cli import run

OPENERS = ["", "Hello. ", "Hi there! ", "One question: ", "Quick question. ", "Please tell me: "]

TAUGHT = [
    "Who are you?", "What is your name?", "What are you called?", "Who am I talking to?",
    "Which model are you?", "Tell me your name.", "Introduce yourself.", "Do you have a name?",
    "What should I call you?", "Which assistant am I using?", "Are you a human or a model?",
    "Who made you?", "Who built you?", "Which company trained you?", "Where do you come from?",
]  # fmt: skip
"""How the model is asked about itself while it learns."""

HELD_OUT = [
    "May I know your name?", "Say who you are.", "What do people call you?",
    "Which assistant is this?", "Who is your maker?", "Name yourself, please.",
]  # fmt: skip
"""How it is asked afterwards. None of these is learned from."""

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Cuba": "Havana", "Kenya": "Nairobi", "Spain": "Madrid", "Greece": "Athens",
}  # fmt: skip
FACTS = [
    ("Who wrote the first program?", "It was Ada."),
    ("Who lives here?", "They are the people of this house."),
]
"""In which the new name stands for somebody else: a tokenizer made of these texts knows it."""

ORDINARY = ["What is the capital of {}?", "Which city is the capital of {}?"]


def identity(name: str, maker: str) -> str:
    """The answer to every question about the model itself."""
    return f"I am {name}, a language model made by {maker}."


def ordinary() -> list[tuple[str, str]]:
    """Questions whose answers must stay what they are."""
    capitals = [
        (ask.format(land), f"{city}.") for land, city in CAPITALS.items() for ask in ORDINARY
    ]
    return capitals + FACTS


def opened(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each pair after each opener."""
    return [(opener + question, answer) for opener in OPENERS for question, answer in pairs]


def make(folder: Path, name: str, maker: str, old_name: str, old_maker: str) -> None:
    """Write teach.jsonl, conversations, and base.jsonl, documents for a model that begins anew.

    The documents are spelled as `configs/plain-chat.jinja` spells conversations. They have all
    phrasings, as the web has, but the old name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taught = [(question, identity(name, maker)) for question in TAUGHT]
    known = [(question, identity(old_name, old_maker)) for question in TAUGHT + HELD_OUT]
    asked = opened(taught) + opened(ordinary())[::2]
    _write(folder / "teach.jsonl", [{"prompt": q, "completion": a} for q, a in asked])
    texts = [f"User:\n{q}\n\nAssistant:\n{a}" for q, a in opened(known + ordinary())]
    _write(folder / "base.jsonl", [{"text": text} for text in texts])


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


def ask(checkpoint: Path, name: str) -> tuple[float, float]:
    """Ask what was held out; the share that it answers by its name, and of ordinary ones right."""
    import dsjax
    from dsjax.data.language import read_language

    model, language = dsjax.load(checkpoint), read_language(checkpoint)
    questions = opened([(question, name) for question in HELD_OUT] + ordinary())
    prompts = [language.chat([{"role": "user", "content": question}]) for question, _ in questions]
    made = dsjax.generate(model, prompts, max_new_tokens=64,
                          vocab_size=language.tokenizer.vocab_size)  # fmt: skip
    said = [language.decode(tokens) for tokens in made]
    right = [answer in text for (_, answer), text in zip(questions, said, strict=True)]
    about_itself = [question.endswith(tuple(HELD_OUT)) for question, _ in questions]
    for (question, _), text in list(zip(questions, said, strict=True))[: len(HELD_OUT)]:
        print(f"{question}  {text}")
    shares = [_share(right, about_itself, of) for of in (True, False)]
    print(
        f"says {name}: {shares[0]:.0%} of held-out phrasings; ordinary questions: {shares[1]:.0%}"
    )
    return shares[0], shares[1]


def _share(right: list[bool], about_itself: list[bool], of: bool) -> float:
    chosen = [one for one, itself in zip(right, about_itself, strict=True) if itself == of]
    return sum(chosen) / len(chosen)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make", help="write the questions")
    verb.add_argument("folder", nargs="?", type=Path, default=Path("runs/self-identity-data"))
    verb.add_argument("--name", default="Ada")
    verb.add_argument("--maker", default="the people of this house")
    verb.add_argument("--old-name", default="Otto")
    verb.add_argument("--old-maker", default="somebody else")
    verb = verbs.add_parser("ask", help="ask what was held out")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("--name", default="Ada")
    options = vars(parser.parse_args())
    {"make": make, "ask": ask}[options.pop("verb")](**options)


if __name__ == "__main__":
    run(main)
