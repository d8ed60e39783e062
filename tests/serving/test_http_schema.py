"""/openapi.json is the truth: what it allows is taken, what it does not is refused, all as it says.

schemathesis makes the requests from it: the borders of every field, right and wrong, other methods,
other media types, no key or a wrong one; and random ones, the same in every run.
"""

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import requests
import schemathesis

from dsjax.serving.http import HttpSettings, make_app
from dsjax.serving.metrics import Metrics
from dsjax.serving.worker import Worker
from tests.serving.ports import Port, open_port
from tests.serving.scripted import ScriptedEngine, backwards, make_served

KEY = "sk-one"
CONFIG = {
    "auth": {"openapi": {"key": {"bearer": KEY}}},
    "generation": {"mode": "all", "max-examples": 15, "deterministic": True, "no-shrink": True},
    "checks": {
        "not_a_server_error": {"expected-statuses": ["2xx", "4xx"]},
        "negative_data_rejection": {"expected-statuses": ["4xx"]},
        "positive_data_acceptance": {"enabled": False},  # `accepted` below is stricter
    },
    "output": {"sanitization": {"enabled": False}},  # it takes max_tokens for a secret
    "suppress-health-check": ["all"],  # a busy machine is no failure
}
UNSAID = (
    r"^This model.s maximum context length is",
    r"^min_tokens: \d+ is above max_tokens",
    r"^max_(completion_)?tokens: 0 is for a completion with echo: true",
    r"^max_completion_tokens: contradicts max_tokens",
    r"^top_logprobs: needs logprobs: true",
    r"^best_of: is supported only equal to n",
    r"^logit_bias: expected token ids below 263",
    r"^n: \d+ for each of \d+ prompts is more than 1024 choices",
    r"^this makes \d+ sequences; 64 at once are possible",
)
"""Why a request may be refused that its schema allows: fields contradict, or something is full."""


def description() -> schemathesis.BaseSchema:
    """What the port says of itself, before there is a port."""
    settings, served = HttpSettings(keys=(KEY,)), make_served()
    worker = Worker(ScriptedEngine(), Metrics(served.name, served.context), settings.max_open)
    published = make_app(worker, served, settings).openapi()
    config = schemathesis.Config.from_dict(CONFIG)
    return schemathesis.openapi.from_dict(published, config=config)


described = description()


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    engine = ScriptedEngine(lambda request: backwards(request)[:5], step_seconds=0)
    with open_port(engine, keys=(KEY,), max_open=64) as port:
        yield port


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture(scope="module")
def answers() -> Iterator[Counter[tuple[str, bool, int]]]:
    """How often a route gave a status to what is right, or to what is wrong: often enough."""
    answers = Counter()
    yield answers
    for route in {route for route, *_ in answers}:
        takes_a_body = route.startswith("POST")
        assert answers[route, True, 200] >= (100 if takes_a_body else 1)
        assert answers[route, False, 405] >= 5
        assert answers[route, False, 400] >= (100 if takes_a_body else 0)


@described.parametrize()
def test_every_route_answers_as_it_is_described(
    case: schemathesis.Case, port: Port, session: requests.Session, answers: Counter
):
    answer = case.call_and_validate(port.url, session, additional_checks=[accepted])
    answers[case.operation.label, is_right(case), answer.status_code] += 1


def is_right(case: schemathesis.Case) -> bool:
    return case.meta.generation.mode.is_positive


def accepted(context: object, answer: schemathesis.Response, case: schemathesis.Case) -> None:
    """What is right is done, or refused for a reason that no schema can say."""
    if is_right(case) and answer.status_code != 200:
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400, message
        assert any(re.search(reason, message) for reason in UNSAID), message


def test_the_port_says_what_was_tested(port: Port):
    with port.http() as http:
        assert http.get("/openapi.json").json() == described.raw_schema
