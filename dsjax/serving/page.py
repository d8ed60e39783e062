"""The chat page, sent as one file, and a policy under which it can run nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")


@cache
def read_page() -> str:
    """Read page.html, with its style and scripts in the positions of their names in braces."""
    html = (FOLDER / "page.html").read_text("utf-8")
    return re.sub(
        r"\{(\w+\.(?:css|js))\}", lambda name: (FOLDER / name[1]).read_text("utf-8"), html
    )


def page_response() -> Response:
    """The page. It holds no secret: what it shows it fetches with the browser's own key."""
    html = read_page().encode()
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Response(html, headers=headers, media_type="text/html")


def content_security_policy(html: bytes) -> str:
    """Nothing runs but the page's own script and style, and nothing is asked but this server.

    Text of the model that came to be markup by a mistake could run no script, load no picture and
    send nothing anywhere.
    """
    return "; ".join([
        "default-src 'none'",
        f"script-src {_hashes('script', html)}",
        f"style-src {_hashes('style', html)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ])  # fmt: skip


def _hashes(tag: str, html: bytes) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
