# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""Gradients of the joint attention with RMSNorm on queries and keys.

    P = exp2(log2(e) * (scale * qn @ kn^T + key_bias) - lse)          again, block by block
    delta = rowsum(grad_out * out)
    dS = P * (grad_out @ v^T - delta)
    grad_v = P^T @ grad_out;  grad_qn = scale * dS @ kn;  grad_kn = scale * dS^T @ qn
    grad_key_bias = sum of dS over heads and queries
    grad_q = rstd * (w * grad_qn - qhat * mean(w * grad_qn * qhat)),  qhat = q * rstd;  likewise grad_k
    grad_w = sum of grad_qn * qhat over all rows

Two kernels, each the only writer of what it writes: one holds a block of keys and walks over the queries, the other
holds a block of queries and walks over the keys (Dao, "FlashAttention-2", 2023). Both compute P and dS, which is the
price of a fixed order without atomics. RMSNorm's own backward pass (Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019) happens on the fp32 sums before they are rounded. Sums over programs (the weights) and over heads
(key_bias) are written as partial sums and added by torch, in fixed order.

Symbols as in qk_norm_attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import architecture, guard
from .qk_norm_attention import (
    LOG2_E,
    SIZES,
    aligned,
    dot,
    head_of,
    load_bias,
    load_rows,
    load_weights,
    normalise,
    normalised_or,
    rstd_of,
    store_rows,
    strides,
    vector_of,
)  # fmt: skip
from .qk_norm_attention_config import Config, configure

_SIZES = [*SIZES, "first", "all_rows"]
_SIZES += [f"{tensor}_{axis}" for tensor in ("raw", "added_raw") for axis in ("batch", "row", "head")]


