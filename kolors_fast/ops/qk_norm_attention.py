"""Attention of one or two streams, with RMSNorm on queries and keys.

Two ways lead to the result, and the backend says which:

- `cpu` and `cuda` pack with `qk_norm` and hand over to the best attention at hand (`_attention`). These are two ops,
  each with its own gradient: the public function composes them, in eager and under tracing alike, so that
  torch.compile sees torch's own attention. As columns they exist for whoever calls the registered op itself; there
  the backward pass runs the forward again.
- `triton` is one flash-attention kernel that normalises what it loads, and `reference` is the definition: these
  run as the registered op, through `Operator`, like any other op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attention, _backends, _streams
from ._arguments import refused_by_kind
from ._operator import Operator, backward_by_rerun
from ._qk_norm_cases import ATTENTION_CASES
from ._spec import Inputs, OpSpec, Tolerance
from ._streams import AddedStream
from .qk_norm import _eager as _eager_pack
from .qk_norm import normalised, pack

Outputs = tuple[Tensor, Tensor | None, Tensor]  # out, added_out, lse


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    q: Tensor  # [B, L, H, D]
    k: Tensor  # [B, S, H, D]
    v: Tensor  # [B, S, H, D]
    q_weight: Tensor | None  # [D]
    k_weight: Tensor | None  # [D]
    added_q: Tensor | None  # [B, L2, H, D]
    added_k: Tensor | None  # [B, S2, H, D]
    added_v: Tensor | None  # [B, S2, H, D]
    added_q_weight: Tensor | None  # [D]
    added_k_weight: Tensor | None  # [D]
    key_bias: Tensor | None  # [B, S + S2]
    eps: float
    scale: float


def qk_norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: AddedStream | tuple[Any, ...] | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """out = softmax(scale * qn @ kn^T + key_bias) @ v, where qn and kn are q and k after RMSNorm.

        qn = q * rsqrt(mean(q^2) + eps) * q_weight      per head and token, rounded to q's dtype; likewise kn

    With an added stream the queries of both streams attend to the keys of both, each normalised with its stream's
    weights: the joint attention of an MM-DiT. Without weights this is plain attention. The softmax is fp32.
    Differentiable once in all tensors.

    Args:
        q: [B, L, H, D], float32, float16, bfloat16 (float64: reference only): a projection's output viewed by heads.
            Any strides with the last axis contiguous are read in place, so q, k, v may be views of a fused projection.
        k, v: [B, S, H, D].
        q_weight, k_weight: [D], in q's dtype or float32, all weights alike; None: not normalised.
        added: the second stream, an `AddedStream` or a tuple of the same. Its keys come after those of the first.
        eps: added to the mean of squares, not negative.
        scale: positive; 1 / sqrt(D) by default.
        key_bias: float32 [B, S + S2], added to the logits of every head and query: -inf or -10000 masks a key, but
            never all keys of a sample (float64 with float64 q).

    Returns:
        out [B, L, H, D] in q's dtype (under torch.autocast in that of autocast, as torch's attention does), contiguous,
        so that `out.flatten(2)` is free; with `added` the pair (out, added_out [B, L2, H, D] or None).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Vaswani et al., arXiv 1706.03762; normalised queries and keys: Henry et al., arXiv 2010.04245; two streams
    of one attention: Esser et al., arXiv 2403.03206.
    """
    call = _prepare(
        q, k, v, q_weight=q_weight, k_weight=k_weight, added=added, eps=eps, scale=scale, key_bias=key_bias
    )  # fmt: skip
    backend = _backends.choose("qk_norm_attention", COLUMNS, call)
    # torch's attention leaves a mask out of the graph where there is no query: then the registered op has its gradient
    composed = backend in ("cpu", "cuda") and (key_bias is None or q.numel() > 0)
    out, added_out = _composed(call) if composed else _operator(call)
    return out if added is None else (out, None if call.added_q is None else added_out)


@refused_by_kind("qk_norm_attention")
def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: AddedStream | tuple[Any, ...] | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Call:
    """Check the public arguments."""
    second = None if added is None else AddedStream(*added)
    _streams.check("qk_norm_attention", q, k, v, q_weight, k_weight, second, eps)
    if v is None:
        raise TypeError("qk_norm_attention: v: expected a tensor, got None")
    keys = k.shape[1] + (0 if second is None else second.k.shape[1])
    if keys == 0:
        raise ValueError("qk_norm_attention: k: expected at least one key, got none")
    if key_bias is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if key_bias.shape != (q.shape[0], keys):
            expected = [q.shape[0], keys]
            raise ValueError(f"qk_norm_attention: key_bias: expected {expected}, got {list(key_bias.shape)}")
        _streams.check_like("qk_norm_attention", "key_bias", key_bias, q, dtype)
    if scale is not None and not scale > 0:
        raise ValueError(f"qk_norm_attention: scale: expected a positive number, got {scale}")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return Call(q, k, v, q_weight, k_weight, *_streams.fields(second), key_bias, float(eps), scale)


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor | None]:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    out, added_out = _reference(_prepare(*args, **options))
    return out if options.get("added") is None else (out, added_out)


def _reference(call: Call) -> tuple[Tensor, Tensor | None]:
    def joint(x: Tensor, weight: Tensor | None, added: Tensor | None, added_weight: Tensor | None) -> Tensor:
        x = normalised(x, weight, call.eps)
        x = x if added is None else torch.cat([x, normalised(added, added_weight, call.eps)], dim=1)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    q = joint(call.q, call.q_weight, call.added_q, call.added_q_weight)
    k = joint(call.k, call.k_weight, call.added_k, call.added_k_weight)
    v = joint(call.v, None, call.added_v, None)
    logits = torch.einsum("blhd,bshd->bhls", q, k) * call.scale
    if call.key_bias is not None:
        logits = logits + call.key_bias[:, None, None]
    return _split(call, torch.einsum("bhls,bshd->blhd", logits.softmax(-1), v).to(call.q.dtype))


def _split(call: Call, joint: Tensor) -> tuple[Tensor, Tensor | None]:
    """Each stream's share of the queries' results, contiguous."""
    queries = call.q.shape[1]
    added_out = None if call.added_q is None else joint[:, queries:].contiguous()
    return joint[:, :queries].contiguous(), added_out


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    added: tuple[Any, ...] | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """RMSNorm, a concat per tensor, and torch's attention, as model code writes it."""
    queries = q.shape[1]
    packed: Any = _eager_pack(q, k, v, q_weight=q_weight, k_weight=k_weight, added=added, eps=eps)
    mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in packed)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    if added is None:
        return out
    return out[:, :queries], None if added[0] is None else out[:, queries:]


