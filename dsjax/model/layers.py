"""Parameters with logical axes, and the layers that everything is built from.

A weight has the layout of the released file, [out, in], so conversion never transposes one.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsjax.kernels.block_scaled import block_scaled_matmul
from dsjax.numerics.fp8 import dequantize_blocks
from dsjax.numerics.fp8_host import BLOCK, E4M3
from sharding.by_hand import first_place, gathered, is_split, summed, summed_over_copies
from sharding.rules import Layout, current_layout

SCALE = "_scale"
"""What is added to a weight's name for that of its scales."""

Tree = TypeVar("Tree")


class RouterBias(nnx.Variable[Array]):
    """State that steers the choice of experts: no gradient, no weight decay, always float32."""


class Frozen(nnx.Variable[Array]):
    """A weight under an adapter: no gradient, no moments, and no place in a run's checkpoints."""


class BlockScale(nnx.Variable[Array]):
    """float32 scales of a weight in FP8, one for each 128 x 128 of the released matrix.

    They lie beside it in its module, as `weight_scale` for `weight`, and are neither trained nor
    decayed. `merged` says how many of the weight's last dimensions are the matrix' rows, and how
    many its columns.
    """


def parameter(
    key: Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float, dtype: jnp.dtype
) -> nnx.Param[Array]:
    """A normally distributed parameter that knows the logical names of its dimensions."""
    value = std * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def use(
    weight: nnx.Variable[Array],
    dtype: DTypeLike,
    scale: BlockScale | None = None,
    wide: bool = False,
) -> Array:
    """The one way a weight enters a computation: cast to its dtype and, by hand, gathered.

    A weight in FP8 needs its scales. It is widened as loading widens one, bit by bit: multiplied in
    float32, rounded once; by hand, it is gathered before. What `wide` is, `gathered` tells.
    """
    if scale is None:
        assert weight.dtype != E4M3  # Its values mean nothing without their scales.
        return gathered(weight[...], variable_axes(weight), dtype, wide)
    whole, merged = gathered(weight[...], variable_axes(weight), E4M3), scale.get_metadata("merged")
    return dequantize_blocks(whole, scale[...], dtype, merged, _first_places(weight, whole, merged))


def _first_places(
    weight: nnx.Variable[Array], part: Array, merged: tuple[int, int]
) -> tuple[Any, Any] | None:
    """By hand, which of the matrix' rows and columns a device's part of it begins at."""
    axes = variable_axes(weight)
    ends = part.ndim - merged[1], part.ndim
    found = []
    for end, count in zip(ends, merged, strict=True):
        names, sizes = axes[end - count : end], part.shape[end - count : end]
        assert not any(map(is_split, names[1:]))  # Else the part would not be one piece.
        found.append(first_place(names[0], sizes[0]) * math.prod(sizes[1:]))
    return None if not any(map(is_split, axes)) else (found[0], found[1])


def scale_of(module: nnx.Module, name: str) -> BlockScale | None:
    """The scales of a module's weight; None where it is not in FP8."""
    return getattr(module, f"{name}{SCALE}", None)


def put_columns_first(module: nnx.Module, name: str) -> None:
    """Turn a weight [*stack, rows, columns] and its scales to [*stack, columns, rows], in place."""
    weight: nnx.Variable[Array] = getattr(module, name)
    _swap(weight)
    if (scale := scale_of(module, name)) is not None:
        _swap(scale)
        scale.set_metadata("merged", (1, 1))


def _swap(variable: nnx.Variable[Array]) -> None:
    """Exchange the last two dimensions of a variable, and their names."""
    *stack, rows, columns = variable.get_metadata("axes")
    variable.set_metadata("axes", (*stack, columns, rows))
    variable.set_value(jnp.swapaxes(variable[...], -1, -2))


def variable_axes(variable: nnx.Variable[Any]) -> tuple[str, ...]:
    """Logical names of all dimensions; a stack of layers has one more than its layer declared."""
    axes: tuple[str, ...] = variable.get_metadata("axes")
    return ("layers",) * (len(variable.shape) - len(axes)) + axes


