"""The chat page: what it is made of, and, where there is a browser, what it does."""

import base64
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from dsjax.serving.page import content_security_policy, read_page
from tests.serving.ports import DIRECT, Port, open_port, until
from tests.serving.scripted import ScriptedEngine, make_served, tokenizer

TEXT = read_page()


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# ---------------------------------------------------------------------------------------------
# What it is made of
# ---------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere():
    elements = Elements(TEXT).found
    assert not [tag for tag, attributes in elements if "src" in attributes]
    links = [a["href"] for tag, a in elements if tag == "link"]
    assert links and all(link.startswith("data:image/svg+xml,") for link in links)
    addresses = set(re.findall(r"https?://[\w./]+", TEXT)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set() and "@import" not in TEXT and "url(" not in TEXT


def test_text_of_the_model_cannot_become_markup():
    ways = "innerHTML outerHTML insertAdjacentHTML setHTML document.write DOMParser srcdoc"
    for way in [*ways.split(), "createContextualFragment", "eval(", "Function("]:
        assert way not in TEXT
    handlers = [a for _, attributes in Elements(TEXT).found for a in attributes if a[:2] == "on"]
    assert handlers == [] and 'style="' not in TEXT


def test_every_control_has_a_name():
    inside = re.sub(r"<label.*?</label>", "", TEXT, flags=re.DOTALL)  # labelled by what is around
    for tag, attributes in Elements(inside).found:
        if tag in ("input", "textarea", "select"):
            assert "aria-label" in attributes, attributes
    assert '<html lang="en">' in TEXT and 'aria-live="polite"' in TEXT


def test_every_id_that_the_script_asks_for_is_there():
    ids = {attributes["id"] for _, attributes in Elements(TEXT).found if "id" in attributes}
    assert set(re.findall(r'\$\("([\w-]+)"\)', TEXT)) <= ids


def test_the_policy_allows_what_is_in_the_page_and_nothing_else():
    policy = content_security_policy(b"<style>a</style><script>b</script>")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digest = {
        text: base64.b64encode(hashlib.sha256(text).digest()).decode() for text in (b"a", b"b")
    }
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["style-src"] == f"'sha256-{digest[b'a']}'"
    assert rules["script-src"] == f"'sha256-{digest[b'b']}'"
    assert rules["connect-src"] == "'self'" and rules["frame-ancestors"] == "'none'"
    assert TEXT.count("<script") == TEXT.count("<script>") == 1
    assert TEXT.count("<style") == TEXT.count("<style>") == 1


def test_the_page_is_served_with_its_policy():
    with open_port() as port:
        answer = httpx.get(port.url, **DIRECT)
    assert answer.text == TEXT
    assert answer.headers["content-security-policy"] == content_security_policy(TEXT.encode())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


# ---------------------------------------------------------------------------------------------
# What it does: needs playwright and a Chromium
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="a browser is no Python package: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome on the path: install one to see the page run")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a port's page; in the end nothing may have gone wrong in it."""
    contexts, problems = [], []

    def visit(port: Port, **context: Any) -> Any:
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(port.url)
        page.wait_for_selector("h1:not(:text-is('dsjax'))")
        return page

    yield visit
    for context in contexts:
        context.close()
    # What the server refused is on the console, too.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def saying(thought: str, text: str, **options: Any) -> ScriptedEngine:
    """An engine that thinks and says this, whatever it is asked."""
    tags = tokenizer().added_tokens
    script = [tags["<think>"], *tokenizer().encode(thought), tags["</think>"]]
    script += [*tokenizer().encode(text), tokenizer().eos_id]
    return ScriptedEngine(lambda _: script, eos=tokenizer().eos_id, **options)


def test_a_thought_streams_and_folds_away(visit: Any):
    with open_port(saying("hm " * 50, "so be it", step_seconds=0.01)) as port:
        page = visit(port)
        ask(page, "well?")
        assert page.inner_text(".user") == "well?"
        page.wait_for_selector("details[open] div:has-text('hm hm')")
        page.wait_for_selector("details:not([open])")
        page.wait_for_selector(".meta")
        assert page.inner_text(".answer") == "so be it"
        assert page.inner_text("summary").startswith("Thought for ")
        assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s", page.inner_text(".meta"))


