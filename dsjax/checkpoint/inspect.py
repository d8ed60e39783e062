"""What a model is, told from its config or from the headers of its files. Imports no jax."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.families import (
    KINDS,
    ROUTED,
    ROUTER_BIAS,
    Tensor,
    match,
    tensors,
    without_absent_mtp,
)
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.safetensors import Entry, read_folder
from dsjax.config_files import CONFIGS, find_config, load_model_config, load_run_config, read_yaml


def inspect(source: str, *, as_json: bool) -> None:
    """Print `report(source)`: as tables, or as one JSON object."""
    found = report(source)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def report(source: str) -> dict[str, Any]:
    """Family, config, parameter counts and bytes of a model; of a folder also what is stored.

    Counts of `parameters`, all in numbers:

        main, mtp          the main model; what the MTP layers own
        unique             both: what a model that shares embedding and head holds
        file               with the embedding and head that the files repeat for MTP
        trainable          unique without the router biases, which no gradient moves
        active_per_token   main, with only the chosen of the routed experts

    `bytes` says for each dtype what a model would hold (`unique`) and its files (`file`); router
    biases are always float32, and fp8 is that of the release: scales, and bfloat16 for the rest.

    Args:
        source: a Hugging Face folder, its config.json, a YAML file, or a name under `configs/`.

    Raises:
        UserError: it cannot be read, or the folder's tensors are not those of its config.
    """
    path = Path(source)
    stored = read_folder(path) if path.is_dir() else {}
    promised = _read_config(path)
    config = without_absent_mtp(promised, stored) if stored else promised
    parts = match(config, stored, path) if stored else list(tensors(config))
    return {
        "source": source,
        "family": config.model_type,
        "config": config.model_dump(),
        "mtp_layers": {
            "config": promised.num_nextn_predict_layers,
            "found": config.num_nextn_predict_layers,
        },
        "parameters": _count(parts, config),
        "bytes": _bytes(parts),
        "stored": _stored(stored) if stored else None,
    }


def _read_config(path: Path) -> ModelConfig:
    if path.is_dir():
        return read_config(path)
    if path.name == "config.json":
        return read_config(path.parent)
    models, name = CONFIGS / "model", f"{path}.yaml"
    is_run = (CONFIGS / name).is_file() and not (models / name).is_file()
    file = find_config(path, CONFIGS if is_run else models)
    return load_run_config(file).model if "model" in read_yaml(file) else load_model_config(file)


def _count(parts: list[Tensor], config: ModelConfig) -> dict[str, Any]:
    main, mtp, repeated = Counter[str](), Counter[str](), 0
    for part in parts:
        if part.repeats:
            repeated += part.size
        elif part.path.startswith("mtp."):
            mtp[part.kind] += part.size
        else:
            main[part.kind] += part.size
    unique = main.total() + mtp.total()
    chosen = config.num_experts_per_tok if isinstance(config, DeepSeekConfig) else 0
    idle = config.n_routed_experts - chosen
    return {
        "main": main.total(),
        "mtp": mtp.total(),
        "unique": unique,
        "file": unique + repeated,
        "trainable": unique - main[ROUTER_BIAS] - mtp[ROUTER_BIAS],
        "active_per_token": main.total() - main[ROUTED] // max(config.n_routed_experts, 1) * idle,
        "by_kind": {
            kind: {"main": main[kind], "mtp": mtp[kind]}
            for kind in KINDS
            if main[kind] or mtp[kind]
        },
    }


def _bytes(parts: list[Tensor]) -> dict[str, dict[str, int]]:
    """Bytes in each of the dtypes that models come in, with and without what is repeated."""
    unique, repeated = Counter[str](), Counter[str]()
    for part in parts:
        total = repeated if part.repeats else unique
        narrow = (4 if part.kind == ROUTER_BIAS else 2) * part.size
        scale = part.scale
        total["float32"] += 4 * part.size
        total["bfloat16"] += narrow
        total["fp8"] += part.size + 4 * math.prod(scale[1]) if scale else narrow
    return {"unique": dict(unique), "file": dict(unique + repeated)}


def _stored(stored: Mapping[str, Entry]) -> dict[str, Any]:
    """What the headers say: files, tensors and bytes, by dtype."""
    count, size = Counter[str](), Counter[str]()
    for entry in stored.values():
        count[entry.dtype] += 1
        size[entry.dtype] += entry.nbytes
    return {
        "files": len({entry.file for entry in stored.values()}),
        "tensors": count.total(),
        "bytes": size.total(),
        "by_dtype": {
            dtype: {"tensors": count[dtype], "bytes": size[dtype]} for dtype in sorted(count)
        },
    }


def _show(found: dict[str, Any]) -> None:
    """Tables; frames and colours only where a terminal shows them."""
    console = Console(highlight=False)
    counts, layers, stored = found["parameters"], found["mtp_layers"], found["stored"]
    console.print(f"{found['source']}: {found['family']}", markup=False, soft_wrap=True)
    if layers["found"] < layers["config"]:
        console.print("config.json promises MTP layers, but the files hold none")

    console.print()
    kinds = _table(console, "parameters", "main model", "MTP")
    for kind, count in counts["by_kind"].items():
        kinds.add_row(kind, f"{count['main']:,}", f"{count['mtp']:,}")
    kinds.add_row("total", f"{counts['main']:,}", f"{counts['mtp']:,}", style="bold")
    console.print(kinds)

    console.print()
    totals = _table(console, "all together", "numbers", "")
    for key, meaning in (
        ("unique", "main model and MTP"),
        ("file", "as the files count, MTP's repeats included"),
        ("trainable", "unique, without router biases"),
        ("active_per_token", "main model, chosen experts only"),
    ):
        totals.add_row(key.replace("_", " "), f"{counts[key]:,}", meaning)
    console.print(totals)

    console.print()
    sizes = _table(console, "if held in", "model", "files")
    for dtype, size in found["bytes"]["unique"].items():
        sizes.add_row(dtype, _human(size), _human(found["bytes"]["file"][dtype]))
    console.print(sizes)

    if stored:
        console.print()
        here = _table(console, f"stored in {stored['files']:,} files", "tensors", "bytes")
        for dtype, part in stored["by_dtype"].items():
            here.add_row(dtype, f"{part['tensors']:,}", f"{part['bytes']:,}")
        here.add_row("total", f"{stored['tensors']:,}", f"{stored['bytes']:,}", style="bold")
        console.print(here)


def _table(console: Console, *titles: str) -> Table:
    table = Table(box=box.SIMPLE if console.is_terminal else None, header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place and title else "left", no_wrap=True)
    return table


def _human(size: int) -> str:
    """Bytes in decimal units: 1,365.3 GB is 1,365.3e9 bytes."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"
