"""Kinds of malformed files beside the weights of a released folder.

config.json, tokenizer, chat template, generation settings, and whatever travels along.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed import (
    CONVERT,
    DEEP,
    DIGITS,
    DRY_RUN,
    ESCAPES,
    INSPECT,
    Spoil,
    config,
    cut,
    gone,
    is_fifo,
    is_folder,
    is_link,
    keys,
    kinds,
    large,
    many_large,
    nested,
    raw,
    text,
)

BOTH = (INSPECT, DRY_RUN)
CONFIG = kinds(
    "single",
    BOTH,
    {
        "no config.json": ("expected a Hugging Face folder", gone("config.json")),
        "an empty config": ("not the JSON", text("config.json", "")),
        "a config that is a list": ("expected a JSON object", text("config.json", "[]")),
        "a config that is a folder": ("expected a Hugging Face folder", is_folder("config.json")),
        "a config that is a pipe": ("expected a Hugging Face folder", is_fifo("config.json")),
        "a config that links to itself": (
            "expected a Hugging Face folder",
            is_link("config.json", "config.json"),
        ),
        "a config nested 100,000 deep": ("not the JSON", nested("config.json", '{"a":')),
        "a config of a gigabyte": ("the limit is", large("config.json", 1_000_000_000)),
        "a config of no UTF-8": ("not the JSON", text("config.json", b'{"\xe9": 1}')),
        "a config with a key twice": (
            "'hidden_size' stands twice",
            raw("hidden_size", '32, "hidden_size": 32'),
        ),
        "a family that is unknown": ("model_type='gpt2'", config(model_type="gpt2")),
        "a family that is a list": ("model_type=['llama']", config(model_type=["llama"])),
        "a family that a terminal obeys": ("model_type='a\\x1b", config(model_type=ESCAPES)),
        "a family of another kind": (
            "the key 'head_dim'",
            config(model_type="llama", num_attention_heads=5),
        ),
        "a list for a number": ("hidden_size=[32]", config(hidden_size=[32])),
        "a text for a number": ("hidden_size='32'", config(hidden_size="32")),
        "an object for a number": ("hidden_size={'a': 1}", config(hidden_size={"a": 1})),
        "a boolean for a number": (
            "first_k_dense_replace=True",
            config(first_k_dense_replace=True),
        ),
        "a float for a number": ("hidden_size=32.0", config(hidden_size=32.0)),
        "a text of a megabyte for a number": (
            "hidden_size='xxx",
            config(hidden_size="x" * 1_000_000),
        ),
        "a list of a megabyte for a number": (
            "hidden_size=[1, 1",
            config(hidden_size=[1] * 300_000),
        ),
        "null for a number": ("hidden_size", raw("hidden_size", "null")),
        "a missing number": ("'hidden_size' is missing", config(hidden_size=None)),
        "a size of zero": ("vocab_size=0", config(vocab_size=0)),
        "a negative size": ("vocab_size=-96", config(vocab_size=-96)),
        "a huge vocabulary": ("vocab_size=1000000000000", config(vocab_size=10**12)),
        "a vocabulary of 2^31 - 1": ("misshaped", config(vocab_size=2**31 - 1)),
        "a number of 400 digits": ("vocab_size=", raw("vocab_size", "1" + "0" * 400)),
        "a number of 5,000 digits": ("not the JSON", raw("vocab_size", DIGITS)),
        "a base of 400 digits": ("rope_theta=", raw("rope_theta", "1" + "0" * 400)),
        "NaN for a number": ("NaN is not JSON", raw("rms_norm_eps", "NaN")),
        "infinity for a number": ("Infinity is not JSON", raw("rope_theta", "-Infinity")),
        "a number that becomes infinity": ("rope_theta=inf", raw("rope_theta", "1e999")),
        "10^9 layers": ("num_hidden_layers=1000000000", config(num_hidden_layers=10**9)),
        "10^9 experts": ("n_routed_experts=1000000000", config(n_routed_experts=10**9)),
        "10^9 layers ahead": (
            "num_nextn_predict_layers=1000000000",
            config(num_nextn_predict_layers=10**9),
        ),
        "10^4 layers of 10^4 experts": (
            "n_routed_experts=10000",
            config(num_hidden_layers=10**4, n_routed_experts=10**4),
        ),
        "10^4 layers": ("missing", config(num_hidden_layers=10**4)),
        "one layer more": ("unknown", config(num_hidden_layers=4)),
        "one layer less": ("unknown", config(num_hidden_layers=2)),
        "groups that do not divide": ("not divisible by n_group=3", config(n_group=3)),
        "more chosen than there are": ("num_experts_per_tok=9", config(num_experts_per_tok=9)),
        "an odd rotary width": ("qk_rope_head_dim=7 is odd", config(qk_rope_head_dim=7)),
        "a token outside": ("eos_token_id=96 is outside", config(eos_token_id=96)),
        "a token that is negative": ("bos_token_id=-1 is outside", config(bos_token_id=-1)),
        "an activation that is another": ("hidden_act='gelu'", config(hidden_act="gelu")),
        "rotary settings that are a list": ("rotary settings are [1]", config(rope_scaling=[1])),
        "rotary settings of a kind that is a list": (
            "of type ['yarn']",
            config(rope_scaling={"type": ["yarn"]}),
        ),
        "rotary settings of an unknown kind": (
            "of type 'dynamic'",
            config(rope_scaling={"type": "dynamic"}),
        ),
        "rotary settings without a factor": (
            "rope_scaling.factor",
            config(rope_scaling={"type": "yarn"}),
        ),
        "a rotary base of one": ("rope_theta=1.0", config(rope_theta=1.0)),
        "an extension of no rotations": (
            "beta_fast=0",
            config(
                rope_scaling={
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 8,
                    "beta_fast": 0,
                }
            ),
        ),
        "an extension that divides by zero": (
            "mscale_all_dim=-",
            config(
                rope_scaling={
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 8,
                    "mscale_all_dim": -7.213475204444817,
                }
            ),
        ),
        "a base that is a list": ("rope_theta=[1]", config(rope_theta=[1])),
    },
)

CARRIED = kinds(
    "single",
    (CONVERT, DRY_RUN),
    {
        "a large file that is no weight": ("too large", large("data.zip", 200_000_000)),
        "many large files": ("too large", many_large),
    },
)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Another tokenizer.json."""

    def spoil(folder: Path) -> None:
        tree = json.loads((folder / "tokenizer.json").read_text())
        change(tree)
        (folder / "tokenizer.json").write_text(json.dumps(tree))

    return spoil


