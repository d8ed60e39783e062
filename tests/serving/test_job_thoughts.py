"""Thoughts in a chat's response and stream: tags of one token or several, scores, stop strings."""

import json
import random

import pytest

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from dsjax.inference.request import FinishReason
from dsjax.serving.job import parse
from dsjax.serving.reading import CHAT
from tests.data.spoken import byte_ids, ids, make_served, run, speak, template, tokenizer
from tests.serving.test_job import HI, PLAIN, chat, flat, joined


def say(job, tokens, finish: FinishReason = "stop", seed=0):
    """Let the job's only request say `tokens`; returns the chunks."""
    return [chunk for update in speak(job.requests[0], tokens, finish, seed)
            for chunk in job.feed(update)]  # fmt: skip


def message(job):
    """The message, without its role."""
    found = dict(job.response()["choices"][0]["message"])
    assert found.pop("role") == "assistant"
    return found


SAID = [
    "so it is\n</think>\n\nhello",
    "<think>\nso it is\n</think>\n\nhello",
    "\n<think>so it is</think>hello",
]


@pytest.mark.parametrize(
    ("said", "source"), [*((said, None) for said in SAID), *((said, PLAIN) for said in SAID[1:])]
)
def test_tags_of_several_tokens_are_tags(said, source):
    job = chat(source, stream=True)
    chunks = say(job, byte_ids(said.encode()))
    assert message(job) == {"content": "hello", "reasoning_content": "so it is"}
    assert joined(chunks) == flat(job.response())
    texts = [c["choices"][0]["delta"].get("reasoning_content", "") for c in chunks]
    assert not any("<" in text for text in texts), "no part of a tag is sent"


def test_a_model_whose_tokenizer_has_no_tags_thinks_all_the_same():
    plain = train_tokenizer([""], 261)
    source = "{{ messages[0].content }}<think>\n"
    served = make_served(
        tokenizer=plain, vocab_size=plain.vocab_size, think_start_id=None, think_end_id=None,
        template=ChatTemplate(source, plain, {"bos_token": BOS, "eos_token": EOS}),
    )  # fmt: skip
    job = parse(CHAT, {"model": "r1", "messages": HI}, served, "x")
    job.feed(next(speak(job.requests[0], [], "length")))
    assert message(job) == {"content": ""}
    job = parse(CHAT, {"model": "r1", "messages": HI}, served, "x")
    say(job, plain.encode("so</think>hello"), "length")
    assert message(job) == {"content": "hello", "reasoning_content": "so"}


def test_tags_that_the_file_calls_special_are_tags_and_other_special_tokens_are_hidden():
    backend = tokenizer()._backend.__class__.from_str(tokenizer()._backend.to_str())
    backend.add_special_tokens(["<think>", "</think>"])
    special = Tokenizer(backend, BOS, EOS)
    assert set(ids("<think></think>")) <= special.special_ids
    served = make_served(tokenizer=special, template=template(PLAIN))
    job = parse(CHAT, {"model": "r1", "messages": HI}, served, "x")
    say(job, ids(f"<think>so{BOS}</think>hel{BOS}lo"))
    assert message(job) == {"content": "hello", "reasoning_content": "so"}


@pytest.mark.parametrize("said", ["a stop here b\n</think>\n\nis it\nstop here c", "a</think>b"])
def test_a_stop_string_ends_the_content_and_not_the_thought(said):
    for tokens in (ids(said), byte_ids(said.encode())):
        job = chat(stream=True, stop=["stop here", "ab", "a</think>b", "\n\n"])
        chunks = say(job, tokens, seed=2)
        thought, _, content = said.partition("</think>")
        content = content.strip().partition("stop here")[0]
        expected = {"content": content, "reasoning_content": thought.strip()}
        assert message(job) == expected
        assert joined(chunks) == flat(job.response())
        assert job.response()["choices"][0]["finish_reason"] == "stop"


def test_a_stop_token_and_a_limit_end_a_thought():
    job = chat(stop_token_ids=ids("d"))
    (request,) = job.requests
    assert ids("d")[0] in request.sampling.stop_tokens
    say(job, ids("so"), "length")
    assert message(job) == {"content": "", "reasoning_content": "so"}


def test_scores_are_told_apart_as_their_tokens_also_where_white_space_or_a_tag_waits():
    for said, tokens in ((s, t) for s in SAID[1:] for t in (ids(s), byte_ids(s.encode()))):
        job = chat(PLAIN, logprobs=True, stream=True)
        chunks = say(job, tokens, "length")
        found = job.response()["choices"][0]["logprobs"]
        spelled = {k: b"".join(bytes(s["bytes"]) for s in v).decode() for k, v in found.items()}
        cut = said.index("</think>") + len("</think>")
        assert spelled == {"reasoning_content": said[:cut], "content": said[cut:]}
        assert joined(json.loads(json.dumps(chunks))) == flat(job.response())
    job = chat(PLAIN, logprobs=True)
    say(job, byte_ids(b"\n <thi"), "length")
    assert message(job) == {"content": "\n <thi"}
    assert len(job.response()["choices"][0]["logprobs"]["content"]) == 6


def test_chunks_add_up_to_the_response_wherever_tags_are_cut():
    draw = random.Random(0)
    pieces = ["<think>", "</think>", "\n", " ", "so", "it", "stop here", "<th", "中"]
    for seed in range(150):
        source, logprobs = draw.choice([None, PLAIN]), draw.choice([True, False])
        job = chat(source, stream=True, logprobs=logprobs, stop=draw.choice([None, "stop here"]))
        said = "".join(draw.choices(pieces, k=draw.randrange(1, 9)))
        tokens = draw.choice([ids, lambda text: byte_ids(text.encode())])(said)
        chunks = say(job, tokens, draw.choice(["stop", "length"]), seed)
        assert joined(json.loads(json.dumps(chunks))) == flat(job.response()), said


def test_an_answer_without_a_thought_has_no_reasoning_content():
    for source, said in ((None, "\n</think>\n\nhello"), (PLAIN, "hello")):
        job = chat(source)
        run(job, said)
        assert message(job) == {"content": "hello"}
