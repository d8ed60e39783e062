"""Whatever holds a model, seen one way: its tensors under their released names. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import Tensor, match, tensors, without_absent_mtp
from dsjax.checkpoint.hf_config import parse_config, read_config
from dsjax.checkpoint.manifest import MANIFEST
from dsjax.checkpoint.overridden import differences
from dsjax.checkpoint.pickled import PICKLE_INDEX, find_pickles, read_pickles, refuse_pickles
from dsjax.checkpoint.quantized import check_format, quantization_of, with_block_scales
from dsjax.checkpoint.released import as_expected
from dsjax.checkpoint.rotary_config import rotary_remark
from dsjax.checkpoint.safetensors import INDEX, Stored, read_folder
from dsjax.checkpoint.weights_folder import CONFIG, RELEASED, TOKENIZER, WEIGHTS, read_weights
from dsjax.config_files import load_model_config, load_run_config
from dsjax.config_sft import TuningConfig
from dsjax.errors import UserError, hub_hint
from dsjax.places import ObjectPath, as_path, local_path
from dsjax.small_files import read_json

RUN = "a run"
DSJAX = "dsjax weights"
HUGGING_FACE = "a Hugging Face folder"
GGUF = "a GGUF file"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_NOT_CARRIED = {"manifest.json", INDEX, PICKLE_INDEX}
_OF_QUANTIZATION = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
"""Of modelopt, GPTQ and AWQ: what is written is in none of these, and readers go by the names."""


@dataclass(frozen=True)
class Source:
    """A model where it is. `promised` is its configuration, `config` that of what is there."""

    folder: Path
    kind: str
    promised: ModelConfig
    config: ModelConfig
    stored: Mapping[str, Stored]
    parts: list[Tensor]
    carried: dict[str, Path]
    """Files that are no weights, by the names they have in a released folder."""
    made: dict[str, bytes] = field(default_factory=dict)
    """The same of what the source has in another form."""
    adapters: tuple[Path, ...] = ()
    """Where adapters came from that are merged into the weights."""
    remarks: tuple[str, ...] = ()
    """Lines about what was passed over, put in or brought to another form."""
    headers: Mapping[str, Stored] | None = None
    """The tensors as the files have them, where `stored` has them in another form."""

    @property
    def in_files(self) -> Mapping[str, Stored]:
        """The tensors as the files have them."""
        return self.stored if self.headers is None else self.headers


def kind_of(folder: Path) -> str:
    """What a folder, or a file, is.

    Raises:
        UserError: nothing that holds a model.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        local_path(folder, "a GGUF file")
        return GGUF
    if (folder / "checkpoints").is_dir():
        return RUN
    if (folder / WEIGHTS).is_dir() and (folder / CONFIG).is_file():
        return DSJAX
    if (folder / "config.json").is_file():
        return HUGGING_FACE
    found = (
        "a folder without config.json, weights/ or checkpoints/"
        if folder.is_dir()
        else "no such folder"
    )
    raise UserError(
        f"{folder}: {found}; expected a Hugging Face folder, dsjax weights, a run directory or a "
        f"GGUF file{hub_hint(folder) if found == 'no such folder' else ''}"
    )


