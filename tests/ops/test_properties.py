"""The numeric contract on inputs that nobody chose: random shapes, strides, dtypes, offsets and magnitudes.

Hypothesis draws the arguments of each op and, when one breaks the contract, the smallest that still does. The C++ CPU
column is tested: the others share everything above the kernel, and run on the fixed cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kolors_fast.ops import SPECS, _backends, use_backend
from kolors_fast.ops._spec import Inputs, cast, map_tensors, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAGNITUDES = ((1.0, 0.0), (1e-3, 0.0), (1e3, 0.0), (1.0, 50.0))  # standard deviation, mean
FLOAT64 = torch.float64


REPEATS = 16  # of one example's inputs with other values: over a few values, a root mean square is luck


class Draws:
    """Random sizes and float64 tensors, all from one draw of Hypothesis."""

    def __init__(self, draw: Callable[[Any], Any], seed: int, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.deviation, self.mean = draw(st.sampled_from(MAGNITUDES))

    def size(self, most: int, least: int = 1) -> int:
        return self.draw(st.integers(least, most))  # type: ignore[no-any-return]

    def sizes(self, count: int, most: int) -> tuple[int, ...]:
        return tuple(self.size(most) for _ in range(count))

    def chance(self) -> bool:
        return self.draw(st.booleans())  # type: ignore[no-any-return]

    def flat(self, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=FLOAT64) * deviation + mean

    def tensor(self, *shape: int, last_dense: bool = False) -> Tensor:
        """Of this example's magnitude, with any order of strides, gaps and offset."""
        values = self.flat(*shape, mean=self.mean, deviation=self.deviation)
        return self.placed(values, last_dense)

    def placed(self, values: Tensor, last_dense: bool = False) -> Tensor:
        """The same values elsewhere in memory: axes in any order, every second element, an offset."""
        order = list(self.draw(st.permutations(range(values.dim() - last_dense))))
        order += [values.dim() - 1] if last_dense else []
        step = 1 if last_dense else self.draw(st.sampled_from((1, 1, 2)))
        offset, rest = self.draw(st.integers(0, 9)), self.draw(st.sampled_from((0, 8)))  # 0: for .ci/sanitize
        storage = torch.full((offset + step * values.numel() + rest,), float("nan"), dtype=FLOAT64)
        strides, stride = [0] * values.dim(), step
        for axis in reversed(order):
            strides[axis] = stride
            stride *= max(values.shape[axis], 1)
        return storage.as_strided(values.shape, strides, offset).copy_(values)


def group_norm_silu(d: Draws) -> Inputs:
    groups, width = d.size(4), d.size(14, least=8)  # of two values the gradient is what cancellation leaves
    total = groups * width
    skipped = d.size(total - 1) if total > 1 and d.chance() else 0
    n, spatial = d.size(3, least=0), d.sizes(d.size(2, least=0), 7)
    return {
        "x": d.tensor(n, total - skipped, *spatial),
        "num_groups": groups,
        "weight": d.flat(total, mean=1.0, deviation=0.3),
        "bias": d.flat(total),
        "eps": d.draw(st.sampled_from((1e-5, 1e-6))),
        "skip": d.tensor(n, skipped, *spatial) if skipped else None,
        "channel_add": d.flat(n, total, deviation=d.deviation) if d.chance() else None,
        "activation": "silu" if d.chance() else None,
    }


def guided_step(d: Draws) -> Inputs:
    shape, predictions = (d.size(3, least=0), *d.sizes(d.size(3), 6)), d.size(3)
    return {
        "sample": d.tensor(*shape),
        "predictions": d.tensor(predictions * shape[0], *shape[1:]),
        "weights": d.flat(predictions).float(),
        "coefficients": d.flat(6).float(),
        "previous": d.tensor(*shape) if d.chance() else None,
        "noise": d.tensor(*shape) if d.chance() else None,
        "return_denoised": d.chance(),
    }


def scale_and_filter(d: Draws) -> Inputs:
    """Scales that overflow no dtype: where float64 goes on, the contract has nothing to say."""
    return {
        "x": d.tensor(*d.sizes(d.size(4, least=0), 7)),
        "scale": torch.tensor(2.0 ** d.draw(st.sampled_from((-3.0, -0.5, 1.5)))),
        "dtype": d.draw(st.sampled_from((None, *DTYPES))),
    }


def unscale_and_filter(d: Draws) -> Inputs:
    inputs = scale_and_filter(d)
    shape = inputs["x"].shape
    return {**inputs, "add": d.draw(st.sampled_from((None, d.tensor(*shape), d.tensor(*shape).float())))}


