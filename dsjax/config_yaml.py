"""YAML as configurations are written in it: no key twice, no aliases, and numbers as in YAML 1.2.

PyYAML reads YAML 1.1, where `1e-4` is a text, `010` is eight, `2024-01-01` a date, `12:30` a number
of minutes and `no` is false. Settings follow the core schema of YAML 1.2 (section 10.3) instead;
a setting that is true or false still takes yes and no.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from dsjax.errors import UserError, one_line

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Without aliases: ten of ten of ten ... is a text of a page, and fills any memory."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read; write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands twice, in lines {lines[key.value]} and {line}; "
                    "keep one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        """An integer, in which a leading zero is no sign of octal."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def parse_yaml(text: str, what: str) -> Any:
    """Read one YAML document.

    Raises:
        UserError: it is none; the message begins with `what`.
    """
    try:
        return yaml.load(text, _Loader)
    # A number of 5,000 digits is a ValueError of Python's own.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read as YAML: {one_line(error)}") from error


def write_yaml(tree: dict[str, Any]) -> bytes:
    """The document that `parse_yaml` reads as `tree`, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False).encode()
