"""`dsjax convert`: a model from one format to another, as a stream. Imports no jax.

Memory is bounded whatever the model's size, every tensor arrives, and what is written gets its name
by one `rename` when all of it is on the disk. Killed, it goes on where it was. In an object store,
which has no rename, what makes a folder a model is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dsjax.checkpoint.conversion import DSJAX, DTYPE_NAMES, FORMATS, HF, Job, Plan, make_plan
from dsjax.checkpoint.journal import Journal
from dsjax.checkpoint.peft import with_adapter
from dsjax.checkpoint.safetensors import same_numbers
from dsjax.checkpoint.source import HUGGING_FACE, Source, open_source
from dsjax.checkpoint.tables import human, table
from dsjax.checkpoint.to_objects import ObjectJournal, check_unused
from dsjax.checkpoint.writing import (
    THREAD_BYTES,
    Advance,
    compare_job,
    in_threads,
    threads_for,
    write_job,
)
from dsjax.errors import UserError, one_line
from dsjax.places import WINDOW, ObjectPath, as_path

PROCESS_BYTES = 70_000_000
"""What the interpreter and its libraries take, about."""

TENSOR_BYTES = 1_500
"""What the plan takes for each tensor, about."""


def convert(
    source: Path,
    destination: Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    adapter: Path | None = None,
) -> None:
    """Convert the model in `source`, and say at the end what was written.

    Args:
        source: a Hugging Face folder, dsjax weights, or the directory of a run.
        destination: a folder that does not exist yet; it, or the source, may begin with gs://.
        to: "hf" or "dsjax"; None takes the one that the source is not.
        dtype: float32, bfloat16 or fp8; None keeps what is stored.
        verify: read everything again at the end, and compare it with the source.
        dry_run: only say what would be done, from headers.
        allow_pickle: read weights that PyTorch pickled, by its weights-only loader.
        adapter: a folder in PEFT's layout, whose low-rank adapters are merged into the weights.

    Raises:
        UserError: the source cannot be converted, or the destination not be written.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPE_NAMES)}")
    if to is not None and to not in FORMATS:
        raise UserError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    source, destination = as_path(source), as_path(destination)
    _check_place(source, destination)
    opened = open_source(source, allow_pickle=allow_pickle)
    if adapter is not None:
        opened = with_adapter(opened, as_path(adapter), dtype)
    to = to or (DSJAX if opened.kind == HUGGING_FACE else HF)
    plan = make_plan(opened, to, dtype)
    if dry_run:
        _show(plan, opened, destination, to)
        return
    for remark in opened.remarks:
        print(f"{source}: {remark}", file=sys.stderr)
    begin = time.monotonic()
    write_plan(plan, destination, _identity(opened, plan, to, dtype), verify=verify)
    seconds = time.monotonic() - begin
    print(
        f"{destination}: {sum(1 for _ in plan.items):,} tensors, {human(plan.bytes_out)} in "
        f"{len(plan.jobs):,} {'shards' if to == HF else 'chunks'}, {seconds:.1f} s"
        f"{', verified' * verify}"
    )


def write_plan(
    plan: Plan, destination: Path, identity: dict[str, Any], *, verify: bool = False
) -> None:
    """Write everything beside `destination`, and give it its name.

    Raises:
        UserError: the source is damaged, which leaves nothing; or it cannot be written, and what is
            there stays for the next one of this `identity`.
    """
    journal = _journal(destination, identity)
    with closing(journal):
        _check_room(plan, journal)
        try:
            _convert(plan, journal, verify)
            journal.finish(plan.leaves)
        except OSError as error:  # an object store's failures are this too
            raise UserError(
                f"{journal.partial}: cannot be finished now: {one_line(error)}; the same command "
                "goes on from here"
            ) from error
        except UserError:
            journal.remove()
            raise


def _journal(destination: Path, identity: dict[str, Any]) -> Journal | ObjectJournal:
    if isinstance(destination, ObjectPath):
        return ObjectJournal(destination, identity)
    return Journal(destination, identity)


def check_free(destination: Path) -> None:
    """Raise `UserError` unless a conversion may write there."""
    if isinstance(destination, ObjectPath):
        check_unused(destination)
    elif os.path.lexists(destination):
        raise UserError(f"{destination}: exists already; choose a new folder")


def _check_place(source: Path, destination: Path) -> None:
    check_free(destination)
    if not isinstance(destination, ObjectPath) and not destination.absolute().parent.is_dir():
        raise UserError(f"{destination}: {destination.absolute().parent} is no folder; make it")
    if destination.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{destination}: lies inside the source {source}; choose a place outside")


