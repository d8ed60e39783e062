"""Tests in one jail, the code that they test in another.

Tests written as assertions call the model's functions and compare what they return. In one process
the model's code could change the comparison, read what is expected from a frame, or end with
success before anything is compared. So the tests hold stand-ins: a call travels as JSON to the
model's process, and what comes back is plain data made anew on this side, whose `==` is Python's
own. Objects of the model's classes stay where they are, behind further stand-ins; such a one is
equal to no plain data, whatever its class says.
"""

from __future__ import annotations

import ast
import builtins
import json
import operator
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dsjax.rewards.inside import load_program

_LONGEST = 4 << 20
"""Bytes of one message."""

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "len": len,
    "iter": iter,
    "next": next,
    "eq": operator.eq,
    "bool": bool,
    "str": str,
    "repr": repr,
}


class Gone(BaseException):
    """The model's process ended, or sent what is no message: no test goes on after that."""


# ---------------------------------------------------------------------------------------------
# Values as JSON: plain data by value, everything else by number
# ---------------------------------------------------------------------------------------------


def pack(value: Any, refer: Callable[[Any], int]) -> Any:
    """Plain data as JSON can say it; `refer` gives a number to anything else."""
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    for kind in (bytes, bytearray):
        if isinstance(value, kind):
            return {kind.__name__: value.hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, refer), pack(v, refer)] for k, v in value.items()]}
    return {"object": refer(value)}


def unpack(packed: Any, look_up: Callable[[int], Any]) -> Any:
    """The value that `pack` packed."""
    if not isinstance(packed, dict):
        if packed is None or isinstance(packed, bool | str):
            return packed
        raise ValueError("no packed value")
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(content)
    if kind == "dict":
        return {unpack(k, look_up): unpack(v, look_up) for k, v in content}
    if kind == "object":
        return look_up(content)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](
        unpack(item, look_up) for item in content
    )


# ---------------------------------------------------------------------------------------------
# The model's side
# ---------------------------------------------------------------------------------------------


def serve(code: str, channel: socket.socket) -> None:
    """Execute the model's code, then do what the tests ask of it until they are done."""
    names = load_program(code, "answer")
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    stream = channel.makefile("rwb")
    while line := stream.readline():
        operation, args, kwargs = json.loads(line)
        try:
            args, kwargs = (unpack(part, objects.__getitem__) for part in (args, kwargs))
            if operation == "name":
                done = names[args[0]]
            else:
                done = _OPERATIONS[operation](*args, **kwargs)
            reply = {"done": pack(done, refer)}
        except (Exception, SystemExit) as error:
            reply = {"raised": _known_name(error), "said": str(error)[:1000]}
        stream.write(json.dumps(reply).encode() + b"\n")
        stream.flush()


def _known_name(error: BaseException) -> str:
    """The name of the nearest of Python's own classes, for the tests cannot know the model's."""
    return next(
        kind.__name__
        for kind in type(error).__mro__
        if getattr(builtins, kind.__name__, None) is kind
    )


# ---------------------------------------------------------------------------------------------
# The tests' side
# ---------------------------------------------------------------------------------------------


class _Line:
    """The line to the model's process."""

    def __init__(self, channel: socket.socket):
        self._stream = channel.makefile("rwb")
        self.lost = False

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """What the model's process makes of it; an exception there is one here."""
        packed = [operation, pack(args, _number_of), pack(kwargs, _number_of)]
        try:
            self._stream.write(json.dumps(packed).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline(_LONGEST)
            reply = json.loads(line)
            if "done" in reply:
                return unpack(reply["done"], lambda number: _StandIn(self, int(number)))
            name, said = str(reply["raised"]), str(reply["said"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            self.lost = True
            raise Gone from error
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(said)
        raise RuntimeError(said)


class _StandIn:
    """Something of the model's, of which only these questions can be asked."""

    def __init__(self, line: _Line, number: int):
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._line.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._line.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._line.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self._line.ask("len", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._line.ask("iter", self)
        if not isinstance(iterator, _StandIn):
            raise TypeError("not iterable")
        return iterator

    def __next__(self) -> Any:
        return self._line.ask("next", self)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _StandIn) and self._line.ask("eq", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __contains__(self, item: Any) -> bool:
        raise TypeError("`in` would trust the model's own class; compare with plain data")

    def __bool__(self) -> bool:
        return self._line.ask("bool", self)

    def __str__(self) -> str:
        return self._line.ask("str", self)

    def __repr__(self) -> str:
        return self._line.ask("repr", self)


def _number_of(value: Any) -> int:
    if isinstance(value, _StandIn):
        return object.__getattribute__(value, "_number")
    raise TypeError(f"{type(value).__name__} cannot be sent to the model's process; use plain data")


def check(tests: str, entry_point: str | None, channel: socket.socket, output: int) -> None:
    """Run the tests against the code at the other end of `channel`; write the verdict as JSON.

    {"passed": ...} is true where the tests ran to their end and checked something; {"gone": true}
    says that the other end is no more, {"broken": ...} what is wrong with the tests themselves.
    """
    said: dict[str, Any]
    line = _Line(channel)
    checks = 0

    def count() -> None:
        nonlocal checks
        checks += 1

    try:
        tree, names, modules = _prepare(tests, entry_point)
        space: dict[str, Any] = {"__name__": "tests", _COUNT: count}
        space |= {name: __import__(name) for name in modules}
        space |= {name: line.ask("name", name) for name in names}
        exec(compile(tree, "tests", "exec"), space)
        if line.lost:  # and the tests caught that, with everything else
            raise Gone
        said = {"passed": True} if checks else {"broken": "they check nothing"}
    except Gone:
        said = {"gone": True}
    except SyntaxError as error:
        said = {"broken": f"they are no Python: {error}"}
    except MemoryError:
        raise
    except (Exception, SystemExit):
        said = {"passed": False}
    with os.fdopen(output, "w") as file:
        json.dump(said, file)


_COUNT = "__count__"


class _Counting(ast.NodeTransformer):
    """Counts every assertion that is met."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        """The assertion, and before it a call."""
        call = ast.parse(f"{_COUNT}()").body[0]
        return [ast.copy_location(call, node), node]


def _prepare(tests: str, entry_point: str | None) -> tuple[ast.Module, set[str], set[str]]:
    """The tests as a tree that counts, and the names in it that only the model can have made.

    The third are names of modules that the tests did not import: `math` in `math.isclose(...)`.
    They are not the model's, which could bring a `math` of its own.
    """
    tree = ast.parse(tests)
    nodes = list(ast.walk(tree))
    made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if entry_point and "check" in made:
        tree.body += ast.parse(f"check({entry_point})").body
        nodes += ast.walk(tree.body[-1])
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    owners = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    bare = {node.id for node in nodes if isinstance(node, ast.Name) and node not in owners}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    names = {name for name in used - made if not hasattr(builtins, name)}
    modules = (names - bare) & sys.stdlib_module_names - {entry_point}
    names = names - modules | ({entry_point} if entry_point else set())
    return ast.fix_missing_locations(_Counting().visit(tree)), names, modules
