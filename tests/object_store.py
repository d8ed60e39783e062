"""A bucket in memory, behind as much of Google Cloud Storage's JSON API as is used here.

It counts what is sent and can fail on demand. Served over HTTP, as the store is, so that the real
library talks to it, from this process and from others.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
import pytest

from dsjax import places

BUCKET = "models"

# gcsfs, as orbax uses it, would ask by gRPC what kind of bucket this is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Failure = Callable[[str, str], "tuple[int, str] | None"]
"""From method and object's name to a status and message, or None to let it pass."""


class ObjectStore:
    """One bucket; a context manager that serves it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.sent: Counter[str] = Counter()
        """Bytes of each object that were sent out."""
        self.seen: Counter[str] = Counter()
        """Requests by method and object's name."""
        self.fail: Failure = lambda method, name: None
        self.page = 3
        """Objects of one page of a listing: small, so that there are several."""
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.clock = itertools.count(1_700_000_000_000_000)
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ObjectStore:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, data: bytes) -> dict[str, str]:
        with self.lock:
            self.objects[name] = data
            self.generations[name] = next(self.clock)
        return self.describe(name)

    def put_folder(self, name: str, folder: Path) -> str:
        """A copy of a folder, and its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"gs://{BUCKET}/{name}"

    def tree(self, name: str) -> dict[str, bytes]:
        """Every object of a folder."""
        begin = f"{name}/"
        return {k.removeprefix(begin): v for k, v in self.objects.items() if k.startswith(begin)}

    def forget(self) -> None:
        """Count from zero."""
        self.sent.clear()
        self.seen.clear()

    def describe(self, name: str) -> dict[str, str]:
        data = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(data)),
            "generation": str(self.generations[name]),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # An answer in one packet, at once: else each waits for the other side to acknowledge.
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            self.connection.settimeout(30)

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _json(self, tree: object) -> None:
            self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")

        def _error(self, status: int, message: str) -> None:
            error = {"error": {"code": status, "message": message}}
            self._answer(status, json.dumps(error).encode(), Content_Type="application/json")

        def _begin(self) -> bytes:
            """Where the request goes, what it asks for, and its body."""
            parts = urlsplit(self.path)
            self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            found = re.fullmatch(r"(?:/\w+)*/b/([^/]+)(?:/o(?:/(.+))?)?", parts.path)
            self.bucket, name = (found[1], found[2] or "") if found else ("", "")
            self.name = unquote(name) or self.query.get("name", "")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.query.get("uploadType") == "multipart":
                self.name = json.loads(body.split(b"\n\n", 2)[1].split(b"\n--")[0])["name"]
            return body

        def _refused(self) -> bool:
            with store.lock:
                store.seen[f"{self.command} {self.name}"] += 1
            failure = store.fail(self.command, self.name)
            if failure:
                self._error(*failure)
            elif self.bucket and self.bucket != BUCKET:
                self._error(404, "The specified bucket does not exist.")
            return bool(failure) or self.bucket not in ("", BUCKET)

        def do_GET(self) -> None:
            self._begin()
            if self._refused():
                return
            if not self.name:
                self._list()
            elif self.name not in store.objects:
                self._error(404, f"No such object: {self.name}")
            elif self.query.get("alt") == "media":
                self._send(store.objects[self.name])
            else:
                self._json(store.describe(self.name))

        def _list(self) -> None:
            """A page of the names that begin with `prefix`; what is behind `delimiter` is cut."""
            begin, after = self.query.get("prefix", ""), self.query.get("pageToken", "")
            delimiter = self.query.get("delimiter")
            shown: list[str] = []
            for name in sorted(store.objects):
                if name.startswith(begin) and name >= self.query.get("startOffset", ""):
                    head, cut, _ = name[len(begin) :].partition(delimiter or "\0")
                    shown.append(begin + head + (cut if delimiter else ""))
            shown = [name for name in dict.fromkeys(shown) if name > after]
            page = min(store.page, int(self.query.get("maxResults", store.page)))
            more = {"nextPageToken": shown[page - 1]} if len(shown) > page else {}
            folders = [n for n in shown[:page] if delimiter and n.endswith(delimiter)]
            names = [n for n in shown[:page] if n not in folders]
            self._json(
                {
                    "kind": "storage#objects",
                    "items": [store.describe(n) for n in names],
                    "prefixes": folders,
                    **more,
                }
            )

        def _send(self, data: bytes) -> None:
            headers = {"X_Goog_Generation": str(store.generations[self.name])}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                first, last, size = int(wanted[1]), int(wanted[2] or len(data) - 1), len(data)
                if first >= size:
                    self._error(416, "The requested range cannot be satisfied.")
                    return
                data = data[first : last + 1]
                headers["Content_Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
            with store.lock:
                store.sent[self.name] += len(data)
            self._answer(206 if wanted else 200, data, **headers)

        def do_POST(self) -> None:
            body = self._begin()
            upload = self.query.get("upload_id")
            if upload is not None and upload in store.uploads:
                self.name = store.uploads[upload][0]
            if self._refused():
                return
            wanted = int(self.query.get("ifGenerationMatch", -1))
            if wanted >= 0 and wanted != store.generations.get(self.name, 0):
                self._error(412, "At least one of the pre-conditions did not hold.")
            elif self.query.get("uploadType") == "media":
                self._json(store.put(self.name, body))
            elif self.query.get("uploadType") == "multipart":
                data = body.split(b"\n\n", 2)[2].removesuffix(b"\n--==0==--")
                self._json(store.put(self.name, data))
            elif upload is None:
                upload = str(next(store.clock))
                store.uploads[upload] = (self.name, bytearray())
                place = f"{store.address}/upload/storage/v1/b/{BUCKET}/o?upload_id={upload}"
                self._answer(200, Location=place)
            else:
                self._part(upload, body)

        def _part(self, upload: str, body: bytes) -> None:
            """Some of an object, and perhaps the last of it."""
            name, data = store.uploads[upload]
            wanted = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
            assert wanted is not None
            if wanted[1] is not None:
                assert int(wanted[1]) <= len(data), "a hole"
                data[int(wanted[1]) :] = body
            if wanted[2] == "*":
                assert len(body) % 2**18 == 0
                self._answer(308, Range=f"bytes=0-{len(data) - 1}")
                return
            assert len(data) == int(wanted[2])
            del store.uploads[upload]
            self._json(store.put(name, bytes(data)))

        def do_DELETE(self) -> None:
            self._begin()
            if self._refused():
                return
            if upload := self.query.get("upload_id"):
                store.uploads.pop(upload, None)
                self._answer(499)
            elif self.name not in store.objects:
                self._error(404, f"No such object: {self.name}")
            else:
                with store.lock:
                    del store.objects[self.name], store.generations[self.name]
                self._answer(204)

    return Handler


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A bucket that the library takes for the store."""
    with ObjectStore() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        # What orbax writes with: tensorstore, and one gcsfs for all of a process.
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", running.address)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "a token")
        if (library := sys.modules.get("gcsfs")) is not None:
            library.GCSFileSystem.clear_instance_cache()
        monkeypatch.setattr("random.random", lambda: 0.0)  # how long the library waits to retry
        places._store.cache_clear()
        yield running