def _identity(source: Source, plan: Plan, to: str, dtype: str | None) -> dict[str, Any]:
    """What must be the same for a conversion to go on: the options, the source, the layout."""
    files = {entry.file for entry in source.stored.values()} | set(source.carried.values())
    files |= set(source.adapters)
    home = source.folder
    stats = [
        (str(file.relative_to(home) if file.is_relative_to(home) else file), file.stat())
        for file in sorted(files)
    ]
    described = {
        "source": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "config": source.config.model_dump(),
        "outputs": [(output.path, output.nbytes) for job in plan.jobs for output in job.outputs],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return {"options": f"--to {to} --dtype {dtype or 'as stored'}", "described": digest}


def _convert(plan: Plan, journal: Journal | ObjectJournal, verify: bool) -> None:
    """Write everything but the manifest into the folder beside the destination, or into it."""
    folder = journal.partial
    places = (folder, *(item.source.file for item in islice(plan.items, 1)))
    left = [job for job in plan.jobs if any(o.path not in journal.done for o in job.outputs)]
    both = sum(job.bytes_in + job.bytes_out for job in plan.jobs)
    done = both - sum(job.bytes_in + job.bytes_out for job in left)
    with _bar() as bar:
        task = bar.add_task("converting", total=both, completed=done)
        advance = partial(bar.advance, task)
        repeats = [partial(_check_repeat, *repeat) for repeat in plan.repeats]
        writes = [partial(_write, job, journal, advance) for job in left]
        in_threads([*repeats, *writes], *places)
        journal.put(plan.files)
        if verify:
            task = bar.add_task("verifying", total=both)
            advance = partial(bar.advance, task)
            folder = journal.partial
            in_threads([partial(_compare, job, folder, advance) for job in plan.jobs], *places)
            _compare_files(plan, journal)


def _write(job: Job, journal: Journal | ObjectJournal, advance: Advance, stop: Event) -> None:
    written = write_job(job, journal.partial, stop, advance)
    if not stop.is_set():
        journal.add(written)


def _compare(job: Job, folder: Path, advance: Advance, stop: Event) -> None:
    compare_job(job, folder, stop, advance)


def _compare_files(plan: Plan, journal: Journal | ObjectJournal) -> None:
    """The small ones; and nothing else may be there."""
    folder, names = journal.partial, plan.files.keys() - journal.withheld
    outputs = {output.path for job in plan.jobs for output in job.outputs}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if found != outputs | names:
        raise UserError(f"{folder}: files appeared or went while it was written; convert again")
    for name in names:
        if (folder / name).read_bytes() != plan.files[name]:
            raise UserError(f"{folder / name}: differs from what was written; convert again")


def _check_repeat(tensor: Any, one: Any, other: Any, stop: Event) -> None:
    """MTP shares embedding and head, which are kept once: the copies must be copies."""
    if not stop.is_set() and not same_numbers(one, other):
        raise UserError(
            f"{one.file}: {tensor.name} differs from {tensor.repeats}, which the MTP layer shares; "
            "they must be the same"
        )


def _check_room(plan: Plan, journal: Journal | ObjectJournal) -> None:
    """Whether the disk has room for what is not finished yet; what is finished is kept."""
    folder = journal.partial
    if isinstance(folder, ObjectPath):
        return
    needed = plan.bytes_out - sum(digest["bytes"] for digest in journal.done.values())
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return
    if not journal.done:
        journal.remove()
    raise UserError(f"{folder.parent}: needs {human(needed)}, has {human(free)} free; make room")


def _bar() -> Progress:
    """Bytes read and written, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _show(plan: Plan, source: Source, destination: Path, to: str) -> None:
    """What a conversion would do."""
    console = Console(highlight=False)
    say: Callable[[str], None] = partial(console.print, markup=False, soft_wrap=True)
    say(f"{source.folder} ({source.kind}, {source.config.model_type})")
    say(f"  to {destination} ({to})")
    for remark in source.remarks:
        say(f"  {remark}")
    count, read, written = Counter[tuple[str, str]](), Counter[Any](), Counter[Any]()
    for item in plan.items:
        key = (item.source.dtype, item.dtype)
        count[key] += 1
        read[key] += item.bytes_in
        written[key] += item.value_bytes + item.scale_bytes
    rows = table(console, "stored", "written", "tensors", "bytes in", "bytes out")
    rows.columns[1].justify = "left"
    for key in sorted(count):
        rows.add_row(*key, f"{count[key]:,}", f"{read[key]:,}", f"{written[key]:,}")
    total = (f"{count.total():,}", f"{plan.bytes_in:,}", f"{plan.bytes_out:,}")
    rows.add_row("total", "", *total, style="bold")
    console.print(rows)
    scales = sum(1 for item in plan.items if item.scales)
    say(f"stored tensors, scales included: {len(source.in_files):,}, {scales:,} of them scales")
    files = len(plan.files) + sum(len(job.outputs) for job in plan.jobs) + 1
    say(f"files to write: {files:,}, manifest included")
    threads = threads_for(source.folder, destination)
    buffers = 4 * WINDOW * sum(isinstance(p, ObjectPath) for p in (source.folder, destination))
    peak = PROCESS_BYTES + TENSOR_BYTES * len(source.stored) + threads * (THREAD_BYTES + buffers)
    say(f"peak memory: about {human(peak)}, {threads} threads")
    if isinstance(destination, ObjectPath):
        say(f"bucket: {human(plan.bytes_out)} needed")
        return
    free = shutil.disk_usage(destination.absolute().parent).free
    enough = "enough" if plan.bytes_out <= free else "NOT ENOUGH"
    say(f"disk: {human(plan.bytes_out)} needed, {human(free)} free: {enough}")
