"""Reading configurations: names and paths, `section.key=value` overrides, errors on one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError

from dsjax.architecture import FAMILIES, ModelConfig
from dsjax.config import PretrainConfig, RunConfig
from dsjax.config_grpo import GrpoRunConfig
from dsjax.config_sample import SampleConfig
from dsjax.config_serving import ServingConfig
from dsjax.config_sft import DistillConfig, SftConfig
from dsjax.errors import UserError, one_line
from dsjax.places import as_path
from dsjax.small_files import read_small, write_whole

T = TypeVar("T", bound=BaseModel)

MAX_YAML_BYTES = 1_000_000

TASKS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "distill": DistillConfig,
    "grpo": GrpoRunConfig,
}
"""The configuration of each task of train.py."""

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class _Loader(yaml.SafeLoader):
    """Without aliases: ten of ten of ten ... is a text of a page, and fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read; write out what it stands for")
        return super().compose_node(parent, index)


def load_model_config(name: str | Path) -> ModelConfig:
    """Read a model configuration: a YAML path, or a name under `configs/model/`."""
    path = find_config(name, CONFIGS / "model")
    return parse_model(read_yaml(path), source=str(path))


def load_run_config(
    name: str | Path,
    overrides: list[str] | None = None,
    model_of: Callable[[str], ModelConfig] | None = None,
) -> RunConfig:
    """Read a run configuration and apply `section.key=value` overrides.

    `model` may be a name under `configs/model/`, a path, or the mapping itself. Where a run begins
    at a checkpoint, `init`, and says no `model`, `model_of` reads the checkpoint's.
    Raises `UserError` naming the file and the key.
    """
    path = find_config(name, CONFIGS)
    tree = read_yaml(path)
    overrides = list(overrides or [])
    for text in [o for o in overrides if o.startswith("model=")]:
        tree["model"] = text.partition("=")[2]
        overrides.remove(text)
    if isinstance(tree.get("model"), str):
        tree["model"] = read_yaml(find_config(tree["model"], CONFIGS / "model"))
    for text in overrides:
        _override(tree, text)
    if isinstance(model := tree.get("model"), dict):
        tree["model"] = parse_model(model, source=str(path), under="model.")
    task = tree.get("task", "pretrain")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{path}: task={task!r}: expected one of {', '.join(TASKS)}")
    if model_of and "model" not in tree and isinstance(init := tree.get("init"), str):
        tree["model"] = model_of(init)
    return parse(TASKS[task], tree, source=str(path))


