"""RMSNorm of queries and keys per head, packed with a second stream: what an attention reads, in one pass.

A tensor is written only if something happens to it: it is normalised, or joined with the second stream. What is not
written passes through, without a copy.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _library, _streams
from ._arguments import refused_by_kind
from ._operator import Operator
from ._qk_norm_cases import CASES
from ._spec import Inputs, OpSpec
from ._streams import AddedStream

CUDA_HEAD_DIM = 256  # kQkNormHeadDim of csrc/cuda/qk_norm.cuh

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None]  # joint q, k, v; None: not written


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads.

    k and v are None where they pass through; q is always there, and names device and dtype.
    """

    q: Tensor  # [B, L, H, D]
    k: Tensor | None  # [B, S, H, D]
    v: Tensor | None  # [B, S, H, D]
    q_weight: Tensor | None  # [D]
    k_weight: Tensor | None  # [D]
    added_q: Tensor | None  # [B, L2, H, D]
    added_k: Tensor | None  # [B, S2, H, D]
    added_v: Tensor | None  # [B, S2, H, D]
    added_q_weight: Tensor | None  # [D]
    added_k_weight: Tensor | None  # [D]
    eps: float


class Part(NamedTuple):
    """One tensor on its way to an output."""

    x: Tensor  # [B, tokens, H, D]
    weight: Tensor | None  # [D]; None: copied
    output: int  # 0 q, 1 k, 2 v
    start: int  # its first token there
    field: int  # of Call
    weight_field: int


def qk_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: AddedStream | tuple[Any, ...] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x * rsqrt(mean(x^2) + eps) * weight for each head's row of q and k, joined with the added stream's.

    The mean of squares is fp32, over the D elements of a row; one rounding, at the store. A stream without a weight is
    not normalised, v never is. Differentiable once in all tensors.

    Args:
        q: [B, L, H, D], float32, float16, bfloat16 (float64: reference only): a projection's output viewed by heads.
            Any strides with the last axis contiguous are read in place, so q, k, v may be views of a fused projection.
        k, v: [B, S, H, D].
        q_weight, k_weight: [D], in q's dtype or float32, all weights alike.
        added: the second stream, an `AddedStream` or a tuple of the same.
        eps: added to the mean of squares, not negative.

    Returns:
        q [B, L + L2, H, D], k and v [B, S + S2, H, D] in q's dtype: the first stream's tokens, then the added stream's.
        A tensor that is neither normalised nor joined is returned as it came; others are contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; normalised queries and keys:
    Henry et al., arXiv 2010.04245; two streams of one attention: Esser et al., arXiv 2403.03206.
    """
    return pack(*_checked(q, k, v, q_weight=q_weight, k_weight=k_weight, added=added, eps=eps))


def pack(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    added_q: Tensor | None, added_k: Tensor | None, added_v: Tensor | None,
    added_q_weight: Tensor | None, added_k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`qk_norm` of checked arguments."""
    call = _call(
        q, k, v, q_weight, k_weight, added_q, added_k, added_v, added_q_weight, added_k_weight, eps
    )  # fmt: skip
    writes_q = q_weight is not None or added_q is not None
    if not writes_q and call.k is None:
        return q, k, v
    joint_q, joint_k, joint_v = _operator(call)
    return joint_q if writes_q else q, k if call.k is None else joint_k, v if call.v is None else joint_v


def _call(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    added_q: Tensor | None, added_k: Tensor | None, added_v: Tensor | None,
    added_q_weight: Tensor | None, added_k_weight: Tensor | None, eps: float,
) -> Call:  # fmt: skip
    """Leave out what passes through."""
    if q_weight is None and added_q is None:
        q = q.detach()  # it is there for its dtype; its gradient does not come through the op
    return Call(
        q, None if k_weight is None and added_k is None else k, None if added_v is None else v, q_weight, k_weight,
        added_q, added_k, added_v, added_q_weight, added_k_weight, float(eps),
    )  # fmt: skip


@refused_by_kind("qk_norm")
def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: AddedStream | tuple[Any, ...] | None = None,
    eps: float = 1e-6,
) -> tuple[Any, ...]:
    """Check the public arguments: what `pack` and `_call` take."""
    second = None if added is None else AddedStream(*added)
    _streams.check("qk_norm", q, k, v, q_weight, k_weight, second, eps)
    return q, k, v, q_weight, k_weight, *_streams.fields(second), eps


def _prepare(*args: Any, **options: Any) -> Call:
    return _call(*_checked(*args, **options))


_ROLES = ((0, 3, 5, 8), (1, 4, 6, 9), (2, -1, 7, -1))  # of q, k, v: fields of x, its weight, the added x, its weight