def layer_norm_shape(d: Draws) -> tuple[int, ...]:
    """[B, ..., D] of eight features at least: of fewer, a row of nearly equal values decides over the errors."""
    return (d.size(3, least=0), *d.sizes(d.size(2, least=0), 7), d.size(70, least=8))


def ada_layer_norm(d: Draws) -> Inputs:
    shape = layer_norm_shape(d)
    return {
        "x": d.tensor(*shape),
        "scale": modulation(d, shape),
        "shift": modulation(d, shape),
        "eps": d.draw(st.sampled_from((1e-5, 1e-6))),
    }


def gated_residual_ada_layer_norm(d: Draws) -> Inputs:
    inputs = ada_layer_norm(d)
    shape = inputs["x"].shape
    return {**inputs, "y": d.tensor(*shape), "gate": modulation(d, shape) if d.chance() else None}


def modulation(d: Draws, shape: tuple[int, ...]) -> Tensor:
    """[B, D] or [B, 1, D]"""
    values = d.placed(d.flat(shape[0], shape[-1], deviation=0.3))
    return values.unsqueeze(1) if d.chance() else values


def residual_layer_norm(d: Draws) -> Inputs:
    shape = layer_norm_shape(d)
    return {
        "x": d.tensor(*shape),
        "y": d.tensor(*shape),
        "weight": d.flat(shape[-1], mean=1.0, deviation=0.3),
        "bias": d.flat(shape[-1]),
        "eps": d.draw(st.sampled_from((1e-5, 1e-6))),
    }


