"""What a client may ask for, what is made of it, and how everything else is refused."""

import json
import re

import pytest

from dsjax.data.tokenizer import EncodingError, Tokenizer
from dsjax.serving.bodies import ChatBody, CompletionBody, Message
from dsjax.serving.job import parse
from dsjax.serving.protocol import RequestError
from dsjax.serving.reading import CHAT, COMPLETIONS
from tests.data.spoken import ids, make_served, tokenizer

SERVED = make_served()
SIZE = SERVED.vocab_size
HI = [{"role": "user", "content": "hi"}]
BASE = {COMPLETIONS: {"model": "r1", "prompt": "hi"}, CHAT: {"model": "r1", "messages": HI}}


def params(endpoint=COMPLETIONS, served=SERVED, **fields):
    return parse(endpoint, {**BASE[endpoint], **fields}, served, "x").requests[0].sampling


def refused(endpoint, body, served=SERVED):
    """The error, which any client can read and no log line is broken by."""
    with pytest.raises(RequestError) as caught:
        parse(endpoint, body, served, "x")
    error, message = caught.value, caught.value.message
    assert message.splitlines() == [message] and len(message) < 500
    json.dumps(error.body(), allow_nan=False, ensure_ascii=False).encode()
    assert error.body()["error"]["type"] == "invalid_request_error"
    return error


NUMBERS = {
    "temperature": (0, 0.5, 2), "top_p": (0, 0.1, 1), "min_p": (0, 1),
    "repetition_penalty": (0.5, 1),
    "frequency_penalty": (-2, 2), "presence_penalty": (-2, 0.5), "top_k": (-1, 0, 5),
    "max_tokens": (-1, 1, 100), "min_tokens": (0, 16), "n": (1, 128), "seed": (0, -5, 2**63 - 1),
}  # fmt: skip
WHOLE = {"top_k", "max_tokens", "min_tokens", "n", "seed"}
OUTSIDE = {
    "temperature": (-0.1, 101), "top_p": (1.1, -1), "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, -1, 101), "frequency_penalty": (-2.1, 2.1),
    "presence_penalty": (-3, 3), "top_k": (-2, 2**31), "max_tokens": (-2, 0, 2**31, 400),
    "min_tokens": (-1, 17), "n": (0, -1, 129, 10**6), "seed": (2**63, -(2**63) - 1),
}  # fmt: skip


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_within_its_range_is_taken_and_no_other(name, endpoint):
    body = {**BASE[endpoint], "max_tokens": 16}
    for value in NUMBERS[name]:
        parse(endpoint, {**body, name: value}, SERVED, "x")
    parse(endpoint, {**body, name: None}, SERVED, "x")
    nan, inf = float("nan"), float("inf")
    wrong = [*OUTSIDE[name], True, False, "1", [1], {}, nan, inf, -inf, 1e39, 10**400, -(10**5000)]
    wrong += [1.5, -0.5] if name in WHOLE else []
    for value in wrong:
        error = refused(endpoint, {**body, name: value})
        assert (error.status, error.param) == (400, name)