def _parts(call: Call) -> list[Part]:
    """What is written, and where."""
    fields: Any = call
    parts = []
    for output, (own, own_weight, added, added_weight) in enumerate(_ROLES):
        if fields[own] is None or (output == 0 and call.q_weight is None and call.added_q is None):
            continue
        for field, weight, start in ((own, own_weight, 0), (added, added_weight, fields[own].shape[1])):
            if fields[field] is not None:
                parts.append(Part(fields[field], None if weight < 0 else fields[weight], output, start, field, weight))
    return parts


# ---- reference column


def reference(q: Tensor, k: Tensor, v: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    joint_q, joint_k, joint_v = _reference_forward(_prepare(q, k, v, **options))
    return q if joint_q is None else joint_q, k if joint_k is None else joint_k, v if joint_v is None else joint_v


def _reference_forward(call: Call) -> Outputs:
    streams: list[list[Tensor]] = [[], [], []]
    for part in _parts(call):
        streams[part.output].append(normalised(part.x, part.weight, call.eps))
    q, k, v = (torch.cat(stream, dim=1) if stream else None for stream in streams)
    return q, k, v


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)).to(x.dtype)


def _reference_backward(call: Call, grads: Outputs, saved: tuple[()], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """With x_hat = x*rstd: grad_x = rstd * (g*w - x_hat * mean(g*w*x_hat)), grad_weight = sum of g*x_hat."""
    found: list[Tensor | None] = [None] * len(needs)
    for part, grad in _with_gradient(call, grads, needs, found):
        if part.weight is None:
            found[part.field] = torch.empty_like(part.x).copy_(grad)
            continue
        h = part.x.to(torch.promote_types(part.x.dtype, torch.float32))
        g = grad.to(h.dtype)
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + call.eps)
        x_hat, gw = h * rstd, g * part.weight.to(h.dtype)
        found[part.field] = (rstd * (gw - x_hat * (gw * x_hat).mean(-1, keepdim=True))).to(part.x.dtype)
        found[part.weight_field] = (g * x_hat).sum((0, 1, 2))
    return tuple(found)


def _with_gradient(
    call: Call, grads: Outputs, needs: list[bool], found: list[Tensor | None]
) -> list[tuple[Part, Tensor]]:
    """Parts whose gradient is wanted, each with its slice of the output's gradient; no gradient is one of zeros."""
    wanted = []
    for part in _parts(call):
        if not needs[part.field] and not (part.weight is not None and needs[part.weight_field]):
            continue
        grad = grads[part.output]
        if grad is None:
            found[part.field] = torch.zeros_like(part.x)
            if part.weight is not None:
                found[part.weight_field] = torch.zeros_like(part.weight)
        else:
            wanted.append((part, grad[:, part.start : part.start + part.x.shape[1]]))
    return wanted


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: tuple[Any, ...] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """RMSNorm as model code writes it, then a concat per tensor."""

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        rstd = torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
        return (x * rstd).to(x.dtype) * weight.to(x.dtype)

    q, k = norm(q, q_weight), norm(k, k_weight)
    if added is None:
        return q, k, v
    stream = AddedStream(*added)
    if stream.q is not None:
        q = torch.cat([q, norm(stream.q, stream.q_weight)], dim=1)
    k = torch.cat([k, norm(stream.k, stream.k_weight)], dim=1)
    return q, k, v if v is None or stream.v is None else torch.cat([v, stream.v], dim=1)


# ---- extension columns (C++ and CUDA C++ export the same functions)


def _extension_forward(name: str, call: Call) -> Outputs:
    module: Any = _backends.extension(name)
    parts, words, weight_dtype = _parts(call), array("q"), torch.float32
    outputs = _outputs(call, parts)
    for x, weight, output, start, *_ in parts:
        y: Any = outputs[output]
        words.extend((x.data_ptr(), *x.stride()[:3]))
        words.extend((y.data_ptr() + start * y.stride(1) * y.element_size(), *y.stride()[:3]))
        words.extend((0, 0, 0, 0, _library.pointer(weight), 0, x.shape[1]))
        weight_dtype = weight_dtype if weight is None else weight.dtype
    q = call.q
    with guard(q):
        module.qk_norm_forward(
            words.buffer_info()[0], len(parts), q.shape[0], q.shape[2], q.shape[3], call.eps,
            _library.DTYPE_CODE[q.dtype], _library.DTYPE_CODE[weight_dtype], _library.stream(q),
        )  # fmt: skip
    return outputs