def rows(d: Draws, least: int = 1) -> tuple[int, ...]:
    """[..., D] of no element or of at least 96: a root mean square over fewer is luck."""
    features = d.size(130, least)
    if features >= 96 and d.chance():
        return (features,)
    count = d.draw(st.sampled_from((0, -(-96 // features), 97)))
    return (count, *d.sizes(d.size(2, least=0), 3), features)


def gate(d: Draws, gate_first: bool) -> Inputs:
    shape = rows(d)
    # only the gate of this example's magnitude: products of two such do not fit fp16
    halves = [d.flat(*shape), d.flat(*shape, mean=d.mean, deviation=d.deviation)]
    return {"h": d.placed(torch.cat(halves[::-1] if gate_first else halves, dim=-1), last_dense=d.chance())}


def geglu(d: Draws) -> Inputs:
    return gate(d, gate_first=False)


def geglu_linear(d: Draws) -> Inputs:
    """Rows and features enough that a root mean square is no luck, and only the gates of this example's magnitude."""
    shape, features, depth = (
        (d.draw(st.sampled_from((0, 1, 2))), d.size(20, least=12)),
        d.size(40, least=12),
        d.size(130),
    )
    weight, bias = d.flat(2 * features, depth, deviation=depth**-0.5), d.flat(2 * features)
    # the gradients' sums over rows fit fp16
    weight[features:] *= min(d.deviation, 100.0) if d.dtype is torch.float16 else d.deviation
    bias[features:] += d.mean
    return {
        "x": d.placed(d.flat(*shape, depth), last_dense=d.chance()),
        "weight": d.placed(weight, last_dense=d.chance()),
        "bias": bias if d.chance() else None,
    }


def swiglu(d: Draws) -> Inputs:
    return gate(d, gate_first=True)


def rms_norm(d: Draws) -> Inputs:
    shape = rows(d, least=12)  # of one value the gradient is what cancellation leaves; of few, weight's is luck
    weight = d.flat(shape[-1], mean=1.0, deviation=0.3)
    return {
        "x": d.tensor(*shape, last_dense=d.chance()),
        "weight": d.draw(st.sampled_from((weight, weight.float(), None))),
        "eps": d.draw(st.sampled_from((1e-5, 1e-6))),
    }


def qk_norm(d: Draws, head_dims: tuple[int, ...] = (7, 8, 10, 16, 64, 72), tokens: int = 1) -> Inputs:
    """Of heads of one element the gradient is what cancellation leaves."""
    batch, heads, head_dim = d.size(3, least=0), d.size(3), d.draw(st.sampled_from(head_dims))
    queries, keys = d.size(9, least=tokens), d.size(9, least=tokens)

    def rows(tokens: int) -> Tensor:
        return d.tensor(batch, tokens, heads, head_dim, last_dense=True)

    def weight() -> Tensor | None:
        return d.flat(head_dim, mean=1.0, deviation=0.3) if d.chance() else None

    inputs: Inputs = {"q": rows(queries), "k": rows(keys), "v": rows(keys), "q_weight": weight(), "k_weight": weight()}
    if d.chance():
        added_queries, added_keys = d.size(5, least=0), d.size(5)
        own = [rows(added_queries), weight()] if added_queries else [None, None]
        inputs["added"] = (own[0], rows(added_keys), rows(added_keys), own[1], weight())
    return inputs


def qk_norm_attention(d: Draws) -> Inputs:
    d.mean = 0.0  # a mean of all values cancels in the gradients of q and k
    # an error of a logit is one of a whole row, and a weight's gradient has an element for each of a head: of few of
    # these the root mean square is luck
    inputs = qk_norm(d, head_dims=(16, 25, 64, 72), tokens=4)
    added = inputs.get("added", (None,) * 5)
    batch, head_dim = inputs["q"].shape[0], inputs["q"].shape[3]
    keys = sum(k.shape[1] for k in (inputs["k"], added[1]) if k is not None)

    def largest(*streams: tuple[Tensor | None, Tensor | None]) -> float:
        """Rows are of this example's magnitude unless a weight says that they are normalised."""
        return max(1.0 if weight is not None else d.deviation for x, weight in streams if x is not None)

    q_size = largest((inputs["q"], inputs["q_weight"]), (added[0], added[3]))
    k_size = largest((inputs["k"], inputs["k_weight"]), (added[1], added[4]))
    bias = d.flat(batch, keys).float()
    masks = torch.where(bias > 0, d.draw(st.sampled_from((-1e4, float("-inf")))), 0.0)
    masks[:, d.size(keys) - 1] = 0.0  # never all keys of a sample
    return {
        **inputs,
        "scale": head_dim**-0.5 / (q_size * k_size),  # of a softmax that large logits decide, gradients are underflow
        # torch's attention of an empty batch has no gradient for a mask
        "key_bias": d.draw(st.sampled_from((None, bias, masks) if batch else (None,))),
    }


def repeated(make: Callable[[Draws], Inputs], draw: Callable[[Any], Any], dtype: torch.dtype) -> list[Inputs]:
    """REPEATS inputs of the same choices and of different values."""
    seed, choices = draw(st.integers(0, 2**31)), []

    def choose(strategy: Any) -> Any:
        choices.append(draw(strategy))
        return choices[-1]

    inputs = [make(Draws(choose, seed, dtype))]
    for k in range(1, REPEATS):
        same = iter(choices)
        inputs.append(make(Draws(lambda _, same=same: next(same), seed + k, dtype)))
    return inputs


# a function above of an op's name draws its inputs
INPUTS: dict[str, Callable[[Draws], Inputs]] = {name: globals()[name] for name in SPECS if name in globals()}


def run(function: Callable[..., Any], inputs: Inputs, gradients: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, the latter for seeded gradients of all results that bf16 holds exactly."""
    given_leaves = {n: map_tensors(inputs.get(n), lambda t: t.detach().requires_grad_()) for n in gradients}
    leaves = [leaf for value in given_leaves.values() for leaf in tensors(value)]
    found = function(**{**inputs, **given_leaves})
    results = [y for y in (found if isinstance(found, tuple) else [found]) if y is not None]
    if not leaves:
        return results, []
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in results]
    return [y.detach() for y in results], list(torch.autograd.grad(results, leaves, seeds))


def double(inputs: Inputs) -> Inputs:
    def one(value: Tensor) -> Tensor:
        return value.double().contiguous() if value.is_floating_point() else value

    return {name: map_tensors(value, one) for name, value in inputs.items()}


def test_every_op_has_properties() -> None:
    """But those that write in place."""
    assert {name for name, spec in SPECS.items() if not spec.mutated} == set(INPUTS)


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
@pytest.mark.parametrize("name", INPUTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_contract_holds(name: str, data: st.DataObject) -> None:
    broken = violations(name, data)
    assert not broken, broken[0]


def violations(name: str, data: st.DataObject) -> list[str]:
    """How one example, over all its repeats, breaks the contract."""
    spec, dtype = SPECS[name], data.draw(st.sampled_from(DTYPES))
    found = []  # of each repeat: ours, eager, truth
    for inputs in repeated(INPUTS[name], data.draw, dtype):
        given_inputs = cast(inputs, dtype)
        dense = {n: map_tensors(v, Tensor.contiguous) for n, v in given_inputs.items()}
        with use_backend("cpu"):
            ours = run(spec.function, given_inputs, spec.gradients)
        truth = run(spec.reference, double(given_inputs), spec.gradients)
        found.append((ours, run(spec.eager, dense, spec.gradients), truth))
    broken = []
    for gradient in (False, True):
        for i in range(len(found[0][0][gradient])):
            ours, eager, truth = (torch.stack([one[k][gradient][i] for one in found]) for k in range(3))
            violation = spec.tolerance.violation(ours, eager, truth, gradient=gradient)
            if violation is not None:
                broken.append(f"{'gradient' if gradient else 'result'} {i} in {dtype}: {violation}")
    return broken
