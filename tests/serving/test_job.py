"""A stream says in pieces what a response says at once, and both say what the engine said."""

import collections
import itertools
import json
import random

import pytest

from dsjax.data.tokenizer import EOS, Tokenizer
from dsjax.inference.request import TokenLogprob, Update
from dsjax.serving.job import parse
from dsjax.serving.reading import CHAT, COMPLETIONS
from tests.data.spoken import byte_ids, ids, make_served, run, scored, speak, template, tokenizer

HI = [{"role": "user", "content": "hi"}]
PLAIN = "{{ bos_token }}<｜User｜>{{ messages[0].content }}<｜Assistant｜>"


def chat(source=None, **fields):
    served = make_served(template=template(source)) if source else make_served()
    return parse(CHAT, {"model": "r1", "messages": HI, **fields}, served, "x")


def complete(prompt="hi", **fields):
    return parse(COMPLETIONS, {"model": "r1", "prompt": prompt, **fields}, make_served(), "x")


def joined(chunks):
    """The choices that a stream's chunks add up to, in the form of a response."""
    choices = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        whole = choices.setdefault(part["index"], {"index": part["index"], "finish_reason": None})
        assert whole["finish_reason"] is None, "nothing comes after the end"
        whole["finish_reason"] = part["finish_reason"]
        texts = part["delta"] if "delta" in part else {"text": part["text"]}
        for field, text in texts.items():
            whole[field] = whole.get(field, "") + text
        for field, found in (part["logprobs"] or {}).items():
            whole.setdefault("logprobs", collections.defaultdict(list))[field] += found
    return [choices[index] for index in sorted(choices)]


def flat(response):
    """A response's choices, in the same form."""
    choices = []
    for choice in response["choices"]:
        message = choice.pop("message", {})
        logprobs = choice.pop("logprobs")
        choices.append({**choice, **message, **({"logprobs": logprobs} if logprobs else {})})
    return choices


OUTPUTS = [
    "so 中文\n</think>\n\nhello 😀 world", "so it is", "</think>hello", "\n\n</think>\n\nnaïve\n\n",
    "so</think>stop here and", "s</think>\n", "a", "so</think>half a stop",
]  # fmt: skip


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_chunks_add_up_to_the_response(endpoint, finish):
    draw = random.Random(0)
    for seed in range(60):
        fields = {"n": 2, "stream": True, "stop": draw.choice([None, "stop here", [" w", "\n\n"]])}
        if endpoint == CHAT:
            fields |= draw.choice([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}])
            job = chat(**fields)
        else:
            fields |= {"logprobs": draw.choice([None, 0, 2]), "echo": draw.choice([False, True])}
            job = complete("naïve 😀", **fields)
        chunks = run(job, *draw.choices(OUTPUTS, k=2), finish=finish, seed=seed)
        response = json.loads(json.dumps(job.response(), allow_nan=False))
        assert joined(json.loads(json.dumps(chunks))) == flat(response)


@pytest.mark.parametrize("seed", range(5))
def test_text_does_not_depend_on_how_the_engine_cuts_it(seed):
    """And is what the tokens decode to, up to the stop string."""
    draw = random.Random(seed)
    text = "hello world, is it 中文字 😀 naïve? stop here and there"
    for _ in range(40):
        start = draw.randrange(len(text))
        stop = text[start : start + draw.randrange(1, 9)]
        job = complete(stop=stop, max_tokens=300, stream=True)
        chunks = run(job, text, seed=draw.randrange(10**6))
        shown = text[: text.find(stop)]
        assert job.response()["choices"][0]["text"] == shown
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == shown
        assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)


# ---------------------------------------------------------------------------------------------
# The bodies
# ---------------------------------------------------------------------------------------------


