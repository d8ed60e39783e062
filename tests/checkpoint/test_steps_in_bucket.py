"""A run's steps in a bucket: there by their manifest, and sound as the store lists them."""

import json
from collections.abc import Callable
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.checkpoint.manifest import MANIFEST, DamagedError
from dsjax.checkpoint.run_weights import read_run
from dsjax.checkpoint.steps_in_bucket import StepsInBucket
from dsjax.checkpoint.store import _describe, _name_leaves
from dsjax.errors import UserError
from dsjax.places import ObjectPath, as_path
from sharding.mesh import make_mesh
from tests.object_store import BUCKET, ObjectStore

CONFIG = CONFIGS["v3"]
LEAVES = {"a": {"shape": [16], "dtype": "float32"}}
HOME = "run/checkpoints"


@pytest.fixture
def steps(store: ObjectStore) -> StepsInBucket:
    folder = as_path(f"gs://{BUCKET}/{HOME}")
    assert isinstance(folder, ObjectPath)
    return StepsInBucket(folder)


def _verify(steps: StepsInBucket, step: int) -> object:
    return steps.verify(step, (0, 1))


def save(steps: StepsInBucket, step: int, data: bytes = b"numbers") -> None:
    """A step whose state others than orbax have written."""
    folder = steps.begin(step)
    for name in ("state/d/one", "state/d/two", "state/manifest.ocdbt"):
        (folder / name).write_bytes(data + name.encode())
    steps.commit(step, folder, LEAVES, json.dumps({"tokens": step}))


def test_orbax_saves_into_a_bucket_and_restores_on_another_mesh(steps: StepsInBucket) -> None:
    array = jnp.arange(16.0)
    with closing(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))) as lib:
        folder = steps.begin(3)
        lib.save(f"{folder}/state", args=ocp.args.PyTreeSave({"a": array}))
        lib.wait_until_finished()
        assert steps.steps() == []
        steps.commit(3, folder, LEAVES, "{}")
        assert steps.steps() == [3]
        assert _verify(steps, 3) == LEAVES
        place = NamedSharding(make_mesh({"fsdp": 8}), PartitionSpec("fsdp"))
        wanted = {"a": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=place)}
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        restored = lib.restore(
            f"{steps.path(3)}/state",
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments),
        )
    assert restored["a"].sharding == place
    assert np.array_equal(restored["a"], array)


def test_the_weights_of_a_run_in_a_bucket_are_read_tensor_by_tensor(
    steps: StepsInBucket, store: ObjectStore
) -> None:
    """Of the newest sound step; a damaged one is passed over."""
    with closing(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))) as lib:
        for step in (1, 2):
            arrays = _name_leaves({"model": place(CONFIG, random_weights(CONFIG, seed=step))})
            folder = steps.begin(step)
            lib.save(f"{folder}/state", args=ocp.args.PyTreeSave(arrays))
            lib.wait_until_finished()
            steps.commit(step, folder, _describe(arrays), "{}")
    store.put(f"{HOME}/00000002/extra.json", b"changed")
    found = read_run(as_path(f"gs://{BUCKET}/run"), CONFIG, check=True)
    expected = random_weights(CONFIG, seed=1)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name].read(), array), name


def test_the_manifest_is_written_last(steps: StepsInBucket, store: ObjectStore) -> None:
    """Whatever stops a save, there is no step."""
    for failing in ("extra.json", "objects.json", MANIFEST):
        store.fail = lambda method, name, last=failing: (
            (403, "stopped") if method == "POST" and name.endswith(last) else None
        )
        with pytest.raises(UserError, match="stopped"):
            save(steps, 1)
        store.fail = lambda method, name: None
        assert steps.steps() == []
    save(steps, 1)
    assert steps.steps() == [1]
    assert _verify(steps, 1) == LEAVES
    assert json.loads((steps.path(1) / "extra.json").read_bytes()) == {"tokens": 1}