# ---- columns


def _composed(call: Call) -> tuple[Tensor, Tensor | None]:
    """Packing, then the best attention at hand."""
    try:
        q, k, v = call[:3]
        if any(weight is not None for weight in call[3:10]):  # or an added stream: else there is nothing to pack
            q, k, v = pack(*call[:10], call.eps)  # type: ignore[assignment]  # v was given
        return _split(call, _attention.attend(q, k, v, call.key_bias, call.scale))
    except (RuntimeError, TypeError):
        _operator.refuse_by_kind(call)
        raise


def _forward_of(function: Callable[[Call], tuple[Tensor, Tensor | None]]) -> Callable[[Call], Outputs]:
    """A launcher of the registered op; lse is what the Triton kernel saves, and nobody else reads it."""
    return lambda call: (*function(call), call.q.new_zeros(_lse_shape(call), dtype=torch.float32))


def _triton_forward(call: Call) -> Outputs:
    from kolors_fast.kernels import qk_norm_attention as kernel  # triton is imported at first use

    outputs: Outputs = kernel.forward(*call)
    return outputs


def _triton_backward(
    call: Call, grads: tuple[Tensor | None, Tensor | None], saved: tuple[Tensor, Tensor, Tensor], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    from kolors_fast.kernels import qk_norm_attention_backward as kernel

    out, added_out, lse = saved
    found: tuple[Tensor | None, ...] = kernel.backward(
        *grads, *call, out, None if call.added_q is None else added_out, lse, needs
    )
    return found


def _declines(call: Call) -> str | None:
    """Packing serves another attention, and whoever asks for it."""
    if _backends.forced() is not None:
        return None
    if _attention.choose(_attention.request_of(call.q, call.k, call.v, call.key_bias)) in _attention.OF_THE_COLUMN:
        return "the Triton kernel is the best attention for this call, and reads what is not packed"
    return None


COLUMNS = {
    "reference": _backends.Column(_forward_of(_reference), backward_by_rerun(_reference)),
    "cpu": _backends.Column(_forward_of(_composed), backward_by_rerun(_composed)),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(_forward_of(_composed), backward_by_rerun(_composed), _declines),
}


# ---- from a call to a launcher


def _lse_shape(call: Call) -> tuple[int, int, int]:
    return call.q.shape[0], call.q.shape[2], call.q.shape[1] + (0 if call.added_q is None else call.added_q.shape[1])


def _fake(call: Call) -> Outputs:
    """out, added_out, and the logarithm of the softmax's denominator of every query."""
    added_out = None if call.added_q is None else call.q.new_empty(*call.added_q.shape)
    return call.q.new_empty(*call.q.shape), added_out, call.q.new_empty(*_lse_shape(call), dtype=torch.float32)


_operator = Operator(
    "qk_norm_attention", Call, COLUMNS, dense=_streams.dense, fake=_fake, outputs=2, saved=1, reads_outputs=True
)


# ---- what tests, benchmarks and explain() are made from


def _bytes_moved(inputs: Inputs) -> int:
    """q, k, v of both streams read once, the results written once."""
    call = _prepare(**inputs)
    rows = [x for x in (call.q, call.k, call.v, call.added_q, call.added_k, call.added_v) if x is not None]
    results = [x for x in (call.q, call.added_q) if x is not None]
    return sum(x.numel() * x.element_size() for x in (*rows, *results))


def _flops(inputs: Inputs) -> int:
    """Two matrix products of [queries, D] with [D, keys] per head."""
    call = _prepare(**inputs)
    keys = call.k.shape[1] + (0 if call.added_k is None else call.added_k.shape[1])
    samples, heads, queries = _lse_shape(call)
    return 4 * samples * heads * queries * keys * call.q.shape[3]


def _details(call: Call) -> dict[str, str]:
    """Attentions that may follow the packing."""
    verdicts = _attention.reasons(_attention.request_of(call.q, call.k, call.v, call.key_bias))
    return {f"attention {name}": verdict for name, verdict in verdicts.items()}


SPEC = OpSpec(
    name="qk_norm_attention",
    function=qk_norm_attention,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=ATTENTION_CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("q", "k", "v", "q_weight", "k_weight", "added", "key_bias"),
    # a flash backward pass takes P = exp2(s - lse) anew: with |s| and |lse| up to 8, in base 2, the roundings of s, of
    # lse and of its product with log2(e) are 4 eps / sqrt(12) each, so P errs by sqrt(3) * 1.15 * ln 2 = 1.4 eps more
    # than a softmax that normalises itself; it is a factor of every term of every gradient
    tolerance=Tolerance(gradient_floor=3.0),
    details=_details,
    traced_as="qk_norm",
)
