"""The command line: what it refuses in one line, what it opens, and how it ends."""

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from dsjax.config_files import load_model_config
from dsjax.errors import UserError
from dsjax.model.decoder import cache_shape
from dsjax.serving import opening
from dsjax.serving.opening import open_model, token_bytes
from dsjax.serving.options import ModelOptions
from tests.serving.checkpoints import ENVIRONMENT, NAME, command, serve, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / NAME)


@pytest.fixture
def batch(tmp_path: Path) -> tuple[str, ...]:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    return "--input", str(source), "--output", str(tmp_path / "out.jsonl")


@pytest.mark.parametrize("verb", [[], ["chat"], ["batch"], ["http"]])
def test_help_needs_no_jax(verb):
    broken = ENVIRONMENT | {"JAX_PLATFORMS": "none-such"}
    ended = subprocess.run(command(*verb, "--help"), capture_output=True, text=True, env=broken)
    assert ended.returncode == 0 and "usage: serve.py" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "required: VERB"),
        (["talk"], "invalid choice: 'talk'"),
        (["chat"], "required: CHECKPOINT"),
        (["batch", "x"], "required: --input, --output"),
        (["http", "x", "--memory", "8GX"], "'8GX' is no size"),
        (["http", "x", "--mesh", "expert"], "'expert' is no mesh"),
        (["http", "x", "--host", "0.0.0.0"], "no API key is set"),
        (["http", "x", "--port", "70000"], "cannot listen"),
        (["http", "x", "--api-key-file", "none"], "cannot read the API keys"),
        (["chat", "none-such"], "none-such: no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, problem):
    ended = serve(*arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert problem in ended.stderr


def test_a_batch_that_cannot_begin_writes_nothing(folder, batch, tmp_path):
    ended = serve("batch", folder, *batch, "--context", 10**6)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert "made for at most 256" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_batch_ends_with_its_output(folder, batch, tmp_path):
    ended = serve("batch", folder, *batch)
    assert ended.returncode == 0, ended.stderr
    assert "0 answered, 1 refused" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_port_answers_until_it_is_stopped(folder, tmp_path, sign, code):
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ("http", folder, "--port", port, "--api-key-file", keys, "--rows", 1, "--name", "m")
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if http.get("/health").status_code == 200:
                    break
            time.sleep(0.1)
        body = {"model": "m", "prompt": "def", "max_tokens": 4, "temperature": 0}
        assert http.post("/v1/completions", json=body).status_code == 401
        key = {"Authorization": "Bearer secret"}
        answered = http.post("/v1/completions", json=body, headers=key)
        assert answered.json()["usage"]["completion_tokens"] == 4
    process.send_signal(sign)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code and b"Traceback" not in said


# ---------------------------------------------------------------------------------------------
# Room
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def settings(monkeypatch) -> list:
    """What engines would be made with."""
    found = []
    monkeypatch.setattr(opening, "Engine", lambda model, settings, **_: found.append(settings))
    return found


def test_memory_is_so_many_tokens(folder, settings):
    open_model(ModelOptions(folder, NAME))
    assert (settings[-1].rows, settings[-1].context) == (8, 256)
    assert settings[-1].cache_tokens == 8 * 256
    token = 2 * (16 + 8)  # layers, and the widths of latent and rotary key
    open_model(ModelOptions(folder, NAME, memory=300 * 4 * token + 7))
    assert settings[-1].cache_tokens == 300
    open_model(ModelOptions(folder, NAME, memory=300 * 2 * token, dtype="bfloat16"))
    assert settings[-1].cache_tokens == 300
    with pytest.raises(UserError, match="less than a sequence of 256 tokens takes; give 49"):
        open_model(ModelOptions(folder, NAME, memory=255 * 4 * token))


def test_each_part_of_a_mesh_has_its_share(folder, settings):
    mesh = {"expert": 4, "tensor": 2}
    open_model(ModelOptions(folder, NAME, rows=6, mesh=mesh))
    assert settings[-1].rows == 8 and settings[-1].cache_tokens == 8 * 256
    with pytest.raises(UserError, match="in each of the batch's 4 parts"):
        open_model(ModelOptions(folder, NAME, memory=3 * 256 * 4 * 48, mesh=mesh))


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    other = write_checkpoint(tmp_path / NAME)
    file = other / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(UserError, match="they do not belong together"):
        open_model(ModelOptions(other, NAME))


def test_a_token_of_v3_takes_70272_bytes_and_on_a_tpu_whole_lanes():
    config = load_model_config("v3-671b")
    assert token_bytes(config, 2, drafts=0) == 70_272
    assert token_bytes(config, 2, drafts=1) == 71_424
    assert cache_shape(config, mtp=True, backend="tpu") == (62, 640)
