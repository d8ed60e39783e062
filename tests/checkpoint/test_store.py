"""What is restored is bit for bit what was saved, and a save that failed is never called done."""

import resource
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from training_states import abstract, bits_of, make_state

from dsjax.checkpoint import steps_on_disk
from dsjax.checkpoint.store import CheckpointStore
from dsjax.errors import UserError

EXTRA = {"iterator": {"position": 17, "epoch": [0, 1]}, "fingerprint": "5e1f", "tokens": 10**13}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with closing(CheckpointStore(tmp_path / "checkpoints", keep=10)) as store:
        yield store


# ---------------------------------------------------------------------------------------------
# What is restored is what was saved
# ---------------------------------------------------------------------------------------------


def test_every_kind_of_leaf_comes_back_bit_for_bit(store: CheckpointStore):
    state = make_state(3)
    store.save(120, state, EXTRA)
    store.wait()
    assert store.steps() == [120]
    step, restored, extra = store.restore(abstract(state))
    assert (step, extra) == (120, EXTRA)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits_of(restored) == bits_of(state)
    assert jnp.issubdtype(restored["key"].dtype, jax.dtypes.prng_key)


def test_a_flax_module_and_its_random_state_come_back(store: CheckpointStore):
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.router = nnx.Linear(4, 8, rngs=rngs)
            self.bias = nnx.Variable(jnp.arange(8.0))
            self.rngs = rngs

    model = Model(nnx.Rngs(5))
    store.save(1, {"model": model}, {})
    target = abstract({"model": Model(nnx.Rngs(6))}, model.bias[...].sharding)
    _, restored, _ = store.restore(target)
    assert isinstance(restored["model"], Model)
    assert bits_of(restored["model"]) == bits_of(model)
    assert (restored["model"].rngs.noise() == model.rngs.noise()).all()


def test_eight_devices_restore_onto_other_meshes(store: CheckpointStore):
    saving = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    other = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    state = {
        "w": jnp.arange(128.0).reshape(16, 8),
        "m": jnp.arange(16, dtype=jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(0), 8),
        "replicated": jnp.float32(2.5),
    }
    specs = {name: PartitionSpec("fsdp") for name in ("w", "m", "keys")}
    specs["replicated"] = PartitionSpec()
    store.save(
        1, {n: jax.device_put(x, NamedSharding(saving, specs[n])) for n, x in state.items()}, {}
    )
    specs["w"] = PartitionSpec("tensor", "fsdp")
    for place in (lambda name: NamedSharding(other, specs[name]), lambda _: one_device()):
        target = {name: abstract(x, place(name)) for name, x in state.items()}
        _, restored, _ = store.restore(target)
        assert bits_of(restored) == bits_of(state)
        assert {n: x.sharding for n, x in restored.items()} == {n: place(n) for n in state}


def one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[5])


def test_an_empty_folder_restores_nothing(store: CheckpointStore):
    assert store.restore(abstract(make_state(0))) is None
    assert store.steps() == []


def test_an_older_step_can_be_asked_for(store: CheckpointStore):
    for step in (1, 2):
        store.save(step, make_state(step), {"step": step})
    target = abstract(make_state(0))
    assert store.restore(target, step=1)[2] == {"step": 1}
    with pytest.raises(UserError, match=r"there is no step 3; choose of \[1, 2\]"):
        store.restore(target, step=3)