def read_folder_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder, before any weight is looked at.

    Raises:
        UserError: it cannot be read, or this is a GGUF file, whose other parts are in no folder.
    """
    kind = kind_of(folder)
    if kind == GGUF:
        raise UserError(f"{folder}: make a folder of it first: dsjax convert {folder} FOLDER")
    if kind == RUN:
        return load_run_config(folder / CONFIG).model
    return load_model_config(folder / CONFIG) if kind == DSJAX else read_config(folder)


def model_of(path: str | Path) -> ModelConfig:
    """The configuration of what `dsjax.load` would make of a checkpoint: of the layers it has.

    Raises:
        UserError: as `open_source` does.
    """
    return open_source(as_path(path), check=False).config


def open_source(folder: Path, *, check: bool = True, allow_pickle: bool = False) -> Source:
    """Read the headers of a model's files, and account for every tensor.

    Of a run also every byte is checked, unless `check` is False: its digests are what tells a
    sound step from a damaged one. Pickles are read only if `allow_pickle`.

    Raises:
        UserError: a file is damaged, or the tensors are not those of the configuration.
    """
    kind = kind_of(folder)
    if kind == GGUF:
        return _open_gguf(folder)
    if kind == RUN and (run := run_with_adapters(folder)) is not None:
        return _open_adapted(folder, run, check=check)
    if kind == HUGGING_FACE:
        return _open_released(folder, check=check, allow_pickle=allow_pickle)
    promised = read_folder_config(folder)
    stored: Mapping[str, Stored]
    if kind == RUN:
        from dsjax.checkpoint.run_weights import read_run

        stored = read_run(folder, promised, check=check)
    else:
        stored = read_weights(folder, promised)
    config = without_absent_mtp(promised, stored)
    parts = match(config, stored, folder)
    if kind == DSJAX:
        _check_released(folder / RELEASED, config, stored)
    homes = [folder / TOKENIZER, folder / RELEASED]
    carried = {name: file for home in homes for name, file in carried_files(home).items()}
    return Source(folder, kind, promised, config, stored, parts, carried)


def _open_released(folder: Path, *, check: bool, allow_pickle: bool) -> Source:
    """A Hugging Face folder, its tensors brought to the names and forms of `families.py`."""
    file = folder / "config.json"
    tree = read_json(file)
    promised = parse_config(tree, file)
    headers: Mapping[str, Stored]
    if (pickles := find_pickles(folder)) is not None:
        if not allow_pickle:
            raise refuse_pickles(pickles)
        local_path(folder, "a folder of pickles")
        headers = read_pickles(pickles)
    else:
        headers = read_folder(folder)
    config = without_absent_mtp(promised, headers)
    expected, quantization = list(tensors(config)), quantization_of(tree)
    without = ["config.json promises MTP layers, but the files hold none"]
    compare = check and not isinstance(folder, ObjectPath)
    stored, remarks = as_expected(config, expected, headers, compare=compare)
    stored, more = with_block_scales(expected, stored, quantization)
    remarks += more + check_format(expected, stored, quantization, folder)
    remarks = without * (config != promised) + remarks
    if (remark := rotary_remark(tree, str(file))) is not None:
        remarks.append(remark)
    parts = match(config, stored, folder)
    return Source(
        folder,
        HUGGING_FACE,
        promised,
        config,
        stored,
        parts,
        carried_files(folder),
        remarks=tuple(remarks),
        headers=headers,
    )


def run_with_adapters(folder: Path) -> TuningConfig | None:
    """The configuration of a run that trained adapters; None of any other."""
    config = load_run_config(folder / CONFIG)
    return config if isinstance(config, TuningConfig) and config.lora is not None else None


def _open_adapted(folder: Path, run: TuningConfig, *, check: bool) -> Source:
    """The weights that a run began with, its adapters added."""
    from dsjax.checkpoint.adapters import cut_adapters, merge
    from dsjax.checkpoint.run_weights import newest_step, read_adapters, read_run

    assert run.lora is not None
    local_path(folder, "a run with adapters")
    init = as_path(run.init)
    if not init.exists():
        raise UserError(
            f"{folder}: adapters of {init}, which is not there; bring it back, or write its new "
            f"place as `init` into {folder / CONFIG}"
        )
    local_path(init, "what a run with adapters began with")
    base = open_source(init, check=False)
    differences(run.model, base.config, str(init))
    config = run.model
    lows = cut_adapters(config, run.lora, read_adapters(folder, check=check))
    stored = merge(base.stored, base.parts, lows)
    stored |= read_run(folder, config, check=False)  # router biases
    parts = match(config, stored, folder)
    carried = carried_files(folder / TOKENIZER)
    step, _ = newest_step(folder, check=False)
    return Source(folder, RUN, config, config, stored, parts, carried, adapters=(step / MANIFEST,))


def _open_gguf(file: Path) -> Source:
    from dsjax.checkpoint.gguf import read_gguf

    config, stored, made = read_gguf(file)
    parts = match(config, stored, file)
    return Source(file, GGUF, config, config, stored, parts, carried={}, made=made)


def _check_released(home: Path, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
    """The config.json that travelled along, and will be given back, must be of the same model."""
    if (home / "config.json").is_file() and without_absent_mtp(read_config(home), stored) != config:
        raise UserError(
            f"{home / 'config.json'}: of another model than the folder's {CONFIG}; convert or copy "
            "it again"
        )


def carried_files(home: Path) -> dict[str, Path]:
    """What travels along: all files but weights, hidden ones, and those about weights."""
    if not home.is_dir():
        return {}
    files = [*home.iterdir(), *(home / "additional_chat_templates").glob("*.jinja")]
    return {
        file.relative_to(home).as_posix(): file
        for file in sorted(files)
        if file.is_file()
        and file.suffix not in _WEIGHT_SUFFIXES
        and file.name not in _NOT_CARRIED | _OF_QUANTIZATION
        and not file.name.startswith(".")
    }