def load_pretrain_config(name: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """The same, where it must be a configuration of pre-training."""
    config = load_run_config(name, overrides)
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{name}: its task is {config.task}; expected pretrain")
    return config


def load_sample_config(name: str | Path, overrides: Sequence[str] = ()) -> SampleConfig:
    """Read a configuration of rejection sampling, and apply `section.key=value` overrides.

    Raises:
        UserError: naming the file and the key.
    """
    path = find_config(name, CONFIGS)
    tree = read_yaml(path)
    for text in overrides:
        _override(tree, text)
    return parse(SampleConfig, tree, source=str(path))


def load_serving_config(name: str | Path, overrides: Sequence[str] = ()) -> ServingConfig | None:
    """Read a configuration of serving, `task: serve`, and apply `key=value` overrides.

    None: the file is of something else.

    Raises:
        UserError: naming the file and the key.
    """
    path = find_config(name, CONFIGS)
    tree = read_yaml(path)
    if tree.get("task") != "serve":
        return None
    for text in overrides:
        _override(tree, text)
    return parse(ServingConfig, tree, source=str(path))


def refuse_placeholders(config: T, source: str | Path) -> T:
    """Return `config`, unless a value still names the bucket BUCKET, as `configs/` do.

    Raises:
        UserError: naming every such key.
    """
    keys = list(_placeholders(config.model_dump()))
    if keys:
        raise UserError(
            f"{source}: BUCKET stands for your own bucket in {', '.join(keys)}; give "
            f"{keys[0]}=gs://YOUR-BUCKET/... and the like, or edit a copy of the file"
        )
    return config


def _placeholders(tree: Any, path: str = "") -> Iterator[str]:
    """The dotted keys of the values that begin with gs://BUCKET; no real name has capitals."""
    if isinstance(tree, str) and tree.startswith("gs://BUCKET/"):
        yield path
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _placeholders(value, f"{path}.{key}".lstrip("."))


def write_config(config: RunConfig, folder: Path) -> None:
    """Write a run's resolved configuration, config.yaml, as `load_run_config` reads it.

    Without what tells this start from others of the same run.
    """
    settings = config.model_dump(exclude={"distributed"})
    write_whole(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())


def find_config(name: str | Path, folder: Path) -> Path:
    """The file `name`, or `folder/name.yaml`; a `UserError` lists what there is."""
    path = as_path(name)
    if path.is_file():
        return path
    named = folder / f"{name}.yaml"
    if named.is_file():
        return named
    files = [*folder.glob("*.yaml"), *folder.glob("r1/*.yaml"), *folder.glob("serving/*.yaml")]
    known = sorted(str(file.relative_to(folder).with_suffix("")) for file in files)
    raise UserError(
        f"{name}: no such file, and no such name in {folder}; known: {', '.join(known)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping, or raise `UserError`."""
    text = read_small(path, MAX_YAML_BYTES)
    try:
        tree = yaml.load(text.decode("utf-8"), _Loader)
    # A date that is none, or a number of 5,000 digits, is a ValueError of Python's own.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def parse_model(tree: dict[str, Any], source: str, under: str = "") -> ModelConfig:
    """Validate `tree` as the architecture that its `model_type` names; deepseek_v3 if it has none.

    `under` is what stands before its keys in the file.
    """
    family = tree.get("model_type", "deepseek_v3")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{source}: {under}model_type={family!r}; expected one of {', '.join(FAMILIES)}"
        )
    return parse(FAMILIES[family], tree, source, under)


def parse(kind: type[T], tree: dict[str, Any], source: str, under: str = "") -> T:
    """Validate `tree` as `kind`; the first problem becomes a one-line `UserError`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(kind, error, under)}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    """Apply one `section.key=value`, the value read as YAML; list items go by number."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r}: an override looks like section.key=value")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {}) if isinstance(node, dict) else _item(node, name, key)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {value!r} is not YAML: {one_line(error)}") from error
    if isinstance(node, dict):
        node[last] = parsed
    else:
        _item(node, last, key)
        node[int(last)] = parsed


def _item(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    raise UserError(f"{key}: there is no {name!r} to override in a {type(node).__name__}")


def _explain(kind: type[BaseModel], error: ValidationError, under: str) -> str:
    """The first problem, with the nearest valid key where the key is unknown."""
    problems = error.errors(include_url=False)
    # A misspelled key is unknown under its own name and missing under the right one: say the first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    keys, section = _walk(kind, problem["loc"])
    where = under + ".".join(keys)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], list(section.model_fields), n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest valid key is {near[0]!r}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "value_error":
        return f"{where.rstrip('.')}: {message}" if where else message
    return f"{where}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _walk(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to `loc`, and the section that the last one stands in, or should."""
    keys: list[str] = []
    inside: dict[str, type[BaseModel]] = {"": kind}
    for part in loc:
        if part in inside:  # no key: it says which of several kinds of section was meant
            kind, inside = inside[str(part)], {}
            continue
        keys.append(str(part))
        if not isinstance(part, int):
            kind = inside.get("", kind)
            field = kind.model_fields.get(part)
            inside = _sections(field.annotation) if field else {}
    return keys, kind


def _sections(annotation: Any, tag: str = "") -> dict[str, type[BaseModel]]:
    """Every section inside an annotation such as `YarnConfig | None`, by its tag in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {tag: annotation}
    for mark in getattr(annotation, "__metadata__", ()):
        tag = mark.tag if isinstance(mark, Tag) else tag
    return {t: s for arg in get_args(annotation) for t, s in _sections(arg, tag).items()}