@triton.jit(do_not_specialize=_SIZES)
def _delta_kernel(
    out_ptr, grad_out_ptr, delta_ptr, rows, heads, samples, first, all_rows,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """rowsum(out * grad_out) of [B, rows, H, D], into delta [B, H, all_rows] from `first` on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_R
    count = samples.to(tl.int64) * rows * heads
    index = tl.arange(0, BLOCK_R)
    out, out_tail = load_rows(out_ptr + at * HEAD, index, HEAD, count - at, HEAD, MAIN, TAIL, True)
    grad, grad_tail = load_rows(grad_out_ptr + at * HEAD, index, HEAD, count - at, HEAD, MAIN, TAIL, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(out_tail.to(tl.float32) * grad_tail.to(tl.float32), 1)
    index += at
    b, row, h = index // heads // rows, index // heads % rows, index % heads
    tl.store(delta_ptr + (b * heads + h) * all_rows + first + row, delta, mask=index < count)


@triton.jit
def _norm_backward(
    grad, grad_tail, x, x_tail, weight, weight_tail, inside, eps, HEAD: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """(grad_x, its tail, grad_weight, its tail) of x * rstd * weight, from fp32 tiles; only rows `inside` count."""
    rstd = tl.where(inside, rstd_of(x, x_tail, eps, HEAD, TAIL), 0.0)[:, None]
    grad = tl.where(inside[:, None], grad, 0.0)
    xhat = x * rstd
    weighted = grad * weight[None, :]
    mean = tl.sum(weighted * xhat, 1)
    grad_weight = tl.sum(grad * xhat, 0)
    grad_weight_tail = grad_weight
    if TAIL > 0:
        grad_tail = tl.where(inside[:, None], grad_tail, 0.0)
        xhat_tail = x_tail * rstd
        weighted_tail = grad_tail * weight_tail[None, :]
        mean += tl.sum(weighted_tail * xhat_tail, 1)
        grad_weight_tail = tl.sum(grad_tail * xhat_tail, 0)
    mean = mean[:, None] * (1.0 / HEAD)
    grad_x = rstd * (weighted - xhat * mean)
    grad_x_tail = grad_x
    if TAIL > 0:
        grad_x_tail = rstd * (weighted_tail - xhat_tail * mean)
    return grad_x, grad_x_tail, grad_weight, grad_weight_tail


@triton.jit
def _finish(
    grad, grad_tail, target, target_stride, raw_source, raw_stride, row, left,
    weight_ptr, added_weight_ptr, in_added, grad_weight_ptr, eps,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of rows of q or k, back through their RMSNorm, and this program's part of grad_weight."""
    if weight_ptr is not None or added_weight_ptr is not None:
        x, x_tail = load_rows(raw_source, row, raw_stride, left, HEAD, MAIN, TAIL, True)
        weight, weight_tail = load_weights(weight_ptr, added_weight_ptr, in_added, HEAD, MAIN, TAIL)
        grad_x, grad_x_tail, grad_weight, grad_weight_tail = _norm_backward(
            grad, grad_tail, x.to(tl.float32), x_tail.to(tl.float32), weight, weight_tail, row < left, eps, HEAD, TAIL
        )
        grad = normalised_or(grad, grad_x, weight_ptr, added_weight_ptr, in_added)
        grad_tail = normalised_or(grad_tail, grad_x_tail, weight_ptr, added_weight_ptr, in_added)
        part = grad_weight_ptr + tl.program_id(0).to(tl.int64) * HEAD
        column = tl.arange(0, MAIN)
        tl.store(part + column, grad_weight, mask=column < HEAD)
        if TAIL > 0:
            column = MAIN + tl.arange(0, TAIL)
            tl.store(part + column, grad_weight_tail, mask=column < HEAD)
    store_rows(target, row, target_stride, left, grad, grad_tail, HEAD, MAIN, TAIL)


@triton.jit
def _grad_keys_tile(
    k, k_tail, v, v_tail, bias, q_source, q_stride, grad_out_source, out_stride, lse_source, delta_source, begin, left,
    grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias, scale,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr,
    BIAS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from `begin` on, of `left` in their stream, give; all matrices are keys x queries."""
    row = tl.arange(0, BLOCK_Q)
    q, q_tail = load_rows(q_source + begin * q_stride, row, q_stride, left - begin, HEAD, MAIN, TAIL, EDGE)
    grad_out, grad_out_tail = load_rows(
        grad_out_source + begin * out_stride, row, out_stride, left - begin, HEAD, MAIN, TAIL, EDGE
    )  # fmt: skip
    if EDGE:
        # a query past the edge has weight exp(-inf) everywhere
        lse = tl.load(lse_source + begin + row, mask=row < left - begin, other=float("inf"))
        delta = tl.load(delta_source + begin + row, mask=row < left - begin, other=0.0)
    else:
        lse = tl.load(lse_source + begin + row)
        delta = tl.load(delta_source + begin + row)
    logits = dot(k, k_tail, tl.trans(q), tl.trans(q_tail), TAIL) * scale
    if BIAS:
        logits += bias[:, None]
    weights = tl.exp2(logits - lse[None, :])
    rounded = weights.to(q.dtype)
    grad_v = tl.dot(rounded, grad_out, grad_v, input_precision="ieee")
    if TAIL > 0:
        grad_v_tail = tl.dot(rounded, grad_out_tail, grad_v_tail, input_precision="ieee")
    grad_logits = weights * (dot(v, v_tail, tl.trans(grad_out), tl.trans(grad_out_tail), TAIL) - delta[None, :])
    if BIAS:
        grad_bias += tl.sum(grad_logits, 1)
    rounded = grad_logits.to(q.dtype)
    grad_k = tl.dot(rounded, q, grad_k, input_precision="ieee")
    if TAIL > 0:
        grad_k_tail = tl.dot(rounded, q_tail, grad_k_tail, input_precision="ieee")
    return grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias


@triton.jit(do_not_specialize=_SIZES)
def _grad_keys_kernel(
    q_ptr, k_ptr, v_ptr, added_q_ptr, added_k_ptr, added_v_ptr, raw_ptr, added_raw_ptr,
    weight_ptr, added_weight_ptr, bias_ptr, grad_out_ptr, added_grad_out_ptr, lse_ptr, delta_ptr,
    grad_k_ptr, grad_v_ptr, added_grad_k_ptr, added_grad_v_ptr, grad_weight_ptr, grad_bias_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    added_q_batch, added_q_row, added_q_head, added_k_batch, added_k_row, added_k_head,
    added_v_batch, added_v_row, added_v_head, raw_batch, raw_row, raw_head,
    added_raw_batch, added_raw_row, added_raw_head, heads, queries, added_queries, keys, added_keys, eps, scale,
    STREAMS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v and part of grad_bias of BLOCK_K keys of one head and one stream; raw is k before its RMSNorm."""
    own_blocks = tl.cdiv(keys, BLOCK_K)
    blocks = own_blocks + tl.cdiv(added_keys, BLOCK_K)
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    in_added = block >= own_blocks
    begin = (block - tl.where(in_added, own_blocks, 0)) * BLOCK_K
    count = tl.where(in_added, added_keys, keys)

    key = tl.arange(0, BLOCK_K)
    k_source = tl.where(
        in_added, head_of(added_k_ptr, b, h, added_k_batch, added_k_head, VECTOR),
        head_of(k_ptr, b, h, k_batch, k_head, VECTOR),
    )  # fmt: skip
    v_source = tl.where(
        in_added, head_of(added_v_ptr, b, h, added_v_batch, added_v_head, VECTOR),
        head_of(v_ptr, b, h, v_batch, v_head, VECTOR),
    )  # fmt: skip
    k_stride = aligned(tl.where(in_added, added_k_row, k_row), VECTOR)
    v_stride = aligned(tl.where(in_added, added_v_row, v_row), VECTOR)
    k, k_tail = load_rows(k_source + begin * k_stride, key, k_stride, count - begin, HEAD, MAIN, TAIL, True)
    v, v_tail = load_rows(v_source + begin * v_stride, key, v_stride, count - begin, HEAD, MAIN, TAIL, True)
    bias_at = b * (keys + added_keys) + tl.where(in_added, keys, 0)
    bias = load_bias(bias_ptr, bias_at, begin + key, count, BLOCK_K)

    grad_k = tl.zeros([BLOCK_K, MAIN], tl.float32)
    grad_v = tl.zeros([BLOCK_K, MAIN], tl.float32)
    grad_k_tail = grad_k
    grad_v_tail = grad_v
    if TAIL > 0:
        grad_k_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)
        grad_v_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)
    grad_bias = tl.zeros([BLOCK_K], tl.float32)
    out_stride = heads.to(tl.int64) * HEAD
    for stream in tl.static_range(STREAMS):
        second = stream > 0
        left = tl.where(second, added_queries, queries)
        q_source = tl.where(
            second, head_of(added_q_ptr, b, h, added_q_batch, added_q_head, VECTOR),
            head_of(q_ptr, b, h, q_batch, q_head, VECTOR),
        )  # fmt: skip
        q_stride = aligned(tl.where(second, added_q_row, q_row), VECTOR)
        grad_out_source = tl.where(second, added_grad_out_ptr, grad_out_ptr) + b * left * out_stride + h * HEAD
        lse_at = (b * heads + h) * (queries + added_queries) + tl.where(second, queries, 0)
        whole = left // BLOCK_Q * BLOCK_Q
        for first in tl.range(0, whole, BLOCK_Q):
            grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias = _grad_keys_tile(
                k, k_tail, v, v_tail, bias, q_source, q_stride, grad_out_source, out_stride,
                lse_ptr + lse_at, delta_ptr + lse_at, first, left,
                grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias, scale * LOG2_E,
                HEAD, MAIN, TAIL, BLOCK_Q, bias_ptr is not None, False,
            )  # fmt: skip
        for first in tl.range(whole, left, BLOCK_Q, num_stages=1):
            grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias = _grad_keys_tile(
                k, k_tail, v, v_tail, bias, q_source, q_stride, grad_out_source, out_stride,
                lse_ptr + lse_at, delta_ptr + lse_at, first, left,
                grad_k, grad_k_tail, grad_v, grad_v_tail, grad_bias, scale * LOG2_E,
                HEAD, MAIN, TAIL, BLOCK_Q, bias_ptr is not None, True,
            )  # fmt: skip

    place = b * count * out_stride + begin * out_stride + h * HEAD
    store_rows(
        tl.where(in_added, added_grad_v_ptr, grad_v_ptr) + place, key, out_stride, count - begin, grad_v, grad_v_tail,
        HEAD, MAIN, TAIL,
    )  # fmt: skip
    if grad_bias_ptr is not None:
        at = (b * heads + h) * (keys + added_keys) + tl.where(in_added, keys, 0) + begin
        tl.store(grad_bias_ptr + at + key, grad_bias, mask=key < count - begin)
    raw_source = tl.where(
        in_added, head_of(added_raw_ptr, b, h, added_raw_batch, added_raw_head, VECTOR),
        head_of(raw_ptr, b, h, raw_batch, raw_head, VECTOR),
    )  # fmt: skip
    raw_stride = aligned(tl.where(in_added, added_raw_row, raw_row), VECTOR)
    _finish(
        grad_k * scale, grad_k_tail * scale, tl.where(in_added, added_grad_k_ptr, grad_k_ptr) + place, out_stride,
        raw_source + begin * raw_stride, raw_stride, key, count - begin,
        weight_ptr, added_weight_ptr, in_added, grad_weight_ptr, eps, HEAD, MAIN, TAIL,
    )  # fmt: skip


