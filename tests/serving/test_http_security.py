"""Who may speak to the port."""

import base64
import hmac
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from dsjax.errors import UserError
from dsjax.serving.http import HttpSettings, run_http
from dsjax.serving.security import check_exposure, read_keys
from tests.serving.ports import DIRECT, Port, open_port
from tests.serving.scripted import ScriptedEngine, make_served

KEYS = ("sk-one", "sk-zwei-ü")


@pytest.fixture(scope="module")
def locked() -> Iterator[Port]:
    with open_port(keys=KEYS) as port:
        yield port


@pytest.fixture(scope="module")
def unlocked() -> Iterator[Port]:
    with open_port() as port:
        yield port


def basic(password: str, user: str = "") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/metrics", "/openapi.json", "/v1/completions", "/nowhere", "//"]
)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer sk-on", "Bearer sk-one2", "sk-one", "Token sk-one",
     basic("wrong"), basic("", "sk-one"), "Basic !", "Basic " + "A" * 5, "Bearer sk-one, x"],
)  # fmt: skip
def test_every_route_but_health_needs_a_key(locked: Port, path: str, authorization: str | None):
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = httpx.get(locked.url + path, headers=headers, **DIRECT)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
    assert answer.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


def test_health_needs_none(locked: Port):
    assert httpx.get(locked.url + "/health", **DIRECT).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer sk-one",
        "bearer  sk-one",
        basic("sk-one"),
        basic("sk-one", "anyone"),
        basic(KEYS[1]),
    ],
)
def test_each_key_opens_as_token_and_as_password(locked: Port, authorization: str):
    headers = {"Authorization": authorization}
    answer = httpx.get(locked.url + "/v1/models", headers=headers, **DIRECT)
    assert answer.status_code == 200
    page = httpx.get(locked.url, headers=headers, **DIRECT)
    assert page.headers["content-type"].startswith("text/html")


def test_a_key_outside_ascii_opens_as_the_bytes_it_is(locked: Port):
    headers = {b"Authorization": b"Bearer " + KEYS[1].encode()}
    answer = httpx.get(locked.url + "/v1/models", headers=headers, **DIRECT)
    assert answer.status_code == 200


def test_the_body_of_a_stranger_is_not_read(locked: Port):
    with locked.connect() as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_openai_client_with_and_without_the_key(locked: Port):
    with locked.openai() as client:
        assert client.models.list().data[0].id == "m"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()


def test_keys_are_compared_by_digest_and_all_of_them(locked: Port, monkeypatch: pytest.MonkeyPatch):
    compared = []

    def watching(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr("dsjax.serving.security.hmac.compare_digest", watching)
    headers = {"Authorization": "Bearer sk-one"}
    httpx.get(locked.url + "/v1/models", headers=headers, **DIRECT)
    assert hmac.compare_digest is watching and compared == [(32, 32)] * 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "["])
def test_a_rebound_name_is_refused_where_there_is_no_key(unlocked: Port, locked: Port, host: str):
    answer = httpx.get(unlocked.url, headers={"Host": host}, **DIRECT)
    assert answer.status_code == 421 and answer.json()["error"]["code"] == "bad_host"
    headers = {"Host": "model.example", "Authorization": "Bearer sk-one"}
    assert httpx.get(locked.url, headers=headers, **DIRECT).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"])
def test_its_own_names_are_known(unlocked: Port, host: str):
    answer = httpx.get(unlocked.url, headers={"Host": host}, **DIRECT)
    assert answer.status_code == 200


def test_other_sites_cannot_make_it_work(unlocked: Port):
    """What a browser sends to another site without asking for permission is no JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, "Origin": "https://evil.example"}
        url = unlocked.url + "/v1/completions"
        answer = httpx.post(url, content=b"{}", headers=headers, **DIRECT)
        assert answer.status_code == 415


def test_nobody_listens_beyond_loopback_without_a_key():
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        check_exposure(host, (), without_key=False)
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", ""):
        check_exposure(host, ("key",), without_key=False)
        check_exposure(host, (), without_key=True)
        with pytest.raises(UserError, match="no API key is set"):
            check_exposure(host, (), without_key=False)
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached"):
        run_http(ScriptedEngine(), make_served(), HttpSettings(host="0.0.0.0"))


def test_a_port_that_is_taken_is_the_users_matter(unlocked: Port):
    settings = HttpSettings(port=unlocked.address[1])
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:"):
        run_http(ScriptedEngine(), make_served(), settings)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-a\n\n  sk-b  \nsk-a\n", encoding="utf-8")
    assert read_keys(None, {}) == ()
    assert read_keys(file, {}) == ("sk-a", "sk-b")
    assert read_keys(file, {"DSJAX_API_KEYS": "sk-c sk-b"}) == ("sk-c", "sk-b", "sk-a")
    file.write_text("sk-a\r\nsk-b\r\n", encoding="utf-8-sig")  # as Windows tools write it
    assert read_keys(file, {}) == ("sk-a", "sk-b")
    file.write_text("# none\n")
    with pytest.raises(UserError, match="no API key in it"):
        read_keys(file, {})
    with pytest.raises(UserError, match="cannot read"):
        read_keys(tmp_path / "missing", {})
