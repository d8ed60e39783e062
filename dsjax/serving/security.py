"""Who may speak to the port: keys, host names, and how far the port may be heard.

Three doors are shut. A stranger needs a key. A page of another site, open in the user's browser,
cannot speak to an unkeyed port on loopback: names that were rebound to 127.0.0.1 are refused here,
and a body must be `application/json` (`wire.py`), which a browser sends to another site only with
a permission that this server never gives. And without a key nobody listens beyond loopback.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsjax.errors import UserError
from dsjax.serving.protocol import RequestError
from dsjax.serving.wire import error_response

KEYS_VARIABLE = "DSJAX_API_KEYS"


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys in a file, one a line (`#` begins a comment), and those in DSJAX_API_KEYS.

    Raises:
        UserError: a file that cannot be read or has no key in it.
    """
    keys = environment.get(KEYS_VARIABLE, "").split()
    if file:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the API keys in {file}: {error}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{file} has no API key in it; expected one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def check_exposure(host: str, keys: Iterable[str], *, without_key: bool) -> None:
    """Refuse to listen beyond loopback without a key, unless that is said to be meant.

    Raises:
        UserError: names both ways out.
    """
    if not is_loopback(host) and not any(keys) and not without_key:
        raise UserError(
            f"{host} can be reached from other machines, and no API key is set: give keys by "
            f"--api-key-file or {KEYS_VARIABLE}, or say --without-key"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port on `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost")
    (True, True, True)
    >>> is_loopback("0.0.0.0"), is_loopback("example.com")
    (False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Stands before the app: the wrong host name or key goes no further.

    A key is a bearer token, as OpenAI's clients send it, or the password of HTTP's basic scheme:
    this is what a browser asks for, and sends again with the page's own requests.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], hosts: Iterable[str] | None):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or answer with 401 or 421."""
        if scope["type"] == "http" and (error := self._objection(scope)):
            headers = {}
            if error.status == 401:
                # Only the page makes a browser ask; a program's 401 stays a program's matter.
                page = scope["path"] == "/"
                headers["WWW-Authenticate"] = (
                    'Basic realm="dsjax", charset="UTF-8"' if page else "Bearer"
                )
            await error_response(error, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            return RequestError(
                421, "this server is not known by that Host; use its own address", code="bad_host"
            )
        if self._digests and scope["path"] != "/health":
            return self._key_objection(headers.get("authorization", ""))
        return None

    def _key_objection(self, authorization: str) -> RequestError | None:
        scheme, _, credentials = authorization.partition(" ")
        key = _PASSES.get(scheme.lower(), lambda _: b"")(credentials.strip())
        if not key:
            message = "an API key is needed, as `Authorization: Bearer KEY`"
            return RequestError(401, message, code="missing_api_key")
        digest = _digest(key)
        # All are compared, each in constant time: how long this takes says nothing about any key.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            return RequestError(401, "this API key is not known", code="invalid_api_key")
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _password(credentials: str) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


# A header is bytes, which Starlette reads as latin-1.
_PASSES = {"bearer": lambda credentials: credentials.encode("latin-1"), "basic": _password}


def _host_name(host: str) -> str:
    """A Host header without its port.

    >>> _host_name("localhost:8000"), _host_name("[::1]:8000"), _host_name("::1]")
    ('localhost', '::1', '')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
