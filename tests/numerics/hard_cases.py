"""Matrices on which a quantizer goes wrong if it can; all [130, 258], so that edges are partial."""

import numpy as np

from tests.numerics.definition import MAGNITUDES, MIDPOINTS

SHAPE = (130, 258)
"""Two blocks by three, the last row of blocks 2 high, the last column 2 wide."""

RNG = np.random.default_rng(0)


def _normal(std):
    return (std * RNG.standard_normal(SHAPE)).astype(np.float32)


def _under_scale_one(magnitudes):
    """Both signs of these and their neighbours in float32, in blocks and tiles of amax 448."""
    magnitudes = magnitudes.astype(np.float32)
    near = np.concatenate([
        magnitudes,
        np.nextafter(magnitudes, np.float32(0)),
        np.nextafter(magnitudes, np.float32(np.inf)),
    ])  # fmt: skip
    x = np.resize(np.concatenate([near, -near]), SHAPE)
    x[:, ::128] = 448  # One for each tile.
    return np.minimum(x, np.float32(448))


def _powers_of_two():
    """The amax of each tile, and so of each block, is a power of two."""
    x = RNG.uniform(-1, 1, SHAPE).astype(np.float32)
    x[:, ::128] = 1
    return x * 2.0 ** RNG.integers(-13, 60, (SHAPE[0], 1)).astype(np.float32)


def _largest():
    """Many amax, each beside what is next to it: some exceed 448 times the rounded scale."""
    x = np.exp(10 * RNG.standard_normal((SHAPE[0], 1))).astype(np.float32)
    x = np.clip(x, np.float32(1e-4), None) * np.ones(SHAPE, np.float32)
    x[:, 1::2] = np.nextafter(x[:, 1::2], np.float32(0))
    x[:, 2::5] *= -1
    return x


def _signed_zeros():
    return np.resize(np.array([0.0, -0.0], np.float32), SHAPE)


def _extremes():
    """The largest and the smallest numbers of float32 in different tiles and in the same ones."""
    x = np.zeros(SHAPE, np.float32)
    x[:70] = np.resize(np.array([1e-40, -1e-40, 3.2e38, -1e-38], np.float32), SHAPE)[:70]
    x[70:] = np.resize(np.array([1e-45, -1e-30, 1e-6, 9.9e-5], np.float32), SHAPE)[70:]
    return x


CASES = {
    "weights": _normal(0.02),
    "activations": _normal(3.0) * np.exp(_normal(2.0)),
    "amax at powers of two": _powers_of_two(),
    "every value and its neighbours": _under_scale_one(MAGNITUDES),
    "ties and their neighbours": _under_scale_one(MIDPOINTS),
    "denormals": _under_scale_one(np.arange(0, 20, 0.25) * 2.0**-9),
    "448 scales and above": _largest(),
    "zeros": _signed_zeros(),
    "below the floor": _normal(1e-6),
    "extremes": _extremes(),
}