def test_markdown_is_shown_and_markup_is_text(visit: Any):
    evil = "<img src=x onerror=alert(1)> <b>x</b> [a](javascript:alert(1))"
    text = f"# Title\n\n{evil}\n\n- *one*\n- **two**\n  still\n\n3. c\n\n"
    text += "> q\n\n```py\n<i>\n```\n---\n`c`"
    with open_port(saying("", text)) as port:
        page = visit(port)
        ask(page, evil)
        page.wait_for_selector(".meta")
        assert page.inner_text(".user") == evil
        assert page.inner_text(".answer > p") == evil
        assert page.locator(".answer").locator("img, b, i, a, script").count() == 0
        assert page.inner_text("h2") == "Title" and page.inner_text("pre") == "<i>"
        assert page.locator(".answer li").all_inner_texts() == ["one", "two\nstill", "c"]
        assert page.get_attribute(".answer ol", "start") == "3"
        assert page.inner_text("blockquote") == "q" and page.locator("hr").count() == 1
        tags = page.locator(".answer").locator("em, strong, code").all_inner_texts()
        assert tags == ["one", "two", "c"]


def test_stop_cancels_and_what_came_stays(visit: Any):
    with open_port(saying("", "x" * 400, step_seconds=0.01)) as port:
        page = visit(port)
        ask(page, "go on")
        page.wait_for_selector(".answer:has-text('xxxx')")
        page.click("#send[aria-label=Stop]")
        page.wait_for_selector(".meta:has-text('stopped')")
        until(lambda: len(port.engine.cancelled) == 1, seconds=1)
        assert page.inner_text(".answer").startswith("xxxx")
        assert page.get_attribute("#send", "aria-label") == "Send"


def test_the_conversation_goes_on_and_a_new_one_forgets_it(visit: Any):
    with open_port(saying("hm", "yes", rows=1)) as port:
        page = visit(port)
        sent = []
        page.on("request", lambda request: sent.append(request.post_data_json))
        page.click("#open")
        page.fill("#system", "be brief")
        page.fill("#temperature", "0.5")
        page.fill("#most", "99")
        page.click(".done")
        for question in ("one", "two"):
            ask(page, question)
            page.wait_for_selector(f"article:has-text('{question}') + article .meta")
        page.click("#new")
        assert page.locator("article").count() == 0 and page.is_visible("#welcome")
        ask(page, "three")
        page.wait_for_selector(".meta")
    first = {"role": "system", "content": "be brief"}
    assert sent[1]["messages"] == [
        first,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"},
    ]
    assert (sent[1]["temperature"], sent[1]["max_tokens"]) == (0.5, 99)
    assert sent[2]["messages"] == [first, {"role": "user", "content": "three"}]


def test_an_error_is_shown_and_the_question_is_not_lost(visit: Any):
    with open_port(saying("", "yes")) as port:
        page = visit(port)
        ask(page, "long" * 200)
        page.wait_for_selector(".error:has-text('maximum context length is 512 tokens')")
        assert page.input_value("#input") == "long" * 200
        page.fill("#input", "a")
        page.keyboard.press("Shift+Enter")
        assert page.input_value("#input") == "a\n"
        ask(page, "short")
        page.wait_for_selector(".meta")


def test_an_error_is_in_view_wherever_the_conversation_is_scrolled(visit: Any):
    with open_port(saying("", "line\n\n" * 60, rows=1), make_served(context=4000)) as port:
        page = visit(port, viewport={"width": 360, "height": 420})
        ask(page, "much")
        page.wait_for_selector(".meta")
        page.evaluate("document.getElementById('scroll').scrollTop = 0")
        ask(page, "long " * 2000)
        page.wait_for_selector("#problem:has-text('maximum context length')")
        assert page.evaluate("document.getElementById('scroll').scrollTop = 0") == 0
        for height in (420, 280):  # then a keyboard comes over the page, as on iOS
            page.evaluate(
                """(value) => { Object.defineProperty(visualViewport, "height",
                     {value, configurable: true});
                   visualViewport.dispatchEvent(new Event("resize")); }""",
                height,
            )
            for control in ("#problem", "#send", "#input", "#open", "#new"):
                box = page.locator(control).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= 360
                assert box["y"] >= 0 and box["y"] + box["height"] <= height
        assert page.inner_text("article:last-child .meta") == "not answered"
        ask(page, "short")
        assert page.locator("#problem").is_hidden()
        page.wait_for_selector("article:last-child .meta:has-text('tokens')")


