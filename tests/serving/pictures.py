"""Takes the pictures of the page for docs/: `python -m tests.serving.pictures runs/demo`.

completion.png shows what the checkpoint's own model says, and of that the first that came. chat.png
shows an answer that is written here, since no model that thinks is small enough to be trained for a
picture. Needs playwright and a Chromium, as test_page.py does.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from dsjax.serving.opening import open_model
from dsjax.serving.options import ModelOptions
from tests.serving.ports import Port, open_port
from tests.serving.scripted import ScriptedEngine, make_served, tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
VIEW: dict[str, Any] = {"viewport": {"width": 1000, "height": 860}, "device_scale_factor": 1.6}

BEGINNING = '''\
class Account:
    """What a client owns."""

    def __init__(self, name'''

QUESTION = "Why is the sum of the first n odd numbers a square?"
THOUGHT = (
    "One, four, nine: each is the one before and the next odd number. A picture says why. " * 8
)
ANSWER = """\
Lay the numbers out as cells. One cell is a square of side 1. Around a square of side *k* fits an \
**L-shaped border** of exactly 2*k* + 1 cells, and with it the square has side *k* + 1:

```text
1 3 5
3 3 5
5 5 5
```

So each odd number is the border that carries one square to the next, and after *n* of them the \
square has side *n*:

1. The border of step *k* has `2k - 1` cells.
2. All borders together fill the square, and none overlap.
3. Hence 1 + 3 + … + (2*n* − 1) = *n*².
"""


def take_completion(page: Any, port: Port) -> None:
    """The model goes on with a text, at a temperature at which small models do not repeat much."""
    page.goto(port.url)
    page.wait_for_selector("[placeholder='Begin a text']")
    page.click("#open")
    page.fill("#temperature", "0.5")
    page.fill("#most", "120")
    page.click(".done")
    ask(page, BEGINNING, DOCS / "completion.png")


def take_chat(page: Any, port: Port) -> None:
    """A thought that has folded away, and an answer with some Markdown in it."""
    page.goto(port.url)
    page.wait_for_selector("[placeholder='Write a message']")
    ask(page, QUESTION, DOCS / "chat.png")


def ask(page: Any, text: str, path: Path) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".meta")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # whatever fades or moves has come to rest
    page.screenshot(path=path)


def scripted() -> ScriptedEngine:
    """Says the answer that is written here."""
    tags, encode = tokenizer().added_tokens, tokenizer().encode
    script = [tags["<think>"], *encode(THOUGHT), tags["</think>"], *encode(ANSWER)]
    script.append(tokenizer().eos_id or 0)
    return ScriptedEngine(lambda _: script, eos=tokenizer().eos_id, step_seconds=0.004)


def main(checkpoint: Path) -> None:
    # Here, since whoever collects tests imports this module as well.
    from playwright.sync_api import sync_playwright

    engine, served = open_model(ModelOptions(checkpoint, checkpoint.name, rows=1))
    engine.warm_up()
    written = dataclasses.replace(make_served(context=4096), name="scripted-demo")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with open_port(engine, served) as port:
            take_completion(browser.new_context(**VIEW).new_page(), port)
        with open_port(scripted(), written) as port:
            take_chat(browser.new_context(**VIEW).new_page(), port)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
