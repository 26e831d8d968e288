"""The Triton kernels of qk_norm_attention, interpreted, against float64; and their configs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kolors_fast.kernels import qk_norm_attention as kernel
from kolors_fast.kernels.qk_norm_attention_backward import backward
from kolors_fast.kernels.qk_norm_attention_config import Tile, configure, few_keys_chunk, few_keys_tile, head_split
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6
NAMES = (
    "q", "k", "v", "q_weight", "k_weight", "added_q", "added_k", "added_v", "added_q_weight", "added_k_weight",
    "key_bias",
)  # fmt: skip


class Shape(NamedTuple):
    """B samples, H heads of D, L queries and S keys, L2 and S2 in the second stream."""

    B: int
    H: int
    D: int
    L: int
    S: int
    L2: int = 0
    S2: int = 0
    weights: str = ""  # of the four RMSNorms: "q", "k", "Q", "K", capitals for the second stream
    bias: bool = False
    fused: bool = False  # q, k, v are views of one projection
    scale: float = 1.0  # of q and k, before their RMSNorm


# tiles are 32 x 32 here: sizes below, at and above one, odd and prime
CASES = {
    "plain": Shape(2, 2, 64, 37, 71),
    "weights": Shape(1, 2, 64, 33, 64, weights="qk"),
    "two_streams": Shape(2, 1, 64, 41, 41, 7, 7, weights="qkQK", fused=True),
    "two_streams_one_normalised": Shape(1, 1, 64, 32, 35, 13, 40, weights="qK"),
    "queries_of_one_stream": Shape(1, 2, 64, 35, 35, 0, 33, weights="qkK"),
    "masked": Shape(2, 1, 64, 34, 45, 3, 5, bias=True, weights="qkQK"),
    "head_72": Shape(1, 2, 72, 33, 65, weights="qk", fused=True),
    "head_72_masked": Shape(2, 1, 72, 31, 70, bias=True),
    "head_128": Shape(1, 1, 128, 37, 35, 5, 3, weights="qkQK"),
    "head_40": Shape(1, 1, 40, 17, 19, weights="qk"),
    "huge_keys": Shape(1, 1, 64, 19, 37, weights="qk", scale=300.0),
    "tiny_keys": Shape(1, 1, 64, 19, 37, weights="qk", scale=3e-3),
    "5_keys": Shape(2, 2, 64, 67, 5),
    "77_keys": Shape(2, 2, 64, 67, 77, bias=True, weights="qk"),
    "77_keys_head_72": Shape(1, 1, 72, 40, 77, bias=True),
    "100_keys_head_128": Shape(1, 1, 128, 65, 100, weights="qk"),
    "129_keys": Shape(1, 2, 64, 67, 129, weights="qk"),
    "256_keys": Shape(2, 1, 64, 67, 256, bias=True),
    "256_keys_head_72": Shape(1, 1, 72, 33, 256, bias=True),
    "257_keys": Shape(1, 1, 64, 33, 257, bias=True),
    "one_query": Shape(1, 3, 64, 1, 2),
}


def make(shape: Shape, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The eleven tensors of forward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def stream(queries: int, keys: int) -> list[Tensor]:
        b, h, d, scale = shape.B, shape.H, shape.D, shape.scale
        if shape.fused:
            # the three lie side by side in each row, and the rows of a sample begin at an odd one
            projection = normal(b, queries + 1, 3, h, d) * torch.tensor([scale, scale, 1.0])[:, None, None]
            return list(projection.to(DEVICE, dtype)[:, 1:].unbind(2))
        sizes = ((queries, scale), (keys, scale), (keys, 1.0))
        return [(normal(b, n, h, d) * factor).to(DEVICE, dtype) for n, factor in sizes]

    def weight(name: str) -> Tensor | None:
        return (1 + 0.2 * normal(shape.D)).to(DEVICE, dtype) if name in shape.weights else None

    q, k, v = stream(shape.L, shape.S)
    added_q, added_k, added_v = stream(shape.L2, shape.S2) if shape.S2 else (None, None, None)
    bias = None
    if shape.bias:
        bias = normal(shape.B, shape.S + shape.S2)
        bias[0, :33] = float("-inf")  # more than a whole tile
        bias[-1, -2:] = float("-inf")
        bias = bias.to(DEVICE)
    return (
        q, k, v, weight("q"), weight("k"),
        added_q if shape.L2 else None, added_k, added_v, weight("Q"), weight("K"), bias,
    )  # fmt: skip


def attention(tensors: tuple[Any, ...], scale: float) -> Tensor:
    """Plain PyTorch, [B, L + L2, H, D]: in float64 the truth, in other dtypes what a PyTorch user gets."""
    q, k, v, q_weight, k_weight, added_q, added_k, added_v, added_q_weight, added_k_weight, bias = tensors

    def normalised(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)

    queries = [normalised(x, w) for x, w in ((q, q_weight), (added_q, added_q_weight)) if x is not None]
    keys = [normalised(x, w) for x, w in ((k, k_weight), (added_k, added_k_weight)) if x is not None]
    values = [x for x in (v, added_v) if x is not None]
    joint = [torch.cat(parts, 1).transpose(1, 2) for parts in (queries, keys, values)]
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    return F.scaled_dot_product_attention(*joint, attn_mask=mask, scale=scale).transpose(1, 2)


def double(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.cpu().double() for t in tensors)


def leaves_of(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_close_to_truth(what: str, ours: Tensor, eager: Tensor, truth: Tensor, floor: float) -> None:
    """As in test_ops: 1.5 times eager's rms error, three times its largest, and a floor for where eager is lucky."""
    assert ours.shape == truth.shape, what
    epsilon = torch.finfo(eager.dtype).eps
    error, eager_error = ours.cpu().double() - truth, eager.cpu().double() - truth
    assert not error.isnan().any(), what
    bound = 1.5 * rms(eager_error) + floor * epsilon * rms(truth)
    assert rms(error) <= bound, f"{what}: rms error {rms(error):.3g}, allowed {bound:.3g}"
    bound = 3 * eager_error.abs().max().item() + 2 * floor * epsilon * truth.abs().max().item()
    assert error.abs().max() <= bound, f"{what}: largest error {error.abs().max():.3g}, allowed {bound:.3g}"


