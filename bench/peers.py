"""Other libraries' kernels for the same ops, where they are installed: rivals in a benchmark, nothing else.

Each takes the op's own arguments and computes the op's own function, glued together with plain PyTorch where the
library has a part of it. A peer whose result differs is reported and not timed (Liger's GEGLU, for one, is the tanh
approximation and not listed). A kernel of ours is among them where its times are to decide whether the op uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import _attention
from kolors_fast.ops.geglu_linear import epilogue


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _liger("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "gemma", False)


def _liger_swiglu(h: Tensor) -> Tensor:
    gate, value = h.chunk(2, dim=-1)
    return _liger("swiglu", "LigerSiLUMulFunction").apply(gate.contiguous(), value.contiguous())


def _liger_residual_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    r = x + y
    return r, _liger("layer_norm", "LigerLayerNormFunction").apply(r, weight, bias, eps)


def _liger_group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, skip: Tensor | None,
    channel_add: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    h = x if skip is None else torch.cat([x, skip], dim=1)
    h = h if channel_add is None else h + channel_add[:, :, None, None]
    h = _liger("group_norm", "LigerGroupNormFunction").apply(h.contiguous(), weight, bias, h.shape[1], num_groups, eps)
    return F.silu(h) if activation else h


def _triton_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GEGLU as the epilogue of our own product: the rows that it wins belong into `EPILOGUE_PAYS_FROM`."""
    if not x.is_cuda:
        raise NotImplementedError(f"runs on cuda tensors, got {x.device}")
    return epilogue(x, weight, bias)


def _attention_of(
    provider: str, q: Tensor, k: Tensor, v: Tensor, *, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    added: Any = None, eps: float = 1e-6, scale: float | None = None, key_bias: Tensor | None = None,
) -> Any:  # fmt: skip
    """RMSNorm and concatenation in plain PyTorch, then the package's attention."""

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)

    length, q, k = q.shape[1], normed(q, q_weight), normed(k, k_weight)
    if added is not None:
        added_q, added_k, added_v, added_q_weight, added_k_weight = added
        q = q if added_q is None else torch.cat([q, normed(added_q, added_q_weight)], dim=1)
        k, v = torch.cat([k, normed(added_k, added_k_weight)], dim=1), torch.cat([v, added_v], dim=1)
    request = _attention.request_of(q, key_bias)
    if reason := _attention.PROVIDERS[provider].declines(request):
        raise NotImplementedError(reason)
    out = _attention.PROVIDERS[provider].run(q, k, v, key_bias, scale or q.shape[-1] ** -0.5)
    return out if added is None else (out[:, :length], out[:, length:])


PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "group_norm_silu": {"liger": _liger_group_norm_silu},
    "geglu_linear": {"triton_epilogue": _triton_epilogue},
    "residual_layer_norm": {"liger": _liger_residual_layer_norm},
    "rms_norm": {"liger": _liger_rms_norm},
    "swiglu": {"liger": _liger_swiglu},
    "qk_norm_attention": {
        name: partial(_attention_of, name) for name in ("sdpa", "flash_attn_3", "flash_attn", "xformers")
    },
}