def variables(tree: Any) -> list[tuple[str, nnx.Variable[Any]]]:
    """Every variable of a module with its dotted path, in the order of the tree's leaves."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_variable)
    return [(_dotted(path), leaf) for path, leaf in flat if _is_variable(leaf)]


def tree_shardings(tree: Tree, layout: Layout) -> Tree:
    """The same tree with each array replaced by its sharding.

    Variables go where their axes say; arrays that are no variables (counters, random keys) are
    on every device.

    Raises:
        UserError: a dimension does not divide over its mesh axes.
    """
    leaves = jax.tree.leaves(tree, is_leaf=_is_variable)
    shardings = [
        layout.sharding(
            variable_axes(leaf) if _is_variable(leaf) else (None,) * leaf.ndim, leaf.shape
        )
        for leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def tree_places(tree: Tree) -> Tree | None:
    """For `by_hand`: each array's `PartitionSpec` under the current layout, if there is one."""
    layout = current_layout()
    return layout and jax.tree.map(lambda place: place.spec, tree_shardings(tree, layout))


def sum_of_copies(gradients: Tree) -> Tree:
    """Each parameter's gradient, summed over the devices that hold the same part of it."""

    def one(gradient: nnx.Variable[Array]) -> nnx.Variable[Array]:
        return gradient.replace(summed_over_copies(gradient[...], variable_axes(gradient)))

    return jax.tree.map(one, gradients, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


class Linear(nnx.Module):
    """y = W x, or W x + b. Inputs and outputs may span several dimensions, such as heads."""

    def __init__(
        self,
        key: Array,
        out: dict[str, int],
        into: dict[str, int],
        *,
        std: float,
        dtype: jnp.dtype,
        bias: bool = False,
    ):
        """`out` and `into` map logical axis names to sizes: the weight is [*out, *into]."""
        shape = (*out.values(), *into.values())
        self.into = tuple(into)
        self.weight = parameter(key, shape, (*out, *into), std, dtype)
        if bias:
            self.bias = nnx.Param(jnp.zeros(tuple(out.values()), dtype), axes=tuple(out))
        self.has_bias = bias
        self.inner = tuple(out.values())[1:]
        self.latent = out.get("latent")
        self.inputs_first = False

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contract the last dimensions of x with the weight's inputs, and add the bias."""
        n = len(self.into)
        if self.inputs_first:
            y = self._by_matrix(x.reshape(*x.shape[:-n], -1))
        else:
            weight = use(self.weight, x.dtype, scale_of(self, "weight"))
            # Flat: heads that lie one after the other already are not laid out anew.
            flat, matrix = (a.reshape(*a.shape[:-n], -1) for a in (x, weight))
            y = jnp.einsum("...i,oi->...o", flat, matrix.reshape(-1, flat.shape[-1]))
            y = y.reshape(*y.shape[:-1], *matrix.shape[:-1])
        y = summed(y, *self.into)
        if (adapter := adapter_of(self)) is not None:
            y += adapter(x)
        if not self.has_bias:
            return y
        bias = use(self.bias, x.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def matrix(self, dtype: DTypeLike) -> Array:
        """The weight [*out, *into] as a product needs it, an adapter multiplied out."""
        weight = use(self.weight, dtype, scale_of(self, "weight"))
        adapter = adapter_of(self)
        return weight if adapter is None else weight + adapter.product(dtype)

    def _by_matrix(self, x: Float[Array, "*T I"]) -> Float[Array, "..."]:
        """x times a weight whose inputs are first; in FP8, if a device's part is whole blocks."""
        scale = scale_of(self, "weight")
        names = variable_axes(self.weight)
        whole = gathered(self.weight[...], names, E4M3) if scale is not None else None
        blocks = whole is not None and all(
            size % BLOCK == 0 or not is_split(name)
            for name, size in zip(names, whole.shape, strict=True)
        )
        if whole is not None and scale is not None and blocks:
            first = [first_place(n, s) // BLOCK for n, s in zip(names, whole.shape, strict=True)]
            flat = x.reshape(-1, x.shape[-1])
            y = block_scaled_matmul(flat, whole, scale[...], (first[0], first[1]))
        else:
            y = x @ use(self.weight, x.dtype, scale)
        y = y[..., : self.latent] if self.latent else y
        return y.reshape(*x.shape[:-1], -1, *self.inner)

    def put_inputs_first(self) -> None:
        """Turn the weight to a matrix [I, O], which few rows at a time are multiplied faster by.

        Several dimensions of inputs or outputs become one, named as the first of them. Outputs in
        FP8 that no mesh splits get columns of zeros till their last block is whole, since a TPU's
        compiler turns a matrix whose columns end within one, and turns it back at every step.
        """
        outputs = len(self.weight.shape) - len(self.into)
        axes, shape = self.weight.get_metadata("axes"), self.weight.shape
        rows, columns = math.prod(shape[:outputs]), math.prod(shape[outputs:])
        weight = self.weight[...].reshape(rows, columns)
        if scale_of(self, "weight") is not None and axes[0] == "latent":
            weight = jnp.pad(weight, ((0, -rows % BLOCK), (0, 0)))
        self.weight.set_value(weight)
        self.weight.set_metadata("axes", (axes[0], axes[outputs]))
        put_columns_first(self, "weight")
        self.inputs_first = True


class Adapter(nnx.Module):
    """What is added to a linear layer (LoRA, arXiv:2106.09685, section 4.1):

        (x A^T) B^T * alpha / r,    A [r, *into] small and random, B [*out, r] zero at first

    Differs from the paper: A is drawn as in PEFT, uniformly within +-1/sqrt(inputs). No dropout.
    """

    def __init__(self, key: Array, linear: Linear, rank: int, alpha: float):
        weight, axes = linear.weight, linear.weight.get_metadata("axes")
        stack, inputs = len(weight.shape) - len(axes), len(linear.into)
        out, into = axes[:-inputs], axes[-inputs:]
        layers, shape = weight.shape[:stack], weight.shape[stack:]
        bound = math.prod(shape[-inputs:]) ** -0.5
        drawn = (*layers, rank, *shape[-inputs:])
        a = jax.random.uniform(key, drawn, jnp.float32, -bound, bound)
        self.a = nnx.Param(a, axes=("latent", *into))
        zeros = jnp.zeros((*layers, *shape[:-inputs], rank), jnp.float32)
        self.b = nnx.Param(zeros, axes=(*out, "latent"))
        self.into = into
        self.scale = alpha / rank

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Of what the layer is given."""
        n = len(self.into)
        mine, theirs = tuple(range(x.ndim - n, x.ndim)), tuple(range(1, n + 1))
        a, b = use(self.a, x.dtype), use(self.b, x.dtype)
        low = jax.lax.dot_general(x, a, ((mine, theirs), ((), ())))
        low = summed(low, *self.into) * self.scale
        return jax.lax.dot_general(low, b, (((low.ndim - 1,), (b.ndim - 1,)), ((), ())))

    def product(self, dtype: DTypeLike) -> Array:
        """B A alpha / r, of the weight's shape."""
        a, b = use(self.a, dtype), use(self.b, dtype) * self.scale
        return jax.lax.dot_general(b, a, (((b.ndim - 1,), (0,)), ((), ())))


def adapter_of(linear: Linear) -> Adapter | None:
    """What a linear layer was given beside its weight; None where it has none."""
    return getattr(linear, "adapter", None)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype), axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Each vector to root mean square 1, times the gain; in the dtype of x."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = use(self.weight, jnp.float32)
        return (x32 * inverse * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Embedding(nnx.Module):
    """A vector for each token id."""

    def __init__(self, key: Array, vocab: int, embed: int, *, std: float, dtype: jnp.dtype):
        self.weight = parameter(key, (vocab, embed), ("vocab", "embed"), std, dtype)

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """The rows of these ids, in `dtype`."""
        weight = use(self.weight, dtype)
        if not is_split("vocab"):
            return weight[tokens]
        place = tokens - first_place("vocab", weight.shape[0])
        here = (place >= 0) & (place < weight.shape[0])
        rows = weight[jnp.clip(place, 0, weight.shape[0] - 1)]
        return summed(jnp.where(here[..., None], rows, 0), "vocab")


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, key: Array, embed: int, width: int, *, std: float, dtype: jnp.dtype):
        gate, up, down = jax.random.split(key, 3)
        wide, narrow = {"mlp": width}, {"embed": embed}
        self.gate = Linear(gate, wide, narrow, std=std, dtype=dtype)
        self.up = Linear(up, wide, narrow, std=std, dtype=dtype)
        self.down = Linear(down, narrow, wide, std=std, dtype=dtype)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Token by token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def count_parameters(tree: Any) -> int:
    """Numbers held by a module's variables, router biases included, scales of FP8 not."""
    return sum(
        math.prod(variable.shape)
        for _, variable in variables(tree)
        if not isinstance(variable, BlockScale)
    )