def template(source: Any) -> Spoil:
    """A chat template, within tokenizer_config.json."""
    return keys("tokenizer_config.json", chat_template=source)


LOAD, SERVE = ("load_tokenizer", "{source}"), ("serve", "{source}")
TOKENIZER = kinds(
    "single",
    (LOAD, SERVE),
    {
        "no tokenizer": ("holds no tokenizer", gone("tokenizer.json")),
        "a tokenizer that is a folder": ("holds no tokenizer", is_folder("tokenizer.json")),
        "a tokenizer that is a pipe": ("holds no tokenizer", is_fifo("tokenizer.json")),
        "a tokenizer in no JSON": ("cannot be read as a tokenizer", text("tokenizer.json", "{")),
        "a tokenizer that stopped": ("cannot be read as a tokenizer", cut("tokenizer.json", -100)),
        "a tokenizer that is a list": (
            "cannot be read as a tokenizer",
            text("tokenizer.json", "[]"),
        ),
        "a tokenizer nested 100,000 deep": (
            "cannot be read as a tokenizer",
            nested("tokenizer.json"),
        ),
        "a tokenizer of a gigabyte": ("the limit is", large("tokenizer.json", 1_000_000_000)),
        "a tokenizer of an unknown model": (
            "cannot be read as a tokenizer",
            tokenizer(lambda tree: tree["model"].update(type="Magic")),
        ),
        "merges of no token": (
            "cannot be read as a tokenizer",
            tokenizer(lambda tree: tree["model"].update(merges=[["no", "token"]])),
        ),
        "ids that are texts": (
            "cannot be read as a tokenizer",
            tokenizer(lambda tree: tree["model"].update(vocab={"a": "0"})),
        ),
        "ids that are negative": (
            "cannot be read as a tokenizer",
            tokenizer(lambda tree: tree["model"].update(vocab={"a": -1})),
        ),
        "ids beyond 32 bits": (
            "cannot be read as a tokenizer",
            tokenizer(lambda tree: tree["model"].update(vocab={"a": 1 << 40})),
        ),
        "no tokens": (
            "does not hold",
            tokenizer(
                lambda tree: (
                    tree["model"].update(vocab={}, merges=[]),
                    tree.update(added_tokens=[]),
                )
            ),
        ),
        "a pattern that is none": (
            "cannot be read as a tokenizer",
            tokenizer(
                lambda tree: tree.update(
                    pre_tokenizer={
                        "type": "Split",
                        "pattern": {"Regex": "(("},
                        "behavior": "Isolated",
                        "invert": False,
                    }
                )
            ),
        ),
        "settings in no JSON": ("not the JSON", text("tokenizer_config.json", "{")),
        "settings that are a list": ("expected a JSON object", text("tokenizer_config.json", "[]")),
        "settings nested 100,000 deep": ("not the JSON", nested("tokenizer_config.json")),
        "settings of a gigabyte": ("the limit is", large("tokenizer_config.json", 1_000_000_000)),
        "settings of no UTF-8": ("not the JSON", text("tokenizer_config.json", b"\xff")),
        "settings with a key twice": (
            "stands twice",
            text("tokenizer_config.json", '{"a": 1, "a": 2}'),
        ),
        "an end that is a number": ("eos_token is 5", keys("tokenizer_config.json", eos_token=5)),
        "an end that is a list": (
            "eos_token is ['x']",
            keys("tokenizer_config.json", eos_token=["x"]),
        ),
        "an end that is no token": (
            "which tokenizer.json does not hold",
            keys("tokenizer_config.json", eos_token="nowhere"),
        ),
        "an end that a terminal obeys": (
            "eos_token is 'a\\x1b",
            keys("tokenizer_config.json", eos_token=ESCAPES),
        ),
        "an end of half a character": (
            "eos_token is '\\ud800'",
            keys("tokenizer_config.json", eos_token="\ud800"),
        ),
    },
)

