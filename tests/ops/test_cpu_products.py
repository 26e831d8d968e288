"""Our own products on the CPU: linear, GEGLU behind it, Winograd's convolution, attention; every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.models.attention import Attention
from kolors_fast.ops import _attention, _backends, _products, use_backend
from kolors_fast.ops._folded_attention import attend_folded
from kolors_fast.ops._spec import Tolerance

pytestmark = pytest.mark.skipif(
    isinstance(_backends.extension("cpu"), str), reason="the C++ extension is not built: no product of ours"
)

# rows, depth, width; tiles have 13 or 6 rows, panels 32 or 16 columns, vectors 16, 8 or 4
LINEAR = [(1, 1, 1), (5, 3, 2), (13, 7, 16), (14, 9, 33), (27, 64, 48), (131, 77, 100), (64, 1300, 8), (300, 4, 70)]
LINEAR += [(20, 2049, 17), (3, 5000, 40)]  # summed in parts
# batch, channels, out, height, width; patches are 2x2
MAPS = [(1, 1, 1, 1, 1), (1, 3, 5, 2, 1), (2, 16, 32, 5, 7), (3, 17, 33, 8, 9), (1, 40, 16, 1, 12), (2, 600, 7, 9, 8)]
# batch, queries, keys, heads, head_dim; a block has 512 keys, or fewer of large heads
ATTENTION = [(1, 1, 1, 1, 1), (2, 64, 64, 4, 64), (3, 7, 70, 3, 33), (1, 30, 1100, 2, 40), (2, 300, 33, 1, 8)]
ATTENTION += [(1, 14, 200, 1, 512)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def linear_case(rows: int, depth: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    # a chunk of a wider tensor, so that rows lie apart
    return torch.randn(rows, depth + 3)[:, 1 : depth + 1], torch.randn(width, depth), torch.randn(width)


def map_case(batch: int, channels: int, out: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(channels)
    x, w = torch.randn(batch, channels, height, width), torch.randn(out, channels, 3, 3)
    return channels_last(x), channels_last(w), torch.randn(out)


def error_of(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


def check_linear() -> None:
    for rows, depth, width in LINEAR:
        x, w, b = linear_case(rows, depth, width)
        for bias in (b, None):
            got = _products._packed_linear(x, w, bias)
            truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert got is not None and got.shape == truth.shape
            assert error_of(got, truth) < 2e-7 * math.sqrt(depth) + 2e-7, (rows, depth, width)
            got = _products._packed_linear(x, w, bias, gelu=True)
            assert got is not None
            assert error_of(got, F.gelu(truth, approximate="tanh")) < 3e-7 * math.sqrt(depth) + 3e-7, (
                rows,
                depth,
                width,
            )
        w, b = torch.cat([w, w.flip(0) * 0.3]), torch.cat([b, b.flip(0)])
        for bias in (b, None):
            got = _products._packed_linear(x, w, bias, gated=True)
            value, gate = F.linear(x.double(), w.double(), None if bias is None else bias.double()).chunk(2, dim=-1)
            truth = value * F.gelu(gate)
            assert got is not None and got.shape == truth.shape
            assert error_of(got, truth) < 4e-7 * math.sqrt(depth) + 4e-7, (rows, depth, width)


def check_winograd() -> None:
    for shape in MAPS:
        x, w, b = map_case(*shape)
        for bias in (b, None):
            got = _products._winograd(x, w, bias)
            truth = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), padding=1)
            assert got is not None and got.shape == truth.shape
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert error_of(got, truth) < 3e-7 * math.sqrt(shape[1]) + 3e-7, shape


def attention_case(
    batch: int, queries: int, keys: int, heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values are chunks of one projection; the bias masks some keys, the first 512 among them."""
    torch.manual_seed(keys)
    q = torch.randn(batch, queries, heads, head_dim)
    k, v = torch.randn(batch, keys, 2 * heads * head_dim).unflatten(2, (2 * heads, head_dim)).chunk(2, dim=2)
    bias = torch.randn(batch, keys)
    bias[:, : keys // 2] = -math.inf if keys > 1 else 0.0
    return q, k, v, bias


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = torch.einsum("blhd,bshd->bhls", q, k) * scale
    logits = logits if bias is None else logits + bias[:, None, None]
    return torch.einsum("bhls,bshd->blhd", logits.softmax(-1), v)


def check_attention() -> None:
    for shape in ATTENTION:
        q, k, v, bias = attention_case(*shape)
        for b in (bias, None):
            for sharp in (1.0, 30.0):  # logits up to 100: nearly one key alone counts
                scale = sharp * shape[-1] ** -0.5
                got = _attention._ours(q, k, v, b, scale)
                truth = plain_attention(q.double(), k.double(), v.double(), None if b is None else b.double(), scale)
                assert error_of(got, truth) < 4e-6 * sharp, (shape, b is None, sharp)


def check_folded_attention() -> None:
    """To few keys with projections; a head's keys are no whole vectors."""
    for dim, heads, tokens, keys in ((64, 4, 30, 5), (40, 2, 13, 17), (128, 2, 70, 22), (16, 1, 1, 16), (36, 3, 9, 1)):
        torch.manual_seed(keys)
        attention = Attention(dim, heads=heads, head_dim=dim // heads, context_dim=8).requires_grad_(False)
        x, context, bias = torch.randn(2, tokens, dim), 3 * torch.randn(2, keys, 8), torch.randn(2, keys)
        bias[:, : keys // 2] = -math.inf
        for b in (bias, None):
            got = attend_folded(x, attention.fold(attention.keys_values(context), b), heads, attention._out.bias)
            with use_backend("reference"):
                wide = attention.double()
                wide_bias = None if b is None else b.double()
                truth = wide(x.double(), wide.keys_values(context.double()), bias=wide_bias)
                attention.float()
            assert error_of(got, truth) < 3e-6, (dim, heads, tokens, keys)


def test_folded_keys_of_another_batch_are_refused() -> None:
    attention = Attention(64, heads=4, head_dim=16, context_dim=8).requires_grad_(False)
    to = attention.fold(attention.keys_values(torch.randn(2, 3, 8)), None)
    for wrong in ((3, 5, 64), (2, 5, 32)):
        with pytest.raises(RuntimeError, match="size"):
            attention(torch.randn(wrong), to)


def test_folded_keys_have_gradients() -> None:
    attention = Attention(64, heads=4, head_dim=16, context_dim=8).requires_grad_(False)
    context, x = torch.randn(2, 3, 8), torch.randn(2, 5, 64)
    attention.to_k.weight.requires_grad_()
    keys_values = attention.keys_values(context)
    grads = [
        torch.autograd.grad(attention(x, to).square().sum(), attention.to_k.weight, retain_graph=True)[0]
        for to in (attention.fold(keys_values, None), keys_values)
    ]
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_every_instruction_set_agrees_with_float64(on_every_instruction_set: Callable[[str], None]) -> None:
    on_every_instruction_set(__file__)


def test_agrees_with_float64() -> None:
    check_linear()
    check_winograd()
    check_attention()
    check_folded_attention()


@pytest.mark.parametrize("rows, depth, width", [(1, 64, 512), (2, 1280, 320), (32, 1280, 320), (5, 2560, 64)])
def test_deep_sums_keep_the_contract(rows: int, depth: int, width: int) -> None:
    """Against torch's own errors, as ops are held to it: a sum in one chain errs with the root of its length."""
    torch.manual_seed(depth)
    x, w, b = torch.randn(rows, depth), torch.randn(2 * width, depth) * depth**-0.5, torch.randn(2 * width)

    def gated(y: Tensor) -> Tensor:
        value, gate = y.chunk(2, dim=-1)
        return value * F.gelu(gate)

    forms: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
        ({}, Tensor.clone),
        ({"gelu": True}, partial(F.gelu, approximate="tanh")),
        ({"gated": True}, gated),
    ]
    for form, finish in forms:
        got = _products._packed_linear(x, w, b, **form)
        eager, truth = finish(F.linear(x, w, b)), finish(F.linear(x.double(), w.double(), b.double()))
        assert got is not None
        broken = Tolerance().violation(got, eager, truth)
        assert broken is None, f"{form}: {broken}"


def test_same_bits_for_any_number_of_threads_and_in_any_company(threads: None) -> None:
    x, w, b = linear_case(131, 77, 200)
    maps, kernel, bias = map_case(3, 17, 70, 9, 12)
    q, k, v, key_bias = attention_case(3, 70, 600, 1, 24)

    def run(rows: slice, samples: slice) -> tuple[Tensor, ...]:
        return (
            _products._packed_linear(x[rows], w, b),
            _products._packed_linear(x[rows], w, b, gated=True),
            _products._winograd(channels_last(maps[samples]), kernel, bias),
            _attention._ours(q[samples], k[samples], v[samples], key_bias[samples], 0.2),
        )  # type: ignore[return-value]  # there is room for the weights

    torch.set_num_threads(1)
    alone = run(slice(None), slice(None))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for got, want in zip(run(slice(None), slice(None)), alone, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(run(slice(17, 20), slice(1, 2)), alone, strict=True):
            assert torch.equal(got, want[17:20] if want.dim() == 2 else want[1:2])


def test_winograd_rounds_no_more_than_the_plain_sum_on_the_whole() -> None:
    """Its sums are a ninth as long: 1.04 times the error at 8 channels, 0.6 at 256 (the bar leaves room for a seed)."""
    for channels, bar in ((8, 1.3), (64, 1.0), (256, 0.8)):
        x, w, _ = map_case(2, channels, 32, 16, 16)
        truth = F.conv2d(x.double(), w.double(), padding=1)
        got = _products._winograd(x, w, None)
        assert got is not None
        plain = F.conv2d(x, w, padding=1)
        assert (got - truth).square().mean().sqrt() < bar * (plain - truth).square().mean().sqrt()


def test_a_nan_stays_where_it_is() -> None:
    x, w, b = linear_case(20, 9, 40)
    x = x.clone()
    x[3, 4] = math.nan
    for gated in (False, True):
        got = _products._packed_linear(x, w, b, gated=gated)
        assert got is not None
        assert got[3].isnan().all() and not got[[0, 1, 2, *range(4, 20)]].isnan().any()
    maps, kernel, bias = map_case(2, 16, 8, 12, 12)
    maps[1, 3, 6, 6] = math.inf
    got = _products._winograd(maps, kernel, bias)
    assert got is not None
    assert not got[1, :, 5:8, 5:8].isfinite().any()  # NaN or Inf in the plain sum too
    outside = got.clone()
    outside[1, :, 4:10, 4:10] = 0  # the patches whose windows see it
    assert outside.isfinite().all()


if __name__ == "__main__":
    check_linear()
    check_winograd()
    check_attention()
    check_folded_attention()
