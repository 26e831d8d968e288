"""Attention to few keys, with the projections of queries and outputs multiplied into keys and values: CPU, float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _library
from ._products import pack_linear


class Folded(NamedTuple):
    """Keys and values of a short sequence, multiplied with the projections of the queries and of the output."""

    keys: Tensor  # [B, dim, heads * K]: to_q^T k^T / sqrt(d) of each head
    values: Tensor  # [B, heads * K, dim]: v to_out^T of each head
    bias: Tensor  # [B, 1, heads * K], added to the logits
    packed_keys: Tensor  # both as csrc/cpu/folded_attention.cpp reads them
    packed_values: Tensor


def folded(keys: Tensor, values: Tensor, bias: Tensor) -> Folded:
    """Pack them; bias [1 or B, heads * K]."""
    bias = bias.expand(len(keys), -1).contiguous()[:, None]
    packed_keys = torch.stack([pack_linear(one) for one in keys.mT])
    packed_values = torch.stack([pack_linear(one) for one in values.mT])
    return Folded(keys, values, bias, packed_keys, packed_values)


def attend_folded(x: Tensor, to: Folded, heads: int, out_bias: Tensor) -> Tensor:
    """sum_h softmax(x K_h + bias) V_h + out_bias for x [B, N, dim]."""
    fits = x.dtype == out_bias.dtype == torch.float32 and x.shape[::2] == to.keys.shape[:2]
    seen = _library.tracing(x, out_bias) or _library.wants_grad((x, out_bias, *to[:3])) or _library.transformed()
    if not fits or seen:
        logits = torch.baddbmm(to.bias, x, to.keys)  # [B, N, heads * K]
        weights = logits.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
        return torch.baddbmm(out_bias, weights, to.values)
    x, y = x.contiguous(), torch.empty(x.shape)
    module: Any = _backends.extension("cpu")
    module.folded_attention(
        x.data_ptr(), to.packed_keys.data_ptr(), to.packed_values.data_ptr(), to.bias.data_ptr(), out_bias.data_ptr(),
        y.data_ptr(), *x.shape, heads, to.bias.shape[2] // heads,
    )  # fmt: skip
    return y