LOOP = "{% for i in range(99999) %}"

SERVED = kinds(
    "single",
    (SERVE,),
    {
        "a template that is no jinja": ("the chat template cannot be read", template("{% if %}")),
        "a template that is a number": ("chat_template is no text", template(5)),
        "a template that is an object": (
            "has the chat templates a, and none called default",
            template({"a": 1}),
        ),
        "several templates without a default": (
            "has the chat templates tools, and none called default",
            template([{"name": "tools", "template": "x"}]),
        ),
        "a template of many that is a list": (
            "chat_template is no text",
            template([{"name": "default", "template": [1]}]),
        ),
        "a template nested 100,000 deep": (
            "the chat template cannot be read",
            template("{{" + "(" * DEEP),
        ),
        "a template of no UTF-8": ("cannot be read", text("chat_template.jinja", b"\xff")),
        "a template of a gigabyte": ("the limit is", large("chat_template.jinja", 1_000_000_000)),
        "a template that loops": (
            "does not come to an end",
            template(LOOP * 3 + "{% endfor %}" * 3),
        ),
        "a template that calls itself": (
            "does not come to an end",
            template("{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(90) }}"),
        ),
        "a template that writes without end": (
            "writes more than",
            template(LOOP * 2 + "x" * 10_000 + "{% endfor %}" * 2),
        ),
        "a template that multiplies": ("too large", template("{{ 'x' * 10 ** 10 }}")),
        "a template that reaches for attributes": (
            "reaches out of its sandbox",
            template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ),
        "a template that reads files": (
            "the chat template",
            template("{% include '/etc/passwd' %}{% if %}"),
        ),
        "defaults in no JSON": ("not the JSON", text("generation_config.json", "{")),
        "defaults that are a list": (
            "expected a JSON object",
            text("generation_config.json", "[]"),
        ),
        "defaults nested 100,000 deep": ("not the JSON", nested("generation_config.json")),
        "a temperature that is a text": (
            "temperature",
            keys("generation_config.json", temperature="hot"),
        ),
        "a temperature that is negative": (
            "temperature",
            keys("generation_config.json", temperature=-1),
        ),
        "a temperature that is infinite": (
            "temperature",
            raw("temperature", "1e999", "generation_config.json"),
        ),
        "a temperature that is NaN": (
            "NaN is not JSON",
            raw("temperature", "NaN", "generation_config.json"),
        ),
        "a temperature that is a list": (
            "temperature",
            keys("generation_config.json", temperature=[1]),
        ),
        "a top_k of 400 digits": ("top_k", raw("top_k", "1" + "0" * 400, "generation_config.json")),
        "an end that is an object": (
            "eos_token_id",
            keys("generation_config.json", eos_token_id={"a": 1}),
        ),
    },
)

BESIDE = CONFIG + CARRIED + TOKENIZER + SERVED