BAD_FIELDS = [
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop[0]"),
    ({"stop_token_ids": [SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids[0]"),
    ({"stop_token_ids": list(range(17))}, "stop_token_ids"),
    ({"logit_bias": {str(SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1.0": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias.1"),
    ({"logit_bias": {"1": True}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"suffix": "b"}, "suffix"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"stop": "a\ud800"}, "stop"),
    ({"user": "\udfff"}, "user"),
    ({"metadata": {"\ud800": 1}}, "metadata"),
    ({"\ud800": 1}, "\\ud800"),
    ({"temprature": 1}, "temprature"),
    ({"a\nb" * 500: 1}, None),
]
BAD_COMPLETIONS = [
    ({"prompt": value}, "prompt")
    for value in (
        None, 5, {}, [], [[]], [[1], []], ["a", 1], [1, "a"], ["a", [1]], [[1], "a"], [True],
        [0.5], [[1.5]], [[True]], [SIZE], [-1], [[1], [SIZE]], [10**400], ["a", None], "a\ud800",
        [1] * 401, [1] * 400, "ab " * 400, ["a"] * 1025,
    )
] + [
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": HI}, "messages"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"n": 128, "prompt": ["a"] * 9}, "n"),
]  # fmt: skip


def message(**fields):
    return {"messages": [{**HI[0], **fields}]}


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": {}}, "messages"),
    (message(content="a " * 500), "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*HI, {"role": "tool", "content": None}]}, "messages[1].content"),
    (message(role="function"), "messages[0].role"),
    (message(role=5), "messages[0].role"),
    (message(content=5), "messages[0].content"),
    (message(content=[5]), "messages[0].content"),
    (message(content=["hi"]), "messages[0].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content"),
    (message(content=[{"type": "file", "file": {}}]), "messages[0].content"),
    (message(content=[{"type": "text", "text": 5}]), "messages[0].content"),
    (message(content=[{"type": "text", "text": "a", "b": 1}]), "messages[0].content"),
    (message(content=[{"type": "text", "text": "\ud800"}]), "messages"),
    (message(content="\ud83d"), "messages"),
    (message(name=5), "messages[0].name"),
    (message(contents="a"), "messages[0].contents"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 5}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 399}, "max_completion_tokens"),
    ({"max_completion_tokens": True}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ({"prompt": "hi"}, "prompt"),
    ({"echo": True}, "echo"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [(endpoint, *bad) for endpoint in BASE for bad in BAD_FIELDS]
    + [(COMPLETIONS, *bad) for bad in BAD_COMPLETIONS]
    + [(CHAT, *bad) for bad in BAD_CHATS],
)
def test_a_bad_field_is_a_400_that_names_it(endpoint, fields, param):
    error = refused(endpoint, {**BASE[endpoint], **fields})
    assert error.status == 400
    assert param is None or error.param == param


@pytest.mark.parametrize("endpoint", BASE)
def test_a_missing_field_is_named(endpoint):
    for name in BASE[endpoint]:
        body = {key: value for key, value in BASE[endpoint].items() if key != name}
        assert refused(endpoint, body).message == f"{name} is missing"


def test_an_unknown_field_tells_of_one_that_is_really_alike():
    def said(**fields):
        return refused(CHAT, {**BASE[CHAT], **fields}).message

    assert said(max_completion_token=5) == (
        "max_completion_token: no such field; the nearest is max_completion_tokens"
    )
    assert said(maxTokens=5) == "maxTokens: no such field; the nearest is max_tokens"
    assert said(num_ctx=5) == "num_ctx: no such field"
    assert said(guided_json={}) == "guided_json: no such field"
    assert said(**message(contnt="a")).endswith(
        "messages[0].contnt: no such field; the nearest is content"
    )


def test_another_model_and_another_endpoint_are_not_found():
    error = refused(CHAT, {**BASE[CHAT], "model": "gpt"})
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert "'r1' is served" in error.message
    assert refused("/v1/embeddings", {}).status == 404
    for body in (None, [], "a", 5):
        assert refused(CHAT, body).status == 400


def test_a_model_without_a_template_does_not_chat():
    error = refused(CHAT, BASE[CHAT], make_served(template=None))
    assert "no chat template" in error.message
    refusing = make_served(
        template=SERVED.template.__class__("{{ raise_exception('no') }}", tokenizer(), {})
    )
    assert refused(CHAT, BASE[CHAT], refusing).message.endswith("these messages: no")


def test_a_text_that_the_tokenizer_cannot_encode_is_an_error_of_that_request(monkeypatch):
    def fail(self, text):
        raise EncodingError("the tokenizer cannot encode it")

    monkeypatch.setattr(Tokenizer, "encode_prompt", fail)
    for endpoint, param in ((CHAT, "messages"), (COMPLETIONS, "prompt")):
        error = refused(endpoint, BASE[endpoint])
        assert (error.status, error.param) == (400, param)
        assert error.message == f"{param}: the tokenizer cannot encode it"


@pytest.mark.parametrize(("endpoint", "kind"), [(COMPLETIONS, CompletionBody), (CHAT, ChatBody)])
def test_null_is_a_field_that_was_left_out(endpoint, kind):
    nothing = dict.fromkeys([*kind.model_fields, *kind.unsupported, "of_another_server"])
    body = {**nothing, **BASE[endpoint]}
    alone, given = (
        parse(endpoint, b, SERVED, "x", random_seed=int) for b in (BASE[endpoint], body)
    )
    assert given.requests == alone.requests
    if endpoint == CHAT:
        none = dict.fromkeys([*Message.model_fields, *Message.unsupported, "of_another_server"])
        body["messages"] = [{**none, **HI[0]}]
        assert parse(CHAT, body, SERVED, "x", random_seed=int).requests == alone.requests


def test_limits_and_log_probabilities_that_ask_for_nothing():
    assert params(CHAT, max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert params(CHAT, logprobs=False, top_logprobs=0).logprobs is None
    assert params(COMPLETIONS, best_of=3, n=3).max_tokens == 16
    for endpoint in BASE:
        prompt = parse(endpoint, BASE[endpoint], SERVED, "x").requests[0].tokens
        assert params(endpoint, max_tokens=-1).max_tokens == SERVED.context - len(prompt)


def test_an_answer_may_come_back_as_openais_client_keeps_it():
    answer = {
        "role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "reasoning_content": "b",
    }  # fmt: skip
    messages = [*HI, answer, {"role": "assistant", "content": None}, *HI]
    assert parse(CHAT, {"model": "r1", "messages": messages}, SERVED, "x").requests


# ---------------------------------------------------------------------------------------------
# What is made of it
# ---------------------------------------------------------------------------------------------


def test_settings_reach_the_engine():
    given = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
        "frequency_penalty": -1, "presence_penalty": 1.5, "seed": 2**32 + 3, "max_tokens": 9,
        "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    made = params(**given, logit_bias={"5": -100, "0": 1.5}, stop_token_ids=[9, 7, 9], logprobs=4)
    assert {name: getattr(made, name) for name in given} == {**given, "seed": 3}
    assert made.logit_bias == {5: -100, 0: 1.5}
    assert made.stop_tokens == (9, 7)
    assert (made.logprobs, made.prompt_logprobs) == (4, None)


def test_a_whole_number_may_be_written_with_a_point():
    """In JSON 74.0 is as much an integer as 74."""
    given = {"max_tokens": 74, "min_tokens": 2, "n": 2, "best_of": 2, "seed": -3, "logprobs": 4}
    given |= {"top_k": 7, "stop_token_ids": [9, 7], "prompt": [5, 0], "model": "r1"}
    text = re.sub(r"(\d+)(?=[],}])", r"\1.0", json.dumps(given))
    assert "74.0" in text and "[5.0, 0.0]" in text
    asked = [parse(COMPLETIONS, body, SERVED, "x").requests for body in (given, json.loads(text))]
    assert repr(asked[0]) == repr(asked[1])
    chat = BASE[CHAT] | {"logprobs": True, "top_logprobs": 3.0, "max_completion_tokens": 5.0}
    assert repr(parse(CHAT, chat, SERVED, "x").requests[0].sampling.max_tokens) == "5"


def test_what_is_left_out_is_openais_default():
    made = params()
    assert (made.temperature, made.top_p, made.top_k, made.max_tokens) == (1.0, 1.0, 0, 16)
    prompt = parse(CHAT, BASE[CHAT], SERVED, "x").requests[0].tokens
    assert params(CHAT).max_tokens == SERVED.context - len(prompt)
    assert params(top_k=-1).top_k == 0
    assert (params(CHAT).logprobs, params(CHAT, logprobs=True).logprobs) == (None, 0)
    assert params(CHAT, logprobs=True, top_logprobs=3).logprobs == 3


def test_the_checkpoints_defaults_come_before_openais_and_after_the_clients():
    defaults = {
        "temperature": 0.6, "top_p": 0.95, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1,
        "max_new_tokens": 30, "eos_token_id": [1, 9],
    }  # fmt: skip
    served = make_served(defaults=defaults)
    made = params(CHAT, served)
    assert (made.temperature, made.top_p, made.top_k) == (0.6, 0.95, 50)
    assert (made.min_p, made.repetition_penalty) == (0.1, 1.1)
    assert made.max_tokens == params(COMPLETIONS, served).max_tokens == 30
    assert made.stop_tokens == (1, 9)
    assert params(CHAT, served, stop_token_ids=[9, 8]).stop_tokens == (9, 8, 1)
    assert params(CHAT, served, ignore_eos=True).stop_tokens == ()
    given = params(CHAT, served, temperature=0, top_k=0, max_tokens=40)
    assert (given.temperature, given.top_k, given.max_tokens) == (0, 0, 40)
    with pytest.raises(RequestError, match="of which the model has 2"):
        params(CHAT, served, stop_token_ids=list(range(10, 26)))


def test_a_default_length_shrinks_to_the_context_and_a_given_one_does_not():
    prompt = [5] * 390
    assert params(prompt=prompt).max_tokens == 10
    assert params(prompt=prompt, max_tokens=10).max_tokens == 10


LITELLM = "this model's maximum context length is"
"""What LiteLLM looks for, in lower case (`ExceptionCheckers`), before it falls back."""

LANGCHAIN = "context_length_exceeded"
"""What LangChain looks for in the text of the client's exception (`_handle_openai_bad_request`)."""


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "numbers"),
    [
        (COMPLETIONS, {"prompt": [5] * 390, "max_tokens": 11}, "max_tokens", (401, 390, 11)),
        (COMPLETIONS, {"prompt": [5] * 400}, "prompt", (401, 400, 1)),
        (CHAT, {"max_completion_tokens": 2**31 - 1}, "max_completion_tokens", None),
        (CHAT, message(content="a " * 500), "messages", None),
    ],
)
def test_what_does_not_fit_is_said_in_words_that_clients_know(endpoint, fields, param, numbers):
    error = refused(endpoint, {**BASE[endpoint], **fields})
    body = error.body()["error"]
    assert (error.status, body["param"]) == (400, param)
    assert LITELLM in body["message"].lower()
    assert LANGCHAIN in body["message"] and body["code"] == LANGCHAIN
    if numbers:
        total, prompt, answer = numbers
        assert body["message"] == (
            f"This model's maximum context length is 400 tokens. However, you requested {total} "
            f"tokens ({prompt} in the prompt, {answer} in the completion). "
            "Please reduce the length of the prompt or completion (context_length_exceeded)."
        )


def test_no_more_likeliest_tokens_than_there_are():
    served = make_served(vocab_size=5)
    fields = {"model": "r1", "prompt": [1]}
    assert refused(COMPLETIONS, {**fields, "logprobs": 6}, served).param == "logprobs"
    chat = {**BASE[CHAT], "logprobs": True, "top_logprobs": 6}
    assert refused(CHAT, chat, served).param == "top_logprobs"


def prompts(prompt, **changes):
    job = parse(COMPLETIONS, {"model": "r1", "prompt": prompt}, make_served(**changes), "x")
    return [list(request.tokens) for request in job.requests]


def test_every_form_of_a_prompt():
    bos = tokenizer().bos_id
    assert prompts("hi") == [[bos, *ids("hi")]]
    assert prompts(["hi", "a😀"]) == [[bos, *ids("hi")], [bos, *ids("a😀")]]
    assert prompts([5, 0]) == [[5, 0]]
    assert prompts([[5], [6, 7]]) == [[5], [6, 7]]
    assert prompts("") == [[bos]]


def test_bos_is_added_once_and_only_if_the_checkpoint_says_so():
    bos = tokenizer().bos_id
    assert prompts("<｜begin▁of▁sentence｜>hi") == [[bos, *ids("hi")]]
    assert prompts("hi", add_bos=False) == [ids("hi")]
    body = {**BASE[COMPLETIONS], "prompt": ""}
    assert refused(COMPLETIONS, body, make_served(add_bos=False)).param == "prompt"


def test_a_completions_prompt_may_spell_special_tokens():
    text = "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"
    assert prompts(text) == [[tokenizer().bos_id, *ids(text)]]
    assert tokenizer().fim_hole_id in ids(text)


def test_a_developer_is_a_system_and_text_parts_are_lines():
    def tokens(role, content):
        body = {"model": "r1", "messages": [{"role": role, "content": content}, *HI]}
        return parse(CHAT, body, SERVED, "x").requests[0].tokens

    parts = [{"type": "text", "text": text} for text in "ab"]
    assert tokens("developer", parts) == tokens("system", "a\nb")
