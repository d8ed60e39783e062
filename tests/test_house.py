"""The rules of the house, read from its source: floors, sizes, docstrings, and a map that is true.

docs/architecture.md tells what the floors are for. Nothing of the house is imported here.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50

FLOORS = {
    "dsjax.errors": -1,
    "dsjax.config": 0,
    "dsjax.numerics": 0,
    "sharding": 1,
    "dsjax.kernels": 2,
    "dsjax.model": 3,
    "dsjax.checkpoint": 4,
    "dsjax.data": 4,
    "dsjax.inference": 5,
    "dsjax.training": 5,
    "dsjax.rewards": 5,
    "dsjax.serving": 6,
    "dsjax.posttraining": 6,
    "dsjax.evaluation": 6,
    "dsjax.planning": 7,
}
"""Each room's floor. A room imports from floors below its own, and from itself."""

ROOM_OF = dict.fromkeys(
    (
        "dsjax.architecture",
        "dsjax.config_files",
        "dsjax.config_grpo",
        "dsjax.config_keys",
        "dsjax.config_rewards",
        "dsjax.config_sample",
        "dsjax.config_serving",
        "dsjax.config_yaml",
        "dsjax.journal",
        "dsjax.config_sft",
        "dsjax.places",
        "dsjax.small_files",
    ),
    "dsjax.config",
)
"""Files of floor 0 that make one room with config.py."""

DOORS = {
    "dsjax",
    "dsjax.__main__",
    "dsjax.cli",
    "dsjax.cli_plan",
    "dsjax.cli_sample",
    "train",
    "serve",
}
"""They may import anything, and import late so that they open fast; no room imports a door."""

MESH_AXES = {"data", "fsdp", "context", "tensor", "stage"}
"""Without `expert`, which is also the logical name of a parameter's dimension."""


def _python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