@triton.jit
def _grad_queries_tile(
    q, q_tail, grad_out, grad_out_tail, lse, delta, k_source, k_stride, v_source, v_stride, bias_ptr, bias_at,
    begin, left, grad_q, grad_q_tail, total, scale, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `begin` on, of `left` in their stream, give; all matrices are queries x keys."""
    key = tl.arange(0, BLOCK_K)
    k, k_tail = load_rows(k_source + begin * k_stride, key, k_stride, left - begin, HEAD, MAIN, TAIL, EDGE)
    v, v_tail = load_rows(v_source + begin * v_stride, key, v_stride, left - begin, HEAD, MAIN, TAIL, EDGE)
    logits = dot(q, q_tail, tl.trans(k), tl.trans(k_tail), TAIL) * scale
    if bias_ptr is not None:
        logits += load_bias(bias_ptr, bias_at, begin + key, left, BLOCK_K)[None, :]
    elif EDGE:
        logits = tl.where((key < left - begin)[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - lse[:, None])
    grad_weights = dot(grad_out, grad_out_tail, tl.trans(v), tl.trans(v_tail), TAIL)
    if EXACT:
        total += tl.sum(weights * grad_weights, 1)
    grad_logits = weights * (grad_weights - delta[:, None])
    rounded = grad_logits.to(k.dtype)
    grad_q = tl.dot(rounded, k, grad_q, input_precision="ieee")
    if TAIL > 0:
        grad_q_tail = tl.dot(rounded, k_tail, grad_q_tail, input_precision="ieee")
    return grad_q, grad_q_tail, total


@triton.jit(do_not_specialize=_SIZES)
def _grad_queries_kernel(
    q_ptr, k_ptr, v_ptr, added_q_ptr, added_k_ptr, added_v_ptr, raw_ptr, added_raw_ptr,
    weight_ptr, added_weight_ptr, bias_ptr, grad_out_ptr, added_grad_out_ptr, lse_ptr, delta_ptr,
    grad_q_ptr, added_grad_q_ptr, grad_weight_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    added_q_batch, added_q_row, added_q_head, added_k_batch, added_k_row, added_k_head,
    added_v_batch, added_v_row, added_v_head, raw_batch, raw_row, raw_head,
    added_raw_batch, added_raw_row, added_raw_head, heads, queries, added_queries, keys, added_keys, eps, scale,
    STREAMS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """grad_q of BLOCK_Q queries of one head and one stream; raw is q before its RMSNorm.

    EXACT: leaves rowsum(P * dP) in delta, which is rowsum(grad_out * out) without the rounding of out. The gradient of
    key_bias sums over all heads and queries what that rounding would add.
    """
    own_blocks = tl.cdiv(queries, BLOCK_Q)
    blocks = own_blocks + tl.cdiv(added_queries, BLOCK_Q)
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    in_added = block >= own_blocks
    begin = (block - tl.where(in_added, own_blocks, 0)) * BLOCK_Q
    count = tl.where(in_added, added_queries, queries)

    row = tl.arange(0, BLOCK_Q)
    q_source = tl.where(
        in_added, head_of(added_q_ptr, b, h, added_q_batch, added_q_head, VECTOR),
        head_of(q_ptr, b, h, q_batch, q_head, VECTOR),
    )  # fmt: skip
    q_stride = aligned(tl.where(in_added, added_q_row, q_row), VECTOR)
    q, q_tail = load_rows(q_source + begin * q_stride, row, q_stride, count - begin, HEAD, MAIN, TAIL, True)
    out_stride = heads.to(tl.int64) * HEAD
    place = b * count * out_stride + begin * out_stride + h * HEAD
    grad_out, grad_out_tail = load_rows(
        tl.where(in_added, added_grad_out_ptr, grad_out_ptr) + place, row, out_stride, count - begin,
        HEAD, MAIN, TAIL, True,
    )  # fmt: skip
    lse_at = (b * heads + h) * (queries + added_queries) + tl.where(in_added, queries, 0) + begin
    lse = tl.load(lse_ptr + lse_at + row, mask=row < count - begin, other=float("inf"))
    delta = tl.load(delta_ptr + lse_at + row, mask=row < count - begin, other=0.0)

    grad_q = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    grad_q_tail = grad_q
    total = tl.zeros([BLOCK_Q], tl.float32)
    if TAIL > 0:
        grad_q_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)
    for stream in tl.static_range(STREAMS):
        second = stream > 0
        k_source = tl.where(
            second, head_of(added_k_ptr, b, h, added_k_batch, added_k_head, VECTOR),
            head_of(k_ptr, b, h, k_batch, k_head, VECTOR),
        )  # fmt: skip
        v_source = tl.where(
            second, head_of(added_v_ptr, b, h, added_v_batch, added_v_head, VECTOR),
            head_of(v_ptr, b, h, v_batch, v_head, VECTOR),
        )  # fmt: skip
        k_stride = aligned(tl.where(second, added_k_row, k_row), VECTOR)
        v_stride = aligned(tl.where(second, added_v_row, v_row), VECTOR)
        left = tl.where(second, added_keys, keys)
        bias_at = b * (keys + added_keys) + tl.where(second, keys, 0)
        whole = left // BLOCK_K * BLOCK_K
        for first in tl.range(0, whole, BLOCK_K):
            grad_q, grad_q_tail, total = _grad_queries_tile(
                q, q_tail, grad_out, grad_out_tail, lse, delta, k_source, k_stride, v_source, v_stride,
                bias_ptr, bias_at, first, left, grad_q, grad_q_tail, total, scale * LOG2_E,
                HEAD, MAIN, TAIL, BLOCK_K, EXACT, False,
            )  # fmt: skip
        for first in tl.range(whole, left, BLOCK_K, num_stages=1):
            grad_q, grad_q_tail, total = _grad_queries_tile(
                q, q_tail, grad_out, grad_out_tail, lse, delta, k_source, k_stride, v_source, v_stride,
                bias_ptr, bias_at, first, left, grad_q, grad_q_tail, total, scale * LOG2_E,
                HEAD, MAIN, TAIL, BLOCK_K, EXACT, True,
            )  # fmt: skip

    raw_source = tl.where(
        in_added, head_of(added_raw_ptr, b, h, added_raw_batch, added_raw_head, VECTOR),
        head_of(raw_ptr, b, h, raw_batch, raw_head, VECTOR),
    )  # fmt: skip
    raw_stride = aligned(tl.where(in_added, added_raw_row, raw_row), VECTOR)
    if EXACT:
        tl.store(delta_ptr + lse_at + row, total, mask=row < count - begin)
    _finish(
        grad_q * scale, grad_q_tail * scale, tl.where(in_added, added_grad_q_ptr, grad_q_ptr) + place, out_stride,
        raw_source + begin * raw_stride, raw_stride, row, count - begin,
        weight_ptr, added_weight_ptr, in_added, grad_weight_ptr, eps, HEAD, MAIN, TAIL,
    )  # fmt: skip


def _delta(out: Tensor, grad_out: Tensor, delta: Tensor, first: int, config: Config) -> None:
    """Fills delta [B, H, L + L2] from row `first` on."""
    samples, rows, heads, head_dim = out.shape
    if out.numel():
        _delta_kernel[(triton.cdiv(samples * rows * heads, config.block_r),)](
            out, grad_out, delta, rows, heads, samples, first, delta.shape[-1],
            HEAD=head_dim, MAIN=config.main, TAIL=config.tail, BLOCK_R=config.block_r, num_warps=4,
        )  # fmt: skip


def backward(
    grad_out: Tensor | None,  # [B, L, H, D]; None: zeros
    grad_added_out: Tensor | None,  # [B, L2, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    added_q: Tensor | None,
    added_k: Tensor | None,
    added_v: Tensor | None,
    added_q_weight: Tensor | None,
    added_k_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
    scale: float,
    out: Tensor,
    added_out: Tensor | None,
    lse: Tensor,  # fp32 [B, H, L + L2], in base 2
    needs: Sequence[bool],  # of the eleven tensors from q to key_bias
) -> tuple[Tensor | None, ...]:
    """Gradients of forward's eleven tensors in their order: of q, k, v in their dtype and contiguous, of weights
    fp32 [D], of key_bias fp32 [B, S + S2]; None where one is not needed or its input absent."""
    tensors = (
        q, k, v, q_weight, k_weight, added_q, added_k, added_v, added_q_weight, added_k_weight, key_bias
    )  # fmt: skip
    wanted = [need and tensor is not None for need, tensor in zip(needs, tensors, strict=True)]
    samples, queries, heads, head_dim = q.shape
    keys, added_keys = k.shape[1], 0 if added_k is None else added_k.shape[1]
    added_queries = 0 if added_q is None else added_q.shape[1]
    if not any(wanted):
        return (None,) * len(tensors)
    if lse.numel() == 0:
        return tuple(
            torch.zeros(t.shape, dtype=t.dtype if t.dim() == 4 else torch.float32, device=t.device)
            if t is not None and want else None
            for t, want in zip(tensors, wanted, strict=True)
        )  # fmt: skip

    config = configure(head_dim, q.element_size(), architecture(q.device))
    # a stream that is not there lends its name to the first: its rows are never reached
    q2, q2_weight = (q, q_weight) if added_q is None else (added_q, added_q_weight)
    k2, k2_weight, v2 = (k, k_weight, v)
    if added_k is not None and added_v is not None:
        k2, k2_weight, v2 = added_k, added_k_weight, added_v
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_out2 = grad_out
    if added_out is not None:
        grad_out2 = torch.zeros_like(added_out) if grad_added_out is None else grad_added_out.contiguous()
    grads: list[Tensor | None] = [None] * len(tensors)
    with guard(q):
        delta = torch.empty_like(lse)
        _delta(out, grad_out, delta, 0, config)
        if added_out is not None:
            _delta(added_out, grad_out2, delta, queries, config)

        qn, kn = normalise(q, q_weight, eps, config), normalise(k, k_weight, eps, config)
        qn2 = qn if added_q is None else normalise(q2, q2_weight, eps, config)
        kn2 = kn if added_k is None else normalise(k2, k2_weight, eps, config)
        inputs = (qn, kn, v, qn2, kn2, v2)
        sizes = (heads, queries, added_queries, keys, added_keys, eps, scale)
        shape = {
            "HEAD": head_dim, "MAIN": config.main, "TAIL": config.tail, "VECTOR": vector_of([*inputs, q, q2, k, k2])
        }  # fmt: skip

        if any(wanted[i] for i in (0, 3, 5, 8, 10)):  # key_bias takes its delta from here
            tile = config.grad_queries
            own, added = triton.cdiv(queries, tile.queries), triton.cdiv(added_queries, tile.queries)
            grad_q = q.new_empty(*q.shape)
            grad_q2 = grad_q if added_q is None else q.new_empty(*q2.shape)
            weighted = q_weight is not None or q2_weight is not None
            weight_parts = lse.new_empty(samples * heads, own + added, head_dim) if weighted else None
            _grad_queries_kernel[((own + added) * heads * samples,)](
                *inputs, q, q2, q_weight, q2_weight, key_bias, grad_out, grad_out2, lse, delta,
                grad_q, grad_q2, weight_parts,
                *(stride for x in (*inputs, q, q2) for stride in strides(x)), *sizes,
                STREAMS=1 if added_k is None else 2, BLOCK_Q=tile.queries, BLOCK_K=tile.keys, **shape,
                EXACT=wanted[10], num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            grads[0], grads[5] = grad_q, grad_q2
            if weight_parts is not None:
                grads[3], grads[8] = weight_parts[:, :own].sum((0, 1)), weight_parts[:, own:].sum((0, 1))

        if any(wanted[i] for i in (1, 2, 4, 6, 7, 9, 10)):
            tile = config.grad_keys
            own, added = triton.cdiv(keys, tile.keys), triton.cdiv(added_keys, tile.keys)
            grad_k, grad_v = q.new_empty(*k.shape), q.new_empty(*v.shape)
            grad_k2, grad_v2 = (grad_k, grad_v) if added_k is None else (q.new_empty(*k2.shape), q.new_empty(*k2.shape))
            weighted = k_weight is not None or k2_weight is not None
            weight_parts = lse.new_empty(samples * heads, own + added, head_dim) if weighted else None
            bias_parts = lse.new_empty(samples, heads, keys + added_keys) if wanted[10] else None
            _grad_keys_kernel[((own + added) * heads * samples,)](
                *inputs, k, k2, k_weight, k2_weight, key_bias, grad_out, grad_out2, lse, delta,
                grad_k, grad_v, grad_k2, grad_v2, weight_parts, bias_parts,
                *(stride for x in (*inputs, k, k2) for stride in strides(x)), *sizes,
                STREAMS=1 if added_q is None else 2, BLOCK_Q=tile.queries, BLOCK_K=tile.keys, **shape,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            grads[1], grads[2], grads[6], grads[7] = grad_k, grad_v, grad_k2, grad_v2
            if weight_parts is not None:
                grads[4], grads[9] = weight_parts[:, :own].sum((0, 1)), weight_parts[:, own:].sum((0, 1))
            if bias_parts is not None:
                grads[10] = bias_parts.sum(1)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
