"""The training checkpoints of one run: asynchronous, atomic, and checked before they are used.

`steps_on_disk` and `steps_in_bucket` say what makes a step complete in either place; here orbax
writes and reads the arrays. Assumes that one run owns the folder, and that all its processes see
it. Each writes and reads its part of the arrays; process 0 does alone what comes before orbax and
after it. Digests are checked by all, each a share of the files, and all use the same step.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial as bind
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsjax.checkpoint.manifest import MANIFEST, DamagedError, Leaves
from dsjax.checkpoint.steps_in_bucket import StepsInBucket
from dsjax.checkpoint.steps_on_disk import StepsOnDisk
from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath, as_path
from sharding.distributed import WORK_SECONDS, gather, is_first, share

Leaf = TypeVar("Leaf", jax.Array, jax.ShapeDtypeStruct)

logger = logging.getLogger(__name__)

# What orbax logs of a failed save, some 200 lines, is said in one line here and raised in `wait`.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def abstract_on(abstract: Any, shardings: Any) -> Any:
    """What `CheckpointStore.restore` wants: shapes and dtypes of one tree, places of the other."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


class CheckpointStore:
    """The checkpoints of one run, the newest `keep` of them, under `folder`, also in a bucket.

    Use it in `contextlib.closing`: a program that ends without `wait` or `close` loses the save
    that is under way. Raises `UserError` when nothing can be written in `folder`; removes what a
    killed run left unfinished there. With `keep` None it only reads: a run that is under way owns
    the folder, and what looks unfinished is its save.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self._folder = folder = folder.absolute()
        self._keep = keep
        remote = isinstance(folder, ObjectPath)
        self._steps: Any = StepsInBucket(folder) if remote else StepsOnDisk(folder)
        if keep is not None:
            share("checkpoints", self._steps.prepare)
        if not remote and not folder.is_dir():
            raise UserError(
                f"{folder}: process 0 has made it, but it is not there; "
                "choose a directory that all processes share"
            )
        # Weights hardly compress (8% by zstd), and trying takes CPU time from the training step.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: PyTree[jax.Array], extra: dict[str, Any]) -> None:
        """Start saving `state` and `extra` as `step`; the rest happens in the background.

        On return the arrays of `state` may be donated: they have been copied to the host (on a CPU,
        where the host's memory is the device's, jax copies a buffer that is donated while it is
        being saved). Leaves are arrays, random keys included; `extra` is anything JSON can hold.
        A save waits for the one before it and raises if that one failed. A step that exists is
        replaced; steps above `step` are of a future that the run left when it resumed below them,
        and are deleted with those that `keep` no longer covers.
        """
        self.wait()
        arrays = _name_leaves(state)
        leaves = _describe(arrays)
        extra_json = json.dumps(extra)
        partial = as_path(share("save", lambda: str(self._steps.begin(step))))
        # orbax refuses arrays without elements; the manifest alone can bring those back.
        stored = {name: array for name, array in arrays.items() if array.size}
        self._orbax.save(f"{partial}/state", args=ocp.args.PyTreeSave(stored))
        self._pending = self._worker.submit(self._complete, step, partial, leaves, extra_json)

    def wait(self) -> None:
        """Return once the save that was asked for is complete; raise if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """The complete steps, oldest first. What is in them is checked by `restore`."""
        path = self._steps.path
        return [step for step in self._steps.steps() if (path(step) / MANIFEST).is_file()]

    def restore(
        self,
        abstract_state: PyTree[jax.ShapeDtypeStruct],
        step: int | None = None,
        *,
        part: bool = False,
    ) -> tuple[int, PyTree[jax.Array], dict[str, Any]] | None:
        """The newest sound checkpoint, or that of `step`, as `(step, state, extra)`.

        Every leaf of `abstract_state` carries a sharding, on any mesh: the arrays are placed there.
        With `part`, it may leave out leaves that were saved: a model without its optimizer.
        All digests are checked before anything is read. A damaged newest step is skipped with a
        warning and the one before is used. None when there is no checkpoint at all.
        Raises `UserError` when every candidate is damaged, when there is no `step`, or when the
        leaves are those of another model.
        """
        self.wait()
        candidates = share("steps", self._steps.steps)
        if step is not None:
            if step not in candidates:
                raise UserError(f"{self._folder}: there is no step {step}; choose of {candidates}")
            candidates = [step]
        damages: list[str] = []
        while candidates:
            newest = candidates.pop()
            saved, damage = self._verify(newest)
            if damage is None:
                return newest, *self._read(self._steps.path(newest), saved, abstract_state, part)
            damages.append(f"step {newest} is damaged: {damage}")
            if candidates and is_first():
                told = f"{self._folder}: {damages[-1]}; falling back to step {candidates[-1]}"
                logger.warning(told)
        if damages:
            raise UserError(
                f"{self._folder}: no sound checkpoint ({'; '.join(damages)}); "
                "bring the files back from a copy, or start in an empty directory"
            )
        return None

    def close(self) -> None:
        """Wait for the save under way, then release the threads; raise if the save failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def _verify(self, step: int) -> tuple[Leaves, str | None]:
        """The leaves of a step, and what is damaged in it, whichever process found it."""
        leaves: Leaves = {}
        damage: str | None = None
        try:
            leaves = self._steps.verify(step, (jax.process_index(), jax.process_count()))
        except DamagedError as error:
            damage = str(error)
        found = gather("verify", damage, WORK_SECONDS)
        return leaves, next((text for text in found if text is not None), None)

    def _complete(self, step: int, partial: Path, leaves: Leaves, extra_json: str) -> None:
        """Turn what orbax writes into a complete step; runs in the background."""
        try:
            self._orbax.wait_until_finished()
            # The others' saves are complete when process 0 says so.
            share("complete", lambda: self._steps.commit(step, partial, leaves, extra_json))
        except Exception as error:
            if is_first():
                self._steps.discard(partial)
            message = f"{self._folder}: step {step} was not saved: {one_line(error)}"
            # Said at once: a program that never waits would not hear of it.
            logger.error(message)
            raise RuntimeError(message) from error
        if is_first():
            self._steps.remove_beyond(step, self._keep)

    def _read(
        self, path: Path, saved: Leaves, abstract_state: PyTree[jax.ShapeDtypeStruct], part: bool
    ) -> tuple[PyTree[jax.Array], dict[str, Any]]:
        """State and extra of the sound checkpoint at `path`, whose manifest lists `saved`."""
        wanted = _name_leaves(abstract_state)
        if part:
            saved = {name: leaf for name, leaf in saved.items() if name in wanted}
        _check_same_model(path, saved, _describe(wanted))
        for name, leaf in wanted.items():
            if leaf.sharding is None:
                raise ValueError(f"the abstract leaf {name} has no sharding; give it one")
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        arrays = self._orbax.restore(
            f"{path}/state",
            args=ocp.args.PyTreeRestore(
                stored,
                restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
                partial_restore=part,
            ),
        )
        for name in wanted.keys() - stored.keys():
            leaf = wanted[name]
            make = bind(jnp.zeros, leaf.shape, leaf.dtype)
            arrays[name] = jax.jit(make, out_shardings=leaf.sharding)()
        structure = jax.tree.structure(abstract_state)
        extra = json.loads((path / "extra.json").read_text(encoding="utf-8"))
        return jax.tree.unflatten(structure, [arrays[name] for name in wanted]), extra


def _name_leaves(tree: PyTree[Leaf]) -> dict[str, Leaf]:
    """Every leaf by its path, such as `params.layers.attn.q_a.value`, in the tree's order."""
    paths_and_leaves = jax.tree.leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in paths_and_leaves
    }
    if len(named) < len(paths_and_leaves):
        raise ValueError("two leaves of the state have the same path; rename a key that has a dot")
    return named


def _describe(named: dict[str, Leaf]) -> Leaves:
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in named.items()
    }


def _check_same_model(path: Path, saved: Leaves, wanted: Leaves) -> None:
    """Raise `UserError` naming the first leaf that differs, and how many do."""
    missing = [name for name in wanted if name not in saved]
    unknown = [name for name in saved if name not in wanted]
    changed = [name for name in wanted if name in saved and saved[name] != wanted[name]]
    if not (missing or unknown or changed):
        return
    if changed:
        was, now = saved[changed[0]], wanted[changed[0]]
        first = f"{changed[0]} is {was['dtype']}{was['shape']}, not {now['dtype']}{now['shape']}"
    else:
        first = f"{missing[0]} is not in it" if missing else f"{unknown[0]} is not in this model"
    raise UserError(
        f"{path}: a checkpoint of another model: {first} (of {len(wanted)} leaves {len(missing)} "
        f"missing, {len(changed)} of another shape or dtype, and {len(unknown)} unknown); "
        "use the configuration it was made with, or another directory"
    )
