"""Weight-only quantisation of linear layers: 8 or 4 bits per weight in memory, the product in the activation's dtype.

Why not torch's own kernels: a text encoder reads some tens of rows once per picture. For those, making the weight anew,
chunk by chunk, and multiplying is at least five times as fast as torch's int8 kernel in fp32 and fp16, and up to three
times as slow in bf16. 24 rows through 4096 -> 13696 on two CPU threads with torch 2.13, in ms (bench/weight_only.py):

    fp32  bf16  fp16
      45    11    57  nn.Linear
     556    21   655  torch._weight_int8pack_mm
     104    64   106  this module, int8
      86    27    87  this module, int4

`torch._weight_int4pack_mm` takes bf16 only, in a tiled layout that belongs to one device. Both are private, and the
devices that have them change between versions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTIZATIONS = {"int8": 8, "int4": 4}  # name -> bits
GROUP = 64  # inputs that share a scale in int4
CHUNK = 1 << 21  # weights that exist unpacked at a time: at most 12 bytes each, 24 MiB, or one row


class WeightOnlyLinear(nn.Module):
    """y = x (s q)^T + bias with integers q and fp32 scales s.

    int8: one s per output row, max |w| / 127; q = round(w / s).
    int4: one s per row and group of 64 inputs, -m / 8 with m the group's value of largest magnitude, so that m itself
    is met and all 16 values serve; q = round(w / s) in [-8, 7], stored as q + 8: inputs of the first half of a row
    in the low four bits, those of the second half in the high ones. Rows are padded to whole groups.

    The weight is rebuilt in chunks of rows, computed in fp32 and rounded once to x's dtype. Gradients reach x alone.

    Source of the signed scale: llama.cpp's Q4_0.
    """

    weight: Tensor  # int8 [out, in], or uint8 [out, padded in / 2]
    scale_bits: Tensor  # the scales, fp32 [out, 1] or [out, groups], seen as int32

    def __init__(self, in_features: int, out_features: int, bits: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        weight, scale_bits = _empty(out_features, in_features, bits)
        self.register_buffer("weight", weight)
        self.register_buffer("scale_bits", scale_bits)  # integers: a cast of the model to half precision passes them by
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> WeightOnlyLinear:
        """The quantised form of a layer, on its device; of a layer on the meta device the empty form."""
        with torch.device(linear.weight.device):
            bias = None if linear.bias is None else linear.bias.detach()
            layer = cls(linear.in_features, linear.out_features, bits, bias)
        if not linear.weight.is_meta:
            layer.weight, layer.scale_bits = quantize(linear.weight.detach(), bits)
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={bias}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        parts = [
            F.linear(x, self.dequantized(rows, x.dtype), None if self.bias is None else self.bias[rows])
            for rows in _chunks(self.out_features, self.in_features)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of s q, [rows, in]."""
        q, scale = self.weight[rows], self.scale_bits[rows].view(torch.float32)
        if self.bits == 8:
            return (q * scale).to(dtype)
        q = torch.cat([q & 15, q >> 4], dim=1).unflatten(1, (-1, GROUP))  # [rows, groups, GROUP]
        return q.float().sub_(8).mul_(scale[..., None]).to(dtype).flatten(1)[:, : self.in_features]


def quantize(weight: Tensor, bits: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """`weight` and `scale_bits` of a WeightOnlyLinear, on `device`, where no more than a chunk of rows is ever whole.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    with torch.device(weight.device if device is None else device):
        quantized, scale_bits = _empty(weight.shape[0], weight.shape[1], bits)
    for rows in _chunks(*weight.shape):
        q, scale = _quantize(weight[rows].to(quantized.device).float(), bits)
        quantized[rows], scale_bits[rows] = q, scale.view(torch.int32)
    return quantized, scale_bits


def _empty(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    if bits == 8:
        return torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1, dtype=torch.int32)
    groups = -(-columns // GROUP)
    packed = torch.empty(rows, groups * GROUP // 2, dtype=torch.uint8)
    return packed, torch.empty(rows, groups, dtype=torch.int32)


def _quantize(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    grouped = w[:, None] if bits == 8 else F.pad(w, (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)  # [rows, groups, 1]
    extreme = torch.where(high >= -low, high, low)
    if not extreme.isfinite().all():
        raise ValueError("quantize: weight: expected finite numbers, got NaN or infinity")
    scale = extreme.abs() / 127 if bits == 8 else extreme / -8
    q = (grouped / torch.where(scale == 0, 1.0, scale)).round_()
    if bits == 8:
        return q.squeeze(1).to(torch.int8), scale.squeeze(-1)
    first, second = q.clamp_(max=7).add_(8).to(torch.int8).view(torch.uint8).flatten(1).chunk(2, dim=1)
    return first | second << 4, scale.squeeze(-1)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
