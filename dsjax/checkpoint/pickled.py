"""PyTorch's own files: pickles in a zip archive, read by torch's weights-only loader. No jax.

A pickle is a program for its reader, and an ordinary reader runs what it names. torch's
weights-only loader rebuilds tensors and refuses everything else. Here it is asked only where each
tensor's numbers lie; they are read from the file as those of safetensors are, a megabyte at a time.

torch believes what a pickle says of places and sizes: of a damaged archive it would take bytes of
one tensor for another's. So both are compared with the archive's own list first.
"""

from __future__ import annotations

import importlib
import pickle
import re
import shlex
import struct
import zipfile
from pathlib import Path
from typing import Any

from dsjax.checkpoint.safetensors import DTYPES, INDEX, SINGLE, Entry, read_shards
from dsjax.errors import UserError, one_line
from dsjax.small_files import MAX_BYTES, open_file

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

NESTED = "state_dict"
"""The one key of a file that keeps its tensors a level deeper."""

_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP = b"PK\x03\x04"

Place = tuple[int, int]
"""Where numbers begin, in bytes from the file's begin or in memory, and how many bytes they are."""


def find_pickles(folder: Path) -> Path | None:
    """The file that a folder has its weights in as a pickle, or the index of several such.

    None where there are safetensors, which are taken before, and where there are neither.

    Raises:
        UserError: there are several, and which holds the model is not known.
    """
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return None
    named = [folder / name for name in (PICKLE, PICKLE_INDEX) if (folder / name).is_file()]
    found = named or sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder}: has {names}; expected one of them, move the others away")
    return found[0] if found else None


def refuse_pickles(file: Path) -> UserError:
    """What to say where nobody allowed a pickle."""
    command = f"dsjax convert {shlex.quote(str(file.parent))} NEW_FOLDER --allow-pickle"
    return UserError(
        f"{file}: weights in a pickle, a format that can carry code; if you trust where it comes "
        f"from, convert it, which runs none: {command}"
    )


def read_pickles(file: Path) -> dict[str, Entry]:
    """Every tensor of a pickle, or of those that an index names.

    Raises:
        UserError: torch is missing; a file is damaged, is no pickle of tensors alone, or asks for
            code; the index and the files disagree.
    """
    several = file.name == PICKLE_INDEX
    return read_shards(file.parent, file.name, read_pickle) if several else read_pickle(file)


def read_pickle(file: Path) -> dict[str, Entry]:
    """The tensors of one file, by name.

    Raises:
        UserError: see `read_pickles`.
    """
    torch = _import_torch()
    listed = _listed(file)
    tensors = _named(_load(torch, file), file)
    for name, tensor in tensors.items():
        if not _is_plain(torch, tensor):
            raise UserError(
                f"{file}: {name} is no plain tensor of a known dtype; save it again, dense, with "
                "contiguous() and no strides of its own"
            )
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    in_memory = {(s.data_ptr(), s.nbytes()) for s in storages.values() if s.nbytes()}
    shift = _shift(sorted(in_memory), listed, file)
    entries = {}
    for name, tensor in tensors.items():
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        start = tensor.data_ptr() - shift if tensor.numel() else 0
        entry = Entry(file, dtype, tuple(tensor.shape), start)
        room = storages[name].nbytes() - tensor.storage_offset() * DTYPES[dtype].itemsize
        if entry.nbytes > room:
            raise UserError(f"{file}: {name} reaches beyond its numbers; fetch it again")
        entries[name] = entry
    return entries


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError("reading pickles needs torch: pip install 'dsjax[pickle]'") from None


def _load(torch: Any, file: Path) -> Any:
    """What the file holds, its numbers mapped and not yet read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {asked[1]}" if asked else "is damaged, or asks for code"
        raise UserError(f"{file}: {what}; only tensors are read, and nothing was run") from None
    except Exception as error:  # torch raises whatever it meets in a damaged pickle
        problem = one_line(error)[:200] or type(error).__name__
        raise UserError(f"{file}: cannot be read by torch: {problem}; fetch it again") from None


def _named(tree: Any, file: Path) -> dict[str, Any]:
    """Tensors by name: what is held, or what is under `state_dict` if that is all there is."""
    if isinstance(tree, dict) and tree.keys() == {NESTED}:
        tree = tree[NESTED]
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: holds a {type(tree).__name__}; expected tensors by name, or these alone "
            f"under '{NESTED}'"
        )
    for name, value in tree.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{file}: {name!r}: a tensor's name is printable text")
        if not hasattr(value, "untyped_storage"):
            raise UserError(
                f"{file}: {name!r} is a {type(value).__name__}; expected tensors alone, or these "
                f"alone under '{NESTED}': save the model's state_dict() by itself"
            )
    return tree


def _is_plain(torch: Any, tensor: Any) -> bool:
    """Whether its numbers lie one after the other, as they are."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and str(tensor.dtype).removeprefix("torch.") in _NAMES
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


# ---------------------------------------------------------------------------------------------
# The archive
# ---------------------------------------------------------------------------------------------


def _listed(file: Path) -> list[Place]:
    """Where the archive's own list says that numbers lie: of each tensor, or of several as one."""
    try:
        with open_file(file) as stream:
            if stream.read(4) != _ZIP:
                raise UserError(
                    f"{file}: no archive as PyTorch writes it since 1.6; load it there, and "
                    "torch.save it again"
                )
            with zipfile.ZipFile(stream) as archive:
                return sorted(_members(archive, file))
    except (OSError, ValueError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{file}: truncated or damaged: {one_line(error)}; fetch it again"
        ) from None


def _members(archive: zipfile.ZipFile, file: Path) -> list[Place]:
    """Begin and size of every member that holds numbers; the others are checked."""
    found = []
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError(f"{file}: {member.filename} is compressed; torch.save it again")
        name, size = member.filename.partition("/")[2], member.file_size
        if name == "byteorder" and (size > 6 or archive.read(member) != b"little"):
            raise UserError(f"{file}: its numbers are not little-endian; torch.save it again")
        if name == "data.pkl" and size > MAX_BYTES:
            raise UserError(f"{file}: {size:,} bytes of pickle; at most {MAX_BYTES:,} are read")
        if name.startswith("data/") and size:
            found.append((_begin(archive, member), size))
    return found


def _begin(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its own header may be longer than the list's."""
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(archive.fp.read(_LOCAL_HEADER.size))
    if signature != _ZIP:
        raise ValueError(f"{member.filename} is not where the archive's list says")
    return member.header_offset + _LOCAL_HEADER.size + name + extra


def _shift(in_memory: list[Place], listed: list[Place], file: Path) -> int:
    """How far the mapped file lies from its own begin.

    Raises:
        UserError: the tensors do not lie where the archive's list says, are of other sizes, or some
            of what it lists belongs to none.
    """
    size = file.stat().st_size
    shift = in_memory[0][0] - listed[0][0] if in_memory and listed else 0
    if [(begin - shift, n) for begin, n in in_memory] != listed or any(
        begin + n > size for begin, n in listed
    ):
        held, said = sum(n for _, n in listed), sum(n for _, n in in_memory)
        raise UserError(
            f"{file}: damaged: its archive holds {len(listed)} arrays of {held:,} bytes, its "
            f"tensors say {len(in_memory)} of {said:,}, or other places; fetch it again"
        )
    return shift