def test_a_completion():
    job = complete()
    assert not job.done
    assert run(job, "hello 😀") == [], "no stream was asked for"
    assert job.done
    response = job.response()
    created = response.pop("created")
    assert created > 1_700_000_000
    made = len(ids("hello 😀")) + 1
    assert response == {
        "id": "cmpl-x",
        "object": "text_completion",
        "model": "r1",
        "choices": [
            {"index": 0, "text": "hello 😀", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": made,
            "total_tokens": 3 + made,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_a_chat_with_a_thought():
    job = chat()
    run(job, "so it is\n</think>\n\nhello", finish="length")
    response = job.response()
    assert (response["id"], response["object"]) == ("chatcmpl-x", "chat.completion")
    message = {"role": "assistant", "content": "hello", "reasoning_content": "so it is"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    assert response["choices"] == [choice]
    usage = response["usage"]
    assert usage["completion_tokens"] == len(ids("so it is\n</think>\n\nhello"))
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(ids("so it is\n"))}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("\n\nhello", {"content": "\n\nhello"}),
        ("<think>so</think>hello", {"content": "hello", "reasoning_content": "so"}),
        ("<think>so", {"content": "", "reasoning_content": "so"}),
        ("", {"content": ""}),
    ],
)
def test_a_chat_whose_template_opens_no_thought(said, message):
    job = chat(PLAIN)
    run(job, said)
    assert job.response()["choices"][0]["message"] == {"role": "assistant", **message}


def test_a_chats_stream():
    job = chat(stream=True)
    chunks = run(job, "so</think>\n\nhello", seed=3)
    heads = {(c["id"], c["object"], c["model"], c["created"]) for c in chunks}
    assert len(heads) == 1 and next(iter(heads))[:2] == ("chatcmpl-x", "chat.completion.chunk")
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    fields = [field for delta in deltas[1:-1] for field in delta]
    assert fields == sorted(fields, reverse=True), "first the thought, then the answer"
    assert all(text for delta in deltas[1:-1] for text in delta.values())


def test_usage_comes_in_a_last_chunk_if_it_is_asked_for():
    job = chat(stream=True, stream_options={"include_usage": True})
    chunks = run(job, "so</think>hello")
    assert job.include_usage and all(chunk["usage"] is None for chunk in chunks)
    last = job.usage_chunk()
    assert last["choices"] == [] and last["object"] == "chat.completion.chunk"
    assert last["usage"] == job.response()["usage"]
    assert not chat(stream=True).include_usage


def test_special_tokens_are_not_shown_and_a_stop_token_neither():
    job = complete(stop_token_ids=ids("d"), ignore_eos=True)
    (request,) = job.requests
    said = [*ids(f"a{EOS}b"), *ids("d")]
    job.feed(Update(request.id, tuple(said[:-1])))
    job.feed(Update(request.id, tuple(said[-1:]), "stop"))
    response = job.response()
    assert response["choices"][0]["text"] == "ab"
    assert response["usage"]["completion_tokens"] == 4


# ---------------------------------------------------------------------------------------------
# Stop strings
# ---------------------------------------------------------------------------------------------


def test_a_stop_string_ends_a_choice_before_the_engine_does():
    job = complete(stop=["stop here"], stream=True, logprobs=0, max_tokens=100)
    (request,) = job.requests
    said = ids("hello stop here and there")
    ends = next(n for n in range(len(said)) if "stop here" in tokenizer().decode(said[:n]))
    for token in said[: ends - 1]:
        assert job.stopped == set() and not job.done
        job.feed(Update(request.id, (token,), logprobs=(TokenLogprob(token, -1.0, ()),)))
    rest = said[ends - 1 :]
    scores = tuple(TokenLogprob(token, -1.0, ()) for token in rest)
    (chunk,) = job.feed(Update(request.id, tuple(rest), logprobs=scores))
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert job.stopped == {request.id} and job.done
    assert job.feed(Update(request.id, (5, 6), "length")) == []
    (choice,) = job.response()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello ", "stop")
    assert len(choice["logprobs"]["tokens"]) == ends
    assert job.response()["usage"]["completion_tokens"] == ends


def test_nothing_is_to_be_cancelled_where_the_engine_ended_too():
    job = complete(stop="b")
    (request,) = job.requests
    job.feed(Update(request.id, tuple(ids("ab")), "length"))
    assert job.done and job.stopped == set()
    assert job.response()["choices"][0]["finish_reason"] == "stop"


def test_no_stop_string_is_looked_for_before_min_tokens():
    said = ids("a") * 6
    job = complete(stop="a", min_tokens=3)
    job.feed(Update(job.requests[0].id, tuple(said)))
    assert job.response()["choices"][0]["text"] == "aaa"
    assert job.response()["usage"]["completion_tokens"] == 4


def test_a_stop_string_ends_one_choice_and_not_its_sister():
    job = chat(PLAIN, n=2, stop="stop")
    first, second = job.requests
    for update in speak(first, ids("a stop b")):
        job.feed(update)
    assert job.stopped <= {first.id} and not job.done
    for update in speak(second, ids("a b"), "length"):
        job.feed(update)
    assert job.done
    texts = [c["message"]["content"] for c in job.response()["choices"]]
    assert texts == ["a ", "a b"]


# ---------------------------------------------------------------------------------------------
# Several choices, seeds
# ---------------------------------------------------------------------------------------------


def test_choices_are_numbered_prompt_by_prompt():
    job = complete(["a", "b"], n=2, seed=2**32 - 1)
    assert [request.id for request in job.requests] == ["x-0", "x-1", "x-2", "x-3"]
    assert [r.tokens[-1:] for r in job.requests] == [(i,) for i in ids("a") * 2 + ids("b") * 2]
    assert [r.sampling.seed for r in job.requests] == [2**32 - 1, 0] * 2
    run(job, "1", "2", "3", "4")
    response = job.response()
    assert [(c["index"], c["text"]) for c in response["choices"]] == list(enumerate("1234"))
    usage = response["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 8), "a prompt counts once"
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


def test_a_prompt_without_a_seed_gets_one_of_its_own():
    seeds = iter([7, 2**32 - 1])
    body = {"model": "r1", "prompt": ["a", "a"], "n": 2}
    job = parse(COMPLETIONS, body, make_served(), "x", random_seed=lambda: next(seeds))
    assert [r.sampling.seed for r in job.requests] == [7, 8, 2**32 - 1, 0]
    drawn = {complete().requests[0].sampling.seed for _ in range(5)}
    assert len(drawn) > 1


# ---------------------------------------------------------------------------------------------
# Log-probabilities and echo
# ---------------------------------------------------------------------------------------------


def test_a_completions_logprobs():
    job = complete(logprobs=2)
    tokens = [*byte_ids("aß".encode()), tokenizer().eos_id]
    scores = tuple(scored(i, 2) for i in tokens)
    job.feed(Update(job.requests[0].id, tuple(tokens), "stop", scores))
    found = job.response()["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\x9f", EOS]
    assert found["text_offset"] == [0, 1, 1, 2]
    assert found["token_logprobs"] == [-0.5] * 4
    assert found["top_logprobs"][0] == {"a": -0.5, "b": -1.5}


def test_the_chosen_token_is_among_the_likeliest_ones():
    """As OpenAI's; lm-evaluation-harness compares it with them."""
    job = complete(logprobs=1)
    a, b = ids("a")[0], ids("b")[0]
    score = TokenLogprob(a, float("-inf"), ((b, -0.25),))
    job.feed(Update(job.requests[0].id, (a,), "length", (score,)))
    found = job.response()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert found["top_logprobs"] == [{"b": -0.25, "a": -9999.0}]


def test_a_chats_logprobs_are_told_apart_as_its_text():
    job = chat(logprobs=True, top_logprobs=1)
    run(job, "so</think>é")
    found = job.response()["choices"][0]["logprobs"]
    assert [s["token"] for s in found["reasoning_content"]] == [
        *(tokenizer().decode([i]) for i in ids("so")), "</think>",
    ]  # fmt: skip
    assert bytes(b for s in found["content"] for b in s["bytes"]).decode() == "é" + EOS
    first = found["content"][0]
    assert first["logprob"] == -0.5 and len(first["top_logprobs"]) == 1
    assert first["top_logprobs"][0] == {k: first[k] for k in ("token", "logprob", "bytes")}
    plain = chat(PLAIN, logprobs=True)
    run(plain, "a")
    found = plain.response()["choices"][0]["logprobs"]
    assert found["reasoning_content"] == [] and found["content"][0]["top_logprobs"] == []


def test_echo_begins_with_the_prompt_as_it_was_given():
    for prompt, text in (("naïve 😀", "naïve 😀"), (ids(f"a{EOS}b"), f"a{EOS}b")):
        job = complete(prompt, echo=True, stream=True)
        chunks = run(job, " hello")
        assert job.response()["choices"][0]["text"] == text + " hello"
        assert chunks[0]["choices"][0]["text"].startswith(text)


def test_no_stop_string_is_found_in_an_echo():
    job = complete("a b", echo=True, stop="b")
    run(job, "cb")
    assert job.response()["choices"][0]["text"] == "a bc"


def test_a_character_may_begin_in_the_prompt_and_end_in_the_output():
    first, *rest = tokenizer().encode("ß")
    assert rest
    job = complete([first], echo=True)
    job.feed(Update(job.requests[0].id, tuple(rest), "length"))
    assert job.response()["choices"][0]["text"] == "ß"


def test_echo_with_logprobs_scores_a_prompt_as_lm_evaluation_harness_reads_it():
    prompt = ids("hello naïve")
    for limit in (0, 1):
        job = complete(prompt, echo=True, logprobs=1, max_tokens=limit, temperature=0)
        (request,) = job.requests
        assert (request.sampling.max_tokens, request.sampling.prompt_logprobs) == (1, 1)
        run(job, "b", finish="length")
        (choice,) = job.response()["choices"]
        found = choice["logprobs"]
        assert choice["text"] == "hello naïve" + "b" * limit
        assert choice["finish_reason"] == "length"
        assert len(found["token_logprobs"]) == len(prompt) + limit
        assert found["token_logprobs"][:2] == [None, -0.5] and found["top_logprobs"][0] is None
        offsets = [*found["text_offset"], len(choice["text"])]
        pieces = [choice["text"][a:b] for a, b in itertools.pairwise(offsets)]
        assert [p for p, t in zip(pieces, found["tokens"], strict=True) if t[:5] != "bytes"]
        assert "".join(pieces) == choice["text"]
        assert job.response()["usage"]["completion_tokens"] == limit


def test_bos_that_we_added_has_a_score_and_no_text():
    job = complete("a", echo=True, logprobs=0, max_tokens=0)
    run(job, "b", finish="length")
    (choice,) = job.response()["choices"]
    assert choice["text"] == "a"
    assert choice["logprobs"]["tokens"] == [tokenizer().decode([0]), "a"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


def test_no_token_is_decoded_twice(monkeypatch):
    """So that the work is linear in the output, however long it gets."""
    decoded = []
    token_bytes = Tokenizer.token_bytes

    def counted(self, token):
        decoded.append(token)
        return token_bytes(self, token)

    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    job = complete(stream=True, max_tokens=300, stop=["hello!", "😀"])
    said = ids("hello 😁") * 500
    for token in said:
        job.feed(Update(job.requests[0].id, (token,)))
    job.feed(Update(job.requests[0].id, (), "length"))
    assert job.response()["choices"][0]["text"] == "hello 😁" * 500
    assert decoded == said
