"""`jax.lax.ragged_all_to_all` by its documentation, for backends that have none."""

import jax.numpy as jnp
from jax import lax


def emulate(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Everybody's operand is gathered, and each slice written where its sender says.

    Sizes that the two ends do not agree on, or a slice beyond either array, poison the result.
    """
    me, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    operands, begins, sizes, targets = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    place = jnp.arange(output.shape[0])
    result, sound = output, jnp.array(True)
    for source in range(devices):
        begin, size, target = begins[source, me], sizes[source, me], targets[source, me]
        inside = (place >= target) & (place < target + size)
        slice_ = operands[source][jnp.clip(begin + place - target, 0, len(operand) - 1)]
        result = jnp.where(inside.reshape(-1, *[1] * (output.ndim - 1)), slice_, result)
        sound &= (size == recv_sizes[source]) & (begin >= 0) & (begin + size <= len(operand))
        sound &= (target >= 0) & (target + size <= len(output))
    return jnp.where(sound, result, jnp.full_like(result, jnp.nan))