def test_copied_code_compiles(visit: Any):
    text = "1. First\n   - a\n2. Second\n\n   ```python\n   def f():\n       return 1\n   ```\n"
    with open_port(saying("", text)) as port:
        page = visit(port, permissions=["clipboard-read", "clipboard-write"])
        ask(page, "code")
        page.wait_for_selector(".meta")
        assert page.locator(".answer > ol > li").count() == 2
        page.click("text=Copy")
        page.wait_for_selector("text=Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == "def f():\n    return 1"


def test_the_page_works_below_a_path(visit: Any):
    """A proxy may put the server below a path: the page asks relative to where it is."""
    with open_port(saying("", "yes")) as port:
        asked = []
        context = visit(port).context.browser.new_context()
        page = context.new_page()

        def forward(route: Any) -> None:
            asked.append(route.request.url)
            route.continue_(url=route.request.url.replace("/llm/", "/"))

        page.route("**/llm/**", forward)
        page.goto(f"{port.url}/llm/")
        page.wait_for_selector("h1:text-is('m')")
        ask(page, "well?")
        page.wait_for_selector(".meta")
        context.close()
    assert f"{port.url}/llm/v1/chat/completions" in asked


def test_an_engine_that_fails_in_the_middle_is_told(visit: Any):
    with open_port(saying("", "x" * 400, step_seconds=0.01)) as port:
        page = visit(port)
        ask(page, "go on")
        page.wait_for_selector(".answer:has-text('xxxx')")
        port.engine.fail_at_step = 0
        page.wait_for_selector(".error:has-text('the engine has failed')")


def test_a_base_model_completes(visit: Any):
    eos = tokenizer().eos_id
    engine = ScriptedEngine(lambda _: [*tokenizer().encode(" a time"), eos], eos=eos)
    with open_port(engine, make_served(chat=False)) as port:
        page = visit(port)
        assert page.is_checked("#plain")
        ask(page, "Once upon")
        page.wait_for_selector(".meta")
        assert page.inner_text(".answer") == "Once upon a time"
        page.click("#open")
        page.check("[name=mode]:not(#plain)")
        page.click(".done")
        ask(page, "and chat?")
        page.wait_for_selector(".error:has-text('no chat template')")


def test_the_key_that_opens_the_page_opens_the_rest(visit: Any):
    with open_port(saying("", "yes"), keys=("sk-1",)) as port:
        page = visit(port, http_credentials={"username": "", "password": "sk-1"})
        ask(page, "well?")
        page.wait_for_selector(".answer:has-text('yes')")


def test_it_fits_a_phone(visit: Any):
    text = "a" * 300 + "\n\n```\n" + "b" * 300 + "\n```"
    with open_port(saying("c" * 300, text), make_served(context=2000)) as port:
        page = visit(port, viewport={"width": 320, "height": 560})
        ask(page, "d" * 300)
        page.wait_for_selector(".meta")
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        assert page.evaluate("document.getElementById('talk').scrollWidth") <= 320


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen-32B-AWQ-" + "4bit" * 7, "m" * 90])
def test_every_control_is_reachable_with_a_long_name(visit: Any, name: str):
    served = dataclasses.replace(make_served(), name=name)
    with open_port(saying("", "yes"), served) as port:
        page = visit(port)
        for width in (320, 360, 412, 1280):
            page.set_viewport_size({"width": width, "height": 640})
            assert page.inner_text("h1") == name
            assert page.evaluate("document.documentElement.scrollWidth") == width
            for control in ("#new", "#open", "#input", "#send"):
                box = page.locator(control).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width
                assert box["width"] >= 30 and box["height"] >= 20
            page.click("#open")
            page.click(".done")
