"""What a model is, told from its config or from the headers of its files. Imports no jax."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.families import (
    KINDS,
    ROUTED,
    ROUTER_BIAS,
    Tensor,
    tensors,
)
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.manifest import MANIFEST, DamagedError, verify
from dsjax.checkpoint.safetensors import Stored
from dsjax.checkpoint.source import open_source
from dsjax.checkpoint.tables import human, table
from dsjax.config_files import CONFIGS, find_config, load_model_config, load_run_config, read_yaml
from dsjax.errors import UserError
from dsjax.places import ObjectPath, as_path


def inspect(
    source: str, *, as_json: bool, verify: bool = False, allow_pickle: bool = False
) -> None:
    """Print `report(source)`: as tables, or as one JSON object; with `verify`, check files first.

    Raises:
        UserError: as `report`; or a file is not what the folder's manifest says, or it has none.
    """
    checked = _check_files(as_path(source)) if verify else None
    found = report(source, allow_pickle=allow_pickle)
    if checked:
        found["verified"] = checked
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def report(source: str, *, allow_pickle: bool = False) -> dict[str, Any]:
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
        source: a Hugging Face folder, dsjax weights, a run, a GGUF file, a config.json, a YAML
            file, or a name under `configs/`. Folders and files may be in a bucket: gs://...
        allow_pickle: look into PyTorch's own files too, running no code in them.

    Raises:
        UserError: it cannot be read, or the folder's tensors are not those of its config.
    """
    path = as_path(source)
    remarks: tuple[str, ...] = ()
    absent = isinstance(path, ObjectPath) and not path.exists()
    if absent or path.is_dir() or path.suffix == ".gguf":
        opened = open_source(path, check=False, allow_pickle=allow_pickle)
        promised, config = opened.promised, opened.config
        parts, stored, remarks = opened.parts, opened.in_files, opened.remarks
    else:
        promised = config = _read_config(path)
        parts, stored = list(tensors(config)), {}
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
        "remarks": list(remarks),
    }


def _check_files(folder: Path) -> dict[str, int]:
    """Files and bytes of a folder, once every byte is what its manifest says.

    Of a run, those of the newest checkpoint that is sound.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: --verify takes a folder")
    if (folder / "checkpoints").is_dir():
        from dsjax.checkpoint.run_weights import newest_step

        folder, _ = newest_step(folder)
    elif not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: has no {MANIFEST} to check it against; `dsjax convert` makes it"
        )
    else:
        try:
            verify(folder, None)
        except DamagedError as damage:
            raise UserError(f"{folder}: damaged: {damage}; convert or copy it again") from None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _read_config(path: Path) -> ModelConfig:
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


def _stored(stored: Mapping[str, Stored]) -> dict[str, Any]:
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
    counts, stored = found["parameters"], found["stored"]
    console.print(f"{found['source']}: {found['family']}", markup=False, soft_wrap=True)
    if checked := found.get("verified"):
        size = human(checked["bytes"])
        console.print(f"verified: {checked['files']:,} files, {size}, as in {MANIFEST}")
    for remark in found["remarks"]:
        console.print(remark, markup=False, soft_wrap=True)

    console.print()
    kinds = table(console, "parameters", "main model", "MTP")
    for kind, count in counts["by_kind"].items():
        kinds.add_row(kind, f"{count['main']:,}", f"{count['mtp']:,}")
    kinds.add_row("total", f"{counts['main']:,}", f"{counts['mtp']:,}", style="bold")
    console.print(kinds)

    console.print()
    totals = table(console, "all together", "numbers", "")
    for key, meaning in (
        ("unique", "main model and MTP"),
        ("file", "as the files count, MTP's repeats included"),
        ("trainable", "unique, without router biases"),
        ("active_per_token", "main model, chosen experts only"),
    ):
        totals.add_row(key.replace("_", " "), f"{counts[key]:,}", meaning)
    console.print(totals)

    console.print()
    sizes = table(console, "if held in", "model", "files")
    for dtype, size in found["bytes"]["unique"].items():
        sizes.add_row(dtype, human(size), human(found["bytes"]["file"][dtype]))
    console.print(sizes)

    if stored:
        console.print()
        here = table(console, f"stored in {stored['files']:,} files", "tensors", "bytes")
        for dtype, part in stored["by_dtype"].items():
            here.add_row(dtype, f"{part['tensors']:,}", f"{part['bytes']:,}")
        here.add_row("total", f"{stored['tensors']:,}", f"{stored['bytes']:,}", style="bold")
        console.print(here)
