"""Reading configurations: names and paths, `section.key=value` overrides, errors on one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dsjax.architecture import FAMILIES, ModelConfig
from dsjax.config import PretrainConfig, RunConfig
from dsjax.config_grpo import GrpoRunConfig
from dsjax.config_keys import explain_unknown, walk
from dsjax.config_sample import SampleConfig
from dsjax.config_serving import ServingConfig
from dsjax.config_sft import DistillConfig, SftConfig
from dsjax.config_yaml import parse_yaml, write_yaml
from dsjax.errors import UserError, hub_hint
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
    at a checkpoint, `init`, `model_of` reads the checkpoint's, and keys of `model` replace its own.

    Raises:
        UserError: naming the file and the key.
    """
    path = find_config(name, CONFIGS)
    tree = read_yaml(path)
    overrides = list(overrides or [])
    for text in [o for o in overrides if o.startswith("model=")]:
        tree["model"] = parse_yaml(text.partition("=")[2], "model:")
        overrides.remove(text)
    if not isinstance(model := tree.get("model"), dict | str | None):
        raise UserError(f"{path}: model={model!r}: expected a name, a path, or a mapping of keys")
    if isinstance(tree.get("model"), str):
        tree["model"] = read_yaml(find_config(tree["model"], CONFIGS / "model"))
    for text in overrides:
        _override(tree, text)
    task = tree.get("task", "pretrain")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{path}: task={task!r}: expected one of {', '.join(TASKS)}")
    _refuse_unknown(TASKS[task], tree, str(path))
    _complete_model(tree, model_of)
    if isinstance(model := tree.get("model"), dict):
        tree["model"] = parse_model(model, source=str(path), under="model.")
    return parse(TASKS[task], tree, source=str(path))


def _refuse_unknown(kind: type[BaseModel], tree: dict[str, Any], source: str) -> None:
    """Raise `UserError` for a key that there is not, before a checkpoint is looked for."""
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        found = [p for p in error.errors(include_url=False) if p["type"] == "extra_forbidden"]
        if any(problem["loc"][0] != "model" for problem in found):
            raise UserError(f"{source}: {_explain(kind, error, '')}") from None


def _complete_model(tree: dict[str, Any], model_of: Callable[[str], ModelConfig] | None) -> None:
    """Read what `model` leaves out from the checkpoint that the run begins at, if it does."""
    model, init = tree.get("model"), tree.get("init")
    if model is None:
        tree.pop("model", None)
    elif _is_whole(model):
        return
    if model_of is not None and isinstance(init, str):
        tree["model"] = _merged(model_of(init).model_dump(), model or {})


def _is_whole(model: dict[str, Any]) -> bool:
    """Whether a mapping says all of a model, or names a family that there is not."""
    family = model.get("model_type", "deepseek_v3")
    if not isinstance(family, str) or family not in FAMILIES:
        return True
    fields = FAMILIES[family].model_fields
    return all(key in model for key, field in fields.items() if field.is_required())


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A mapping with changes, in the mappings inside it too."""
    inner = {
        key: _merged(tree[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
    }
    return {**tree, **changes, **inner}


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
    write_whole(folder / "config.yaml", write_yaml(settings))


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
        f"{name}: no such file, and no such name in {folder}{hub_hint(name)}; known: "
        f"{', '.join(known)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping, or raise `UserError`."""
    text = read_small(path, MAX_YAML_BYTES)
    try:
        tree = parse_yaml(text.decode("utf-8"), f"{path}:")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as YAML: it is not UTF-8: {error}") from error
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
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r}: an override looks like section.key=value")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        if isinstance(node, dict):
            if node.get(name) is None:  # a section that is not there, or switched off
                node[name] = {}
            node = node[name]
        else:
            node = _item(node, name, key)
    parsed = parse_yaml(value, f"{key}: {value!r}")
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
    # Of a model that is missing for want of a checkpoint, say that of the checkpoint.
    order = {"extra_forbidden": 0, "missing": 2}
    named = (p for p in problems if p["type"] == "extra_forbidden" or p["loc"] == ("init",))
    problem = min(named, key=lambda p: order.get(p["type"], 1), default=problems[0])
    keys, section = walk(kind, problem["loc"])
    where = under + ".".join(keys)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return explain_unknown(where, kind, section, TASKS)
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "value_error":
        return f"{where.rstrip('.')}: {message}" if where else message
    return f"{where}={problem['input']!r}: {message[0].lower()}{message[1:]}"
