"""Where the places of a sequence lie when it is split over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsjax.errors import UserError
from sharding.context_parallel import all_places, check_context, chunks_of, local_places, pass_on

AXIS, DEVICES = "ring", 4
JOINED = PartitionSpec(None, AXIS)


def on_devices(function, devices=DEVICES, results=JOINED):
    """Compute on every device from whole arrays; results are joined along dimension 1."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    return partial(jax.shard_map, mesh=mesh, out_specs=results, check_vma=False)(
        function, in_specs=PartitionSpec()
    )


def zigzag(length, devices):
    """The places of every device, one device after another."""
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, -1 - i]].ravel() for i in range(devices)])


def test_a_device_has_an_early_chunk_and_a_late_one_in_this_order():
    x = np.random.default_rng(0).normal(size=(2, 24, 3)).astype(np.float32)
    got = on_devices(lambda x: local_places(x, AXIS))(x)
    np.testing.assert_array_equal(got, x[:, zigzag(24, DEVICES)])
    turned = on_devices(lambda x: local_places(x.T, AXIS, dim=0).T, results=PartitionSpec(AXIS))
    # Joined along dimension 0, where every device puts both of its rows.
    want = x[:, zigzag(24, DEVICES), 0].reshape(2, DEVICES, -1).swapaxes(0, 1).reshape(-1, 6)
    np.testing.assert_array_equal(turned(x[..., 0]), want)


def test_all_places_puts_them_back_in_order_on_every_device():
    x = np.random.default_rng(0).normal(size=(2, 24, 3)).astype(np.float32)
    got = on_devices(lambda x: all_places(local_places(x, AXIS), AXIS))(x)
    np.testing.assert_array_equal(got, np.tile(x, (1, DEVICES, 1)))
    turned = on_devices(lambda x: all_places(local_places(x.T, AXIS, dim=0), AXIS, dim=0).T)
    np.testing.assert_array_equal(turned(x[..., 0]), np.tile(x[..., 0], (1, DEVICES)))


def test_one_device_keeps_the_sequence_as_it_is():
    x = np.arange(7, dtype=np.int32)[None]  # an odd length, which would not divide by two

    def there_and_back(x):
        return all_places(local_places(x, AXIS), AXIS)

    np.testing.assert_array_equal(on_devices(there_and_back, devices=1)(x), x)


def test_what_is_passed_on_comes_from_the_device_before_and_comes_home():
    def turns(x):
        mine = jax.lax.axis_index(AXIS)[None, None] + x
        after = [mine]
        for _ in range(DEVICES):
            after.append(pass_on(after[-1], AXIS))
        return jnp.concatenate(after)

    got = on_devices(turns)(jnp.zeros((1, 1), jnp.int32))
    want = (np.arange(DEVICES)[None] - np.arange(DEVICES + 1)[:, None]) % DEVICES
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_has_the_same_work_and_none_is_in_vain(devices):
    chunks = [chunks_of(device, devices) for device in range(devices)]
    assert sorted(sum(chunks, ())) == list(range(2 * devices))

    def pairs(q_chunk, k_chunk):
        """Twice the pairs of a chunk of queries and one of keys, in chunks by chunks."""
        return 2 * (k_chunk < q_chunk) + (k_chunk == q_chunk)

    work = [
        [sum(pairs(q, k) for q in mine for k in chunks[i - turn]) for turn in range(devices)]
        for i, mine in enumerate(chunks)
    ]
    # In every turn, so that nobody waits: the own chunks are seen causally, then two wholly.
    assert work == [[4, *[4] * (devices - 1)]] * devices
    assert sum(map(sum, work)) == (2 * devices) ** 2


def test_a_length_that_does_not_divide_is_refused_with_lengths_that_do():
    check_context(96, 8)
    check_context(7, 1)
    with pytest.raises(UserError, match=r"100 places .* 2 x 8 chunks .* length of 96 or 112,"):
        check_context(100, 8)
    with pytest.raises(UserError, match=r"6 places .* choose a length of 16, or"):
        check_context(6, 8)
    with pytest.raises(UserError, match=r"12 places .* 2 x 4 chunks"):
        on_devices(lambda x: local_places(x, AXIS))(jnp.zeros((1, 12)))
