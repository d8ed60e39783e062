"""Every family says what it says in transformers, from the same files, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.model.layers import variables
from dsjax.model.transformer import Transformer

from .conftest import Pair
from .models import ORIGINAL_LENGTH

ROWS, LENGTH, NEW = 2, 48, 64
CLOSE = 1e-4


def random_tokens(pair: Pair) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, pair.ours.config.vocab_size, (ROWS, LENGTH), dtype=np.int32)


class Both:
    """Logits and gradients of the mean cross-entropy, in both libraries."""

    def __init__(self, pair: Pair):
        tokens = random_tokens(pair)
        assert tokens.shape[1] > ORIGINAL_LENGTH
        inputs = torch.from_numpy(tokens).long()
        self.seen: list[torch.Tensor] = []
        gates = [m for m in pair.theirs.modules() if hasattr(m, "e_score_correction_bias")]
        hooks = [gate.register_forward_hook(self._watch) for gate in gates]
        pair.theirs.zero_grad()
        out = pair.theirs(inputs, labels=inputs, use_cache=False)
        out.loss.backward()
        for hook in hooks:
            hook.remove()
        self.their_loss, self.their_logits = out.loss.item(), out.logits.detach().numpy()
        self.theirs = released_gradients(pair)
        (self.our_loss, self.our_logits), self.ours = _loss(pair.ours, tokens)

    def _watch(self, gate: Any, _: Any, out: Any) -> None:
        self.seen.append(out[0].sigmoid() + gate.e_score_correction_bias)


@jax.jit
def _loss(model: Transformer, tokens: Any) -> Any:
    def loss(model: Transformer) -> tuple[jax.Array, Any]:
        logits = model(tokens).logits
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
        )
        return -picked.mean(), logits

    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    return (value, logits), gradient


def released_gradients(pair: Pair) -> dict[str, np.ndarray]:
    """Their gradients under released names: they hold all experts of a layer in two arrays."""
    gradients = {}
    for name, parameter in pair.theirs.named_parameters():
        assert parameter.grad is not None, name
        value = parameter.grad.numpy()
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            gradients[name] = value
            continue
        prefix = name.rpartition(".")[0]
        for expert, matrix in enumerate(value):
            parts = dict(down_proj=matrix)
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            gradients |= {f"{prefix}.{expert}.{n}.weight": part for n, part in parts.items()}
    return gradients


@pytest.fixture(scope="module")
def both(pair: Pair) -> Both:
    return Both(pair)


def test_the_weights_exercise_the_router(pair: Pair, both: Both) -> None:
    """s + b is negative somewhere: a mask of 0 in place of -inf would be seen."""
    if not any(tensor.kind == ROUTER_BIAS for tensor in tensors(pair.ours.config)):
        assert not both.seen
        return
    biased = torch.cat(both.seen)
    assert (biased < 0).float().mean() > 0.05
    assert (biased > 0).float().mean() > 0.05


def test_logits_agree(both: Both) -> None:
    gap = np.abs(np.asarray(both.our_logits) - both.their_logits).max()
    assert gap < CLOSE * np.abs(both.their_logits).max()
    assert abs(float(both.our_loss) - both.their_loss) < CLOSE


def test_gradients_agree_tensor_by_tensor(pair: Pair, both: Both) -> None:
    ours = {name: np.asarray(leaf[...]) for name, leaf in variables(both.ours)}
    worst, count = 0.0, 0
    for tensor in tensors(pair.ours.config):
        found = ours[tensor.path][tensor.index].reshape(tensor.shape)
        if tensor.kind == ROUTER_BIAS:
            assert not found.any()
            continue
        expected = both.theirs[tensor.name]
        norm = np.linalg.norm(expected)
        assert norm > 0 or not found.any()
        worst = max(worst, np.linalg.norm(found - expected) / max(norm, 1e-30))
        count += 1
    assert count == len(both.theirs)
    print(f"\n  {count} gradients, the worst off by {worst:.1e} of its norm")
    assert worst < CLOSE


def our_greedy(model: Transformer, prompt: np.ndarray, count: int) -> tuple[list[int], float]:
    """Tokens, and how far the closest of them was above the next best."""
    engine = Engine(model, EngineSettings(rows=1, context=prompt.shape[1] + count))
    sampling = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=2)
    engine.submit(Request("one", tuple(prompt[0].tolist()), sampling))
    found: list[int] = []
    margins: list[float] = []
    while not engine.idle:
        for update in engine.step():
            found += update.tokens
            margins += [best[1] - next_best[1] for _, _, (best, next_best) in update.logprobs]
    return found, min(margins)


@torch.no_grad()
def their_greedy(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    tokens, cache, found = torch.from_numpy(prompt).long(), None, []
    for _ in range(count):
        out = model(tokens, past_key_values=cache, use_cache=True)
        cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(tokens))
    return found


def test_greedy_decoding_agrees(pair: Pair) -> None:
    """From a prompt within YaRN's original length to far beyond it."""
    prompt = random_tokens(pair)[:1, :24]
    found, margin = our_greedy(pair.ours, prompt, NEW)
    distinct = len(set(found))
    print(f"\n  {distinct} distinct tokens, smallest margin {margin:.1e}")
    assert found == their_greedy(pair.theirs, prompt, NEW)
    assert distinct >= 20