def run(tensors: tuple[Tensor | None, ...], scale: float) -> tuple[Tensor, Tensor | None, Tensor]:
    return kernel.forward(*tensors, EPS, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_against_float64(name: str, dtype: torch.dtype) -> None:
    shape = CASES[name]
    scale = shape.D**-0.5 / (1 if "q" in shape.weights else shape.scale**2)
    tensors = make(shape, dtype)
    out, added_out, lse = run(tensors, scale)
    assert out.dtype == dtype and out.is_contiguous() and (added_out is None) == (shape.L2 == 0)

    exact, plain = leaves_of(double(tensors)), leaves_of(tensors)
    truth, eager = attention(exact, scale), attention(plain, scale)
    joint = out if added_out is None else torch.cat([out, added_out], 1)
    assert_close_to_truth("out", joint, eager, truth, 0.5)

    seed = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = [t for t in exact if t is not None]
    true_grads = iter(torch.autograd.grad(truth, given, seed.double()))
    eager_grads = iter(torch.autograd.grad(eager, [t for t in plain if t is not None], seed.to(DEVICE)))
    seeds = (seed[:, : shape.L].to(DEVICE), seed[:, shape.L :].to(DEVICE) if shape.L2 else None)
    ours = backward(*seeds, *tensors, EPS, scale, out, added_out, lse, [True] * len(NAMES))  # type: ignore[arg-type]
    for what, tensor, grad in zip(NAMES, tensors, ours, strict=True):
        assert (grad is None) == (tensor is None), what
        if tensor is not None and grad is not None:
            assert grad.dtype == (dtype if tensor.dim() == 4 else torch.float32) and grad.is_contiguous()
            # an eager gradient of fp32 key_bias went through a mask in dtype: so does the floor
            eager_grad = next(eager_grads).to(dtype)
            assert_close_to_truth(f"gradient of {what}", grad, eager_grad, next(true_grads), 1.5)


@pytest.mark.parametrize("name", ["two_streams", "masked", "77_keys"])
def test_lse_is_that_of_the_logits(name: str) -> None:
    shape = CASES[name]
    tensors = make(shape, torch.float32)
    scale = shape.D**-0.5
    _, _, lse = run(tensors, scale)
    exact = double(tensors)
    # with ones for v, and the softmax's denominator written out
    q, k, _, q_weight, k_weight, added_q, added_k, _, added_q_weight, added_k_weight, bias = exact

    def normalised(x: Tensor | None, weight: Tensor | None) -> list[Tensor]:
        if x is None:
            return []
        return [x if weight is None else F.rms_norm(x, x.shape[-1:], weight, EPS)]

    queries = torch.cat(normalised(q, q_weight) + normalised(added_q, added_q_weight), 1)
    keys = torch.cat(normalised(k, k_weight) + normalised(added_k, added_k_weight), 1)
    logits = torch.einsum("blhd,bshd->bhls", queries, keys) * scale
    truth = (logits if bias is None else logits + bias[:, None, None]).logsumexp(-1)
    torch.testing.assert_close(lse.cpu().double() * math.log(2), truth, rtol=1e-6, atol=1e-6)  # it is in base 2


@pytest.mark.parametrize("name", ["two_streams", "77_keys"])
def test_two_runs_give_the_same_bits_and_nothing_stays_unwritten(name: str) -> None:
    tensors = make(CASES[name], torch.float16)
    runs = []
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    try:
        for _ in range(2):
            out, added_out, lse = run(tensors, 0.125)
            grads = backward(out, added_out, *tensors, EPS, 0.125, out, added_out, lse, [True] * 11)  # type: ignore
            runs.append([t for t in (out, added_out, lse, *grads) if t is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second) and not first.isnan().any()


def test_only_needed_gradients_come_back() -> None:
    tensors = make(CASES["two_streams"], torch.float32)
    out, added_out, lse = run(tensors, 0.125)
    every = backward(out, added_out, *tensors, EPS, 0.125, out, added_out, lse, [True] * 11)  # type: ignore[arg-type]
    for wanted in (0, 4, 7):
        needs = [i == wanted for i in range(11)]
        grads = backward(out, added_out, *tensors, EPS, 0.125, out, added_out, lse, needs)  # type: ignore[arg-type]
        assert [g is not None for g in grads] == needs
        assert torch.equal(grads[wanted], every[wanted])  # type: ignore[arg-type]


def test_a_missing_gradient_counts_as_zeros() -> None:
    tensors = make(CASES["two_streams"], torch.float32)
    out, added_out, lse = run(tensors, 0.125)
    assert added_out is not None
    zeros = torch.zeros_like(out)
    for first, second in zip(
        backward(None, added_out, *tensors, EPS, 0.125, out, added_out, lse, [True] * 11),  # type: ignore[arg-type]
        backward(zeros, added_out, *tensors, EPS, 0.125, out, added_out, lse, [True] * 11),  # type: ignore[arg-type]
        strict=True,
    ):
        assert first is second is None or torch.equal(first, second)  # type: ignore[arg-type]


def test_wide_accesses_need_aligned_rows() -> None:
    x = torch.empty(2, 5, 3, 2, 64 + 8)
    assert kernel.vector_of([x[:, :, 0]]) == 4 and kernel.vector_of([x.half()[:, :, 0]]) == 8
    assert kernel.vector_of([x[:, :, 0], x[:, :, 0, :, 1:65]]) == 1
    assert kernel.vector_of([torch.empty(2, 5, 2 * 64 + 1)[..., :128].unflatten(-1, (2, 64))]) == 1
    # the stride of an axis of length 1 is never used
    assert kernel.vector_of([torch.empty(1, 5 * 128 + 1)[:, :640].view(1, 5, 2, 64)]) == 4


@pytest.mark.parametrize("shape", [Shape(0, 2, 64, 5, 5), Shape(2, 2, 64, 0, 5, weights="qk")], ids=str)
def test_nothing_to_do(shape: Shape) -> None:
    tensors = make(shape, torch.float32)
    out, added_out, lse = run(tensors, 0.125)
    assert out.shape == (shape.B, shape.L, 2, 64) and lse.shape == (shape.B, 2, shape.L)
    grads = backward(out, None, *tensors, EPS, 0.125, out, added_out, lse, [True] * 11)  # type: ignore[arg-type]
    for tensor, grad in zip(tensors, grads, strict=True):
        assert (grad is None) == (tensor is None)
        assert grad is None or (tensor is not None and grad.shape == tensor.shape and not grad.any())


# ---- configs

ARCHITECTURES = (80, 90, 100)
# bytes of shared memory that one program may have
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize(
    ("head_dim", "split"),
    [(40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))],
)
def test_a_head_is_covered_with_little_waste(head_dim: int, split: tuple[int, int]) -> None:
    assert head_split(head_dim) == split
    assert head_dim <= sum(split) < head_dim + 16


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_tiles_fit(head_dim: int, architecture: int, itemsize: int) -> None:
    config = configure(head_dim, itemsize, architecture)

    def resident(tile: Tile, rows: int, streamed: int) -> int:
        return (2 * rows + 2 * streamed * tile.num_stages) * (config.main + config.tail) * itemsize

    assert resident(config.forward, config.forward.queries, config.forward.keys) <= SHARED_MEMORY[architecture]
    assert resident(config.grad_keys, config.grad_keys.keys, config.grad_keys.queries) <= SHARED_MEMORY[architecture]
    tile = config.grad_queries
    assert resident(tile, tile.queries, tile.keys) <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
def test_few_keys_stay_on_chip(head_dim: int, architecture: int) -> None:
    most = 256 if head_dim <= 64 else 128
    for keys in range(1, most + 1):
        tile = few_keys_tile(head_dim, keys, 2, 8, architecture)
        assert tile is not None and keys <= tile.keys <= max(64, 2 * keys - 2)
        rows = 2 * tile.keys + tile.queries * (1 + tile.num_stages)  # K, V; q in flight, and a tile of results
        assert rows * sum(head_split(head_dim)) * 2 <= SHARED_MEMORY[architecture]
    for keys, itemsize, vector in ((most + 1, 2, 8), (257, 2, 8), (4096, 2, 8), (5, 4, 4), (65, 2, 1)):
        assert few_keys_tile(head_dim, keys, itemsize, vector, architecture) is None


def test_few_keys_programs_fill_the_gpu() -> None:
    for heads, blocks in ((20, 64), (40, 16), (1, 1), (80, 256)):
        chunk = few_keys_chunk(heads, blocks, 132)
        assert 1 <= chunk <= max(1, heads * blocks // 132 // 4)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        configure(64, 2, 90).main = 1  # type: ignore[misc]