def _extension_backward(
    name: str, call: Call, grads: Outputs, saved: tuple[()], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    module: Any = _backends.extension(name)
    found: list[Tensor | None] = [None] * len(needs)
    q, words, kept, weight_dtype = call.q, array("q"), [], torch.float32
    for part, grad in _with_gradient(call, grads, needs, found):
        x, weight = part.x, part.weight
        kept.append(grad := _streams.rows_in_place(grad))  # until the kernel has read it
        grad_x = torch.empty_like(x) if needs[part.field] else None
        grad_weight = None
        if weight is not None:
            weight_dtype = weight.dtype
            grad_weight = q.new_empty(q.shape[3], dtype=torch.float32) if needs[part.weight_field] else None
            found[part.weight_field] = grad_weight
        found[part.field] = grad_x
        words.extend((x.data_ptr(), *x.stride()[:3]))
        words.extend((0, 0, 0, 0) if grad_x is None else (grad_x.data_ptr(), *grad_x.stride()[:3]))
        words.extend((grad.data_ptr(), *grad.stride()[:3]))
        words.extend((_library.pointer(weight), _library.pointer(grad_weight), x.shape[1]))
    p, sizes = _library.pointer, (len(kept), q.shape[0], q.shape[2], q.shape[3])
    with guard(q):
        size = module.qk_norm_workspace(q.shape[3])
        scratch = q.new_empty(size, dtype=torch.uint8) if size else None
        module.qk_norm_backward(
            words.buffer_info()[0], p(scratch), *sizes, call.eps,
            _library.DTYPE_CODE[q.dtype], _library.DTYPE_CODE[weight_dtype], _library.stream(q),
        )  # fmt: skip
    return tuple(found)


# ---- Triton column


def _triton_forward(call: Call) -> Outputs:
    from kolors_fast.kernels import qk_norm as kernel  # triton is imported at first use

    parts = _parts(call)
    outputs = _outputs(call, parts)
    for x, weight, output, start, *_ in parts:
        joint: Any = outputs[output]
        y = joint[:, start : start + x.shape[1]]
        if weight is None:
            y.copy_(x)
        else:
            kernel.forward(x, weight, y, call.eps)
    return outputs


def _triton_backward(call: Call, grads: Outputs, saved: tuple[()], needs: list[bool]) -> tuple[Tensor | None, ...]:
    from kolors_fast.kernels import qk_norm as kernel

    found: list[Tensor | None] = [None] * len(needs)
    for part, grad in _with_gradient(call, grads, needs, found):
        if part.weight is None:
            found[part.field] = torch.empty_like(part.x).copy_(grad)
        else:
            found[part.field], found[part.weight_field] = kernel.backward(
                part.x, part.weight, _streams.rows_in_place(grad), call.eps,
                needs[part.field], needs[part.weight_field],
            )  # fmt: skip
    return tuple(found)


def _cuda_declines(call: Call) -> str | None:
    head_dim = call.q.shape[3]
    return f"holds heads of up to {CUDA_HEAD_DIM} elements, got {head_dim}" if head_dim > CUDA_HEAD_DIM else None


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(partial(_extension_forward, "cpu"), partial(_extension_backward, "cpu")),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(partial(_extension_forward, "cuda"), partial(_extension_backward, "cuda"), _cuda_declines),
}


# ---- from a call to a launcher


def _fake(call: Call) -> Outputs:
    """Joint q, k and v; None for one that passes through."""
    return _outputs(call, _parts(call))


def _outputs(call: Call, parts: list[Part]) -> Outputs:
    batch, _, heads, head_dim = call.q.shape
    tokens: list[int | None] = [None, None, None]
    for part in parts:
        tokens[part.output] = part.start + part.x.shape[1]  # the last part of an output ends it
    q, k, v = (None if n is None else call.q.new_empty(batch, n, heads, head_dim) for n in tokens)
    return q, k, v


def _kept(call: Call, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of what is copied `backward` reads the shape alone: a row in every row's place."""
    row = call.q.new_empty(call.q.shape[3])
    return {Call._fields[part.field]: row.expand(part.x.shape) for part in _parts(call) if part.weight is None}


_operator = Operator("qk_norm", Call, COLUMNS, dense=_streams.dense, fake=_fake, outputs=3, kept=_kept)


# ---- what tests, benchmarks and explain() are made from


def _bytes_moved(inputs: Inputs) -> int:
    """What is written, read once and written once."""
    return sum(2 * part.x.numel() * part.x.element_size() for part in _parts(_prepare(**inputs)))


def _flops(inputs: Inputs) -> int:
    """4 per normalised element: square and add, two multiplications."""
    return sum(4 * part.x.numel() for part in _parts(_prepare(**inputs)) if part.weight is not None)


SPEC = OpSpec(
    name="qk_norm",
    function=qk_norm,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("q", "k", "v", "q_weight", "k_weight", "added"),
)
