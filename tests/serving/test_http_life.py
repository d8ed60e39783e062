"""From the first second of a server to its last."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.serving.ports import DIRECT, open_port, raw_post, read_until, until
from tests.serving.scripted import ScriptedEngine

ROOT = Path(__file__).resolve().parents[2]
ROUTE = "/v1/completions"


def test_health_says_when_it_is_warm():
    engine = ScriptedEngine(warm_up_seconds=0.3)
    with open_port(engine, wait=False) as port, port.http() as http:
        until(lambda: port.server.started)
        cold = http.get("/health")
        assert cold.status_code == 503 and cold.headers["retry-after"]
        assert "warming up: 1 of 3 programs" in cold.json()["error"]["message"]
        refused = http.post(ROUTE, json={"model": "m", "prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert http.get("/v1/models").status_code == http.get("/").status_code == 200
        until(lambda: http.get("/health").status_code == 200)
        assert http.post(ROUTE, json={"model": "m", "prompt": "x"}).status_code == 200


def test_a_broken_engine_answers_everyone(caplog: pytest.LogCaptureFixture):
    engine = ScriptedEngine(step_seconds=0.02)
    with open_port(engine) as port, port.http() as http, port.openai() as client:
        whole = []

        def ask() -> None:
            whole.append(http.post(ROUTE, json={"model": "m", "prompt": "x", "max_tokens": 300}))

        asking = threading.Thread(target=ask)
        asking.start()
        stream = client.completions.create(model="m", prompt="x", max_tokens=300, stream=True)
        assert next(stream).choices[0].text == "x"
        engine.fail_at_step = 0
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        asking.join()
        assert whole[0].status_code == 500
        assert whole[0].json()["error"]["type"] == "server_error"
        assert http.post(ROUTE, json={"model": "m", "prompt": "x"}).status_code == 500
        assert http.get("/health").status_code == 503
        assert http.get("/metrics").status_code == 200
    assert "the device is on fire" in caplog.text


def test_what_runs_is_finished_and_nothing_new_is_taken():
    with open_port(ScriptedEngine(step_seconds=0.01)) as port:
        body = {"model": "m", "prompt": "z" * 60, "max_tokens": 60, "stream": True}
        with port.connect() as connection:
            connection.sendall(raw_post(ROUTE, body))
            read_until(connection, b"data: ")
            port.server.should_exit = True
            until(lambda: port.server.worker._draining)
            with pytest.raises(ConnectionRefusedError):
                until(lambda: port.connect().close())
            assert b"\ndata: [DONE]\n\n" in read_until(connection, b"[DONE]\n\n")
        port.thread.join(5)
        assert not port.thread.is_alive()


def test_what_takes_too_long_is_ended_with_a_word():
    with open_port(ScriptedEngine(step_seconds=0.02), grace_seconds=0.1) as port:
        with port.connect() as stream, port.connect() as whole:
            body = {"model": "m", "prompt": "x", "max_tokens": 500}
            stream.sendall(raw_post(ROUTE, body | {"stream": True}))
            whole.sendall(raw_post(ROUTE, body))
            read_until(stream, b"data: ")
            port.server.should_exit = True
            ended = read_until(stream, b"never")
            assert b'data: {"error":{"message":"the server has shut down"' in ended
            assert b"[DONE]" not in ended
            assert read_until(whole, b"never").startswith(b"HTTP/1.1 503")
        port.thread.join(5)
        assert not port.thread.is_alive()


SERVE = """
from dsjax.cli import run
from dsjax.serving import worker
from dsjax.serving.http import HttpSettings, run_http
from tests.serving.scripted import ScriptedEngine, make_served

worker.LAST_STEP_SECONDS = 0.2
engine = ScriptedEngine(step_seconds=0.01, warm_up_seconds=WARM_UP)
settings = HttpSettings(port=0, grace_seconds=GRACE)
run(lambda: run_http(engine, make_served(), settings))
"""


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest):
    """A server in a process of its own, its address, and its log."""
    grace, warm_up = request.param
    code = SERVE.replace("GRACE", str(grace)).replace("WARM_UP", str(warm_up))
    command = [sys.executable, "-W", "error", "-c", code]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, cwd=ROOT)
    try:
        text = (tmp_path / "log").read_text
        until(lambda: ("http://" if warm_up else "ready after") in text(), seconds=30)
        yield process, text().split("http://")[1].split()[0], text
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("server", [(5, 0)], indirect=True)
def test_sigterm_drains_and_leaves_with_0(server):
    process, address, log = server
    body = {"model": "m", "prompt": "abc" * 9, "max_tokens": 27, "stream": True}
    with httpx.stream("POST", f"http://{address}{ROUTE}", json=body, **DIRECT) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        data = [line for line in lines if line]
    assert data[-1] == "data: [DONE]"
    assert json.loads(data[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.wait(5) == 0
    assert "Traceback" not in log() and 'POST /v1/completions HTTP/1.1" 200' in log()


@pytest.mark.parametrize("server", [(60, 0)], indirect=True)
def test_ctrl_c_drains_and_a_second_one_does_not_wait(server):
    process, address, log = server
    body = {"model": "m", "prompt": "x", "max_tokens": 500, "stream": True}
    with httpx.stream("POST", f"http://{address}{ROUTE}", json=body, **DIRECT) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
        assert "the server has shut down" in rest[-1]
    assert process.wait(5) == 130
    assert "Traceback" not in log()


@pytest.mark.parametrize("server", [(5, 60)], indirect=True)
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_program_that_does_not_end_is_left_behind(server, sign: int, code: int):
    """Such as the compilation of a large model."""
    process, address, log = server
    assert httpx.get(f"http://{address}/health", **DIRECT).status_code == 503
    process.send_signal(sign)
    assert process.wait(5) == code
    assert "the device is still busy" in log() and "Traceback" not in log()