DOOR_FILES = [path for path in (ROOT / "train.py", ROOT / "serve.py") if path.exists()]
HOUSE = {
    _module(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in [*_python_files("dsjax", "sharding"), *DOOR_FILES]
}


def _room(module: str) -> str:
    parts = module.split(".")
    room = parts[0] if parts[0] == "sharding" else ".".join(parts[:2])
    return ROOM_OF.get(room, room)


def _imports(module: str) -> set[str]:
    """Modules of the house that `module` imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(HOUSE[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; the house imports by full names"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in HOUSE else str(node.module) for name in below]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in ("dsjax", "sharding")}
    return found


def _rooms() -> Iterator[tuple[str, str]]:
    """Every import from inside a room, as (module, imported module)."""
    for module in HOUSE.keys() - DOORS:
        for imported in _imports(module):
            yield module, imported


def test_every_module_has_a_floor():
    homeless = [module for module in HOUSE.keys() - DOORS if _room(module) not in FLOORS]
    assert homeless == [], "a new room needs a floor here and a reason in docs/architecture.md"


def test_no_import_runs_up_or_across():
    wrong = [
        f"{module} (floor {FLOORS[_room(module)]}) imports {imported}"
        for module, imported in _rooms()
        if imported in DOORS
        or (_room(imported) != _room(module) and FLOORS[_room(imported)] >= FLOORS[_room(module)])
    ]
    assert wrong == []


def test_no_circle_of_imports():
    graph: dict[str, set[str]] = {}
    for module, imported in _rooms():
        graph.setdefault(module, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_every_package_has_an_init_file():
    """One without would be left out of the wheel."""
    folders = {path.parent for path in _python_files("dsjax", "sharding")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


# ---------------------------------------------------------------------------------------------
# Size and words
# ---------------------------------------------------------------------------------------------


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in [*_python_files("dsjax", "sharding", "tests", "benchmarks"), *DOOR_FILES]
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    lengths = {
        f"{module}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in HOUSE.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def _public(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """What is defined at the top and in public classes, but private names and dunder methods."""
    yield name, tree
    if isinstance(tree, ast.Module | ast.ClassDef):
        for node in tree.body:
            kinds = ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
            if isinstance(node, kinds) and not node.name.startswith("_"):
                yield from _public(node, f"{name}.{node.name}")


def test_every_public_symbol_has_a_docstring():
    silent = [
        name
        for module, tree in HOUSE.items()
        for name, node in _public(tree, module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is None
    ]
    assert silent == []


# ---------------------------------------------------------------------------------------------
# Who may say what
# ---------------------------------------------------------------------------------------------


def test_the_model_knows_no_mesh():
    """Logical names only: no partition spec, no mesh, no mesh axis."""
    said = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module, tree in HOUSE.items()
        if _room(module) in ("dsjax.model", "dsjax.kernels")
        for node in ast.walk(tree)
        if _speaks_of_a_mesh(node)
    ]
    assert said == []


def _speaks_of_a_mesh(node: ast.AST) -> bool:
    kinds = {"PartitionSpec", "NamedSharding", "Mesh"}
    match node:
        case ast.Constant(value=str(text)):
            return text in MESH_AXES
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in kinds
        case ast.ImportFrom(names=names):
            return not kinds.isdisjoint(alias.name for alias in names)
        case _:
            return False


def _texts() -> Iterator[tuple[str, str]]:
    """Every text file that belongs to the repository, and what it says."""
    folders = ("dsjax", "sharding", "configs", "tests", "benchmarks", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += ROOT.iterdir()
    for path in paths:
        if path.is_file() and path.suffix != ".pyc":
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8", errors="replace")


def test_no_file_names_a_package_registry():
    """Where packages come from is the business of the machine, not of the repository."""
    address = re.compile(r"index[-_]url|find[-_]links|://\S*(pypi|pythonhosted|npmjs|/simple\b)")
    here = str(Path(__file__).relative_to(ROOT))
    named = [name for name, text in _texts() if name != here and address.search(text)]
    assert named == []


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------

VERBS = {
    verb
    for path in (ROOT / "dsjax").glob("cli*.py")
    for verb in re.findall(r'add_parser\(\s*"(\w+)"', path.read_text())
}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_shows_the_house_as_it_is():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = text.split("## The map", 1)[1].split("```")[1]
    drawn: list[str] = []
    path: list[str] = []
    for line in block.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 4
        name, _, meaning = line.strip().partition(" ")
        assert meaning.strip(), f"{name} says nothing"
        path = [*path[:depth], name]
        assert (ROOT / "".join(path)).exists(), f"{''.join(path)} is drawn, but not there"
        if not name.endswith("/"):
            drawn.append("".join(path))
    folders = ("dsjax", "sharding", "configs", "deploy", "benchmarks", "docs", ".ci")
    there = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    there |= {*(ROOT / "tests").glob("*.py"), *DOOR_FILES}
    names = {str(path.relative_to(ROOT)) for path in there if path.suffix != ".pyc"}
    # A package's own file says what its folder's line says.
    names = {name for name in names if name.count("/") == 1 or not name.endswith("__init__.py")}
    assert sorted(drawn) == sorted(names - {"sharding/__init__.py", "configs/__init__.py"})


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of ours in a console block, as (document, words)."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for block in re.findall(r"^```(?:console|sh|bash)\n(.*?)^```", text, re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] in ("python", "python3", "dsjax", "make"):
                    yield path.name, words


def test_every_documented_command_exists():
    unknown = [f"{name}: {' '.join(words)}" for name, words in _commands() if not _exists(words)]
    assert unknown == []


def _exists(words: list[str]) -> bool:
    match words:
        case ["make", *targets]:
            return {target for target in targets if "=" not in target} <= TARGETS
        case ["dsjax", verb, *_] | [_, "-m", "dsjax", verb, *_]:
            return verb in VERBS | {"--help"}
        case [_, "-m", "pytest", *arguments]:
            paths = takewhile(lambda word: not word.startswith("-"), arguments)
            return all((ROOT / path.partition("::")[0]).exists() for path in paths)
        case [_, "-m", *_]:
            return True
        case [_, "train.py", name, *_] if "=" not in name and "/" not in name:
            placeholder = name.isupper() or name in ("--help", "my-run.yaml")
            return placeholder or (ROOT / f"configs/{name}.yaml").is_file()
        case [_, script, *_]:
            return script.startswith("-") or (ROOT / script).is_file()
        case _:
            return False