Damage = Callable[[ObjectStore, str], object]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "an object that is missing": (
        lambda store, home: store.objects.pop(f"{home}/state/d/one"),
        "state/d/one is missing",
    ),
    "an object too many": (
        lambda store, home: store.put(f"{home}/state/d/zero", b""),
        "state/d/zero is not in objects.json",
    ),
    "other bytes": (
        lambda store, home: store.put(f"{home}/state/d/two", b"Numbersstate/d/two"),
        "state/d/two is not what was saved",
    ),
    "another extra.json": (
        lambda store, home: store.put(f"{home}/extra.json", b'{"tokens": 8}'),
        "extra.json does not have the digest",
    ),
    "another list": (
        lambda store, home: store.put(f"{home}/objects.json", b"{}"),
        "objects.json does not have the digest",
    ),
    "no list": (
        lambda store, home: store.objects.pop(f"{home}/objects.json"),
        "objects.json is missing",
    ),
    "a manifest with one bit changed": (
        lambda store, home: store.put(
            f"{home}/{MANIFEST}", store.objects[f"{home}/{MANIFEST}"].replace(b"16", b"17")
        ),
        "does not have the digest in its first line",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_step_that_is_not_what_was_saved_is_found(
    kind: str, steps: StepsInBucket, store: ObjectStore
) -> None:
    damage, says = DAMAGES[kind]
    save(steps, 7)
    damage(store, f"{HOME}/00000007")
    with pytest.raises(DamagedError, match=says):
        _verify(steps, 7)


def test_a_step_under_the_name_of_another_is_found(
    steps: StepsInBucket, store: ObjectStore
) -> None:
    save(steps, 7)
    for name, data in store.tree(f"{HOME}/00000007").items():
        store.put(f"{HOME}/00000008/{name}", data)
    with pytest.raises(DamagedError, match="is of step 7"):
        _verify(steps, 8)


def test_a_step_is_checked_without_reading_its_state(
    steps: StepsInBucket, store: ObjectStore
) -> None:
    save(steps, 7, data=b"x" * 100_000)
    store.forget()
    _verify(steps, 7)
    assert not [name for name in store.sent if "/state/" in name]


def test_the_newest_are_kept_and_those_of_a_future_that_was_left_are_not(
    steps: StepsInBucket, store: ObjectStore
) -> None:
    for step in (1, 2, 3, 4, 9):
        save(steps, step)
    steps.remove_beyond(4, keep=2)
    assert steps.steps() == [3, 4]
    assert {name.split("/")[0] for name in store.tree(HOME)} == {"00000003", "00000004"}


def test_deleting_takes_the_manifest_first(steps: StepsInBucket, store: ObjectStore) -> None:
    save(steps, 1)
    store.fail = lambda method, name: (
        (403, "stopped") if method == "DELETE" and "/state/" in name else None
    )
    with pytest.raises(UserError, match="stopped"):
        steps.discard(steps.path(1))
    store.fail = lambda method, name: None
    assert steps.steps() == []


def test_a_new_save_finds_nothing_of_an_older_one(steps: StepsInBucket, store: ObjectStore) -> None:
    save(steps, 1)
    store.put(f"{HOME}/00000001/state/d/older", b"")
    save(steps, 1, data=b"newer")
    assert _verify(steps, 1) == LEAVES


def test_what_a_killed_run_left_is_cleared(steps: StepsInBucket, store: ObjectStore) -> None:
    save(steps, 1)
    (steps.begin(2) / "state/d/one").write_bytes(b"half")
    steps.prepare()
    assert {name.split("/")[0] for name in store.tree(HOME)} == {"00000001"}
    assert _verify(steps, 1) == LEAVES


def test_a_folder_that_cannot_be_written_is_said_to_be(
    steps: StepsInBucket, store: ObjectStore
) -> None:
    store.fail = lambda method, name: (403, "no create") if method == "POST" else None
    with pytest.raises(UserError, match=r"permission denied \(no create\)"):
        steps.prepare()