def test_an_abstract_leaf_without_sharding_is_refused(store: CheckpointStore):
    store.save(1, {"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match="w has no sharding"):
        store.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_two_leaves_of_one_name_are_refused(store: CheckpointStore):
    with pytest.raises(ValueError, match="same path"):
        store.save(1, {"a": {"b": jnp.ones(2)}, "a.b": jnp.ones(2)}, {})
    assert store.steps() == []


# ---------------------------------------------------------------------------------------------
# Saving is asynchronous, and a failed save is never called done
# ---------------------------------------------------------------------------------------------


def test_saving_goes_on_behind_donated_buffers(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    go_on = threading.Event()
    write_manifest = steps_on_disk.write_manifest

    def write_later(*args: Any) -> None:
        assert go_on.wait(timeout=60)
        write_manifest(*args)

    monkeypatch.setattr(steps_on_disk, "write_manifest", write_later)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    for step, spec in enumerate((PartitionSpec("fsdp"), PartitionSpec()), start=1):
        go_on.clear()
        sharding = NamedSharding(mesh, spec)
        state = {
            "w": jax.device_put(jax.random.normal(jax.random.key(step), (512, 1024)), sharding)
        }
        expected, target = np.array(state["w"]), abstract(state)
        store.save(step, state, {})
        overwrite = jax.jit(lambda w: 0 * w, donate_argnums=0)
        state["w"] = jax.block_until_ready(overwrite(state["w"]))
        assert step not in store.steps()
        go_on.set()
        store.wait()
        assert step in store.steps()
        np.testing.assert_array_equal(store.restore(target)[1]["w"], expected)


def test_extra_is_taken_when_save_is_called(store: CheckpointStore):
    extra = {"tokens": 1}
    store.save(1, make_state(1), extra)
    extra["tokens"] = 2
    assert store.restore(abstract(make_state(1)))[2] == {"tokens": 1}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 64 KiB: the system refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_the_disk_refuses_is_never_listed(
    store: CheckpointStore, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
):
    # One array only: orbax forgets the writes beside a failed one, and asyncio complains of them.
    large = {"w": jax.random.normal(jax.random.key(0), (2**17,))}
    store.save(1, large, {})
    store.wait()
    request.getfixturevalue("full_disk")
    store.save(2, large, {})
    with pytest.raises(RuntimeError, match=r"step 2 was not saved: .*File too large"):
        store.wait()
    assert store.steps() == [1]
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "step 2 was not saved" in caplog.text


@pytest.mark.parametrize("broken", ["write_manifest", "os.rename"])
def test_a_failure_of_any_act_is_raised_by_the_next_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, broken: str
):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    store.save(1, make_state(1), {})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(f"dsjax.checkpoint.steps_on_disk.{broken}", fail)
        store.save(2, make_state(2), {})
        with pytest.raises(RuntimeError, match="step 2 was not saved"):
            store.save(3, make_state(3), {})
    assert store.steps() == [1]
    store.save(4, make_state(4), {})
    store.wait()
    assert store.steps() == [1, 4]


def test_close_raises_what_a_save_could_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = CheckpointStore(tmp_path, keep=1)
    monkeypatch.setattr(steps_on_disk, "write_manifest", lambda *_: 1 / 0)
    store.save(1, make_state(1), {})
    with pytest.raises(RuntimeError, match="step 1 was not saved"):
        store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot hold checkpoints \(Not a directory\)"):
        CheckpointStore(tmp_path / "file" / "run", keep=1)


# ---------------------------------------------------------------------------------------------
# Another model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"a": (2, "f4")},
            r"b\.c is not in this model \(of 1 leaves 0 missing, 0 of .*, and 1 unknown\)",
        ),
        (
            {"a": (2, "f4"), "b": {"c": (3, "i4")}, "d": (1, "f4")},
            r"d is not in it \(of 3 leaves 1 missing, 0 of .*, and 0 unknown\)",
        ),
        (
            {"a": (4, "f4"), "b": {"c": (3, "i4")}},
            r"a is float32\[2\], not float32\[4\] \(of 2 leaves 0 missing, 1 of",
        ),
        ({"a": (2, "f4"), "b": {"c": (3, "u4")}}, r"b\.c is int32\[3\], not uint32\[3\]"),
    ],
    ids=["unknown leaf", "missing leaf", "other shape", "other dtype"],
)
def test_a_checkpoint_of_another_model_is_refused(
    store: CheckpointStore, target: Any, message: str
):
    store.save(1, {"a": jnp.ones(2), "b": {"c": jnp.arange(3)}}, {})
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf[0],), leaf[1], sharding=one_device()),
        target,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    with pytest.raises(UserError, match=f"a checkpoint of another model: {message}") as error:
        store.restore(target)
    assert "\n" not in str(error.value)
