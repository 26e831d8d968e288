"""Which attention runs on packed queries, keys and values, and why each other one does not.

The choice is pure: a `Request` in, providers with their reasons out. `ORDER` is all there is to change when a
measurement says so. It starts from published rates on H100 at head dim 64 and 4096 tokens, in TFLOP/s (figure
`flash3_fp16_fwd` of Dao-AILab/flash-attention): FlashAttention-3 476, cuDNN 408, a Triton flash attention 400,
FlashAttention-2 321.

- FlashAttention-3 leads where it is installed: on sm_90, in 16 bit, without a bias.
- torch's `scaled_dot_product_attention` has the next ones built in and picks among them by itself: cuDNN first on sm_90
  and sm_100, else FlashAttention-2, and the memory-efficient kernel with a bias or in fp32. Nothing is forced here; a
  caller's `torch.nn.attention.sdpa_kernel` holds.
- flash_attn and xformers bring the kernels that a torch built without flash attention lacks.
- The Triton kernel normalises by itself, so it is a column of the op. Where a prompt has few keys it leads, else it
  comes before the last resort only. A caller who forces the `cuda` backend gets the best of the others.
- math is the same torch function, where it would write out the L x S matrix.
- On a CPU ours (csrc/cpu/attention.cpp) runs in float32 without a gradient, where it was measured to be faster than
  torch's for the nearest number of heads, keys and elements (`_products.choose`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends, _library, _products

ORDER: Mapping[str, tuple[str, ...]] = {
    "cuda": ("triton_few_keys", "flash_attn_3", "sdpa", "flash_attn", "xformers", "triton", "math"),
    "cpu": ("kolors_fast", "math"),  # torch's flash attention for CPUs hides behind the same function
}
OF_THE_COLUMN = ("triton_few_keys", "triton")  # these normalise by themselves and read what is not packed
_HALF = (torch.float16, torch.bfloat16)


class Request(NamedTuple):
    """What the choice depends on."""

    device: str
    architecture: int  # compute capability as in sm_90; 0 on a CPU
    dtype: torch.dtype
    head_dim: int
    biased: bool
    bias_needs_gradient: bool
    plain: bool  # a call by itself: autograd does not record it, torch.compile does not trace it, autocast is off
    heads: int = 1  # of all samples
    keys: int = 1


Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]  # q, k, v [B, tokens, H, D], bias [B, S], scale


@dataclass(frozen=True)
class Provider:
    """One attention: what it cannot do, and how it is called."""

    declines: Callable[[Request], str | None]
    run: Run


def request_of(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Request:
    device = q.device.type
    needs_gradient = key_bias is not None and key_bias.requires_grad and torch.is_grad_enabled()
    architecture = _architecture(q.device.index or 0) if device == "cuda" else 0
    tensors = (q, k, v, key_bias)
    seen = _library.wants_grad(tensors) or _library.tracing(*tensors) or _library.transformed()
    seen = seen or torch.is_autocast_enabled(device)
    biased, heads = key_bias is not None, q.shape[0] * q.shape[2]
    return Request(device, architecture, q.dtype, q.shape[3], biased, needs_gradient, not seen, heads, k.shape[1])


@_backends.once
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def choose(request: Request, packed: bool = False) -> str:
    """The first provider that does not decline; the last one of the order never does.

    Args:
        packed: whether queries, keys and values are packed already, which leaves the Triton kernel out.
    """
    order = ORDER.get(request.device, ("math",))
    able = (name for name in order if not (packed and name in OF_THE_COLUMN))
    return next(name for name in able if PROVIDERS[name].declines(request) is None)


def reasons(request: Request) -> dict[str, str]:
    """For every provider, in order, either "runs" or the reason why it does not."""
    chosen, table = choose(request), {}
    for name in ORDER.get(request.device, ("math",)):
        reason = PROVIDERS[name].declines(request)
        other = f"declines: {reason}" if reason else f"could run, but {chosen!r} comes first"
        table[name] = "runs" if name == chosen else other
    return table


def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q @ k^T + key_bias) @ v: [B, L, H, D], by the provider that the inputs choose."""
    return PROVIDERS[choose(request_of(q, k, v, key_bias), packed=True)].run(q, k, v, key_bias, scale)


# ---- Triton's, on few keys

# up to which number of keys, which stay on chip, the kernel was measured to be faster than torch's choice: an NVIDIA
# H200 in bfloat16, torch 2.11 (bench/measure_attention.py). us of torch and of ours for 2x4096x10x64 queries: 64 keys
# 15.4 and 9.9, 128 keys 14.6 and 15.8; with a bias 21 keys 37.5 and 11.1, 128 keys 20.0 and 14.5, 256 keys 29.3 and
# 44.9. Heads of 72: 64 keys 30.5 and 20.5, with a bias 39.0 and 23.0, 120 keys 39.4 and 63.7
FEW_KEYS, FEW_BIASED_KEYS = 64, 128


def _few_keys_declines(request: Request) -> str | None:
    if reason := _backends.unavailable("triton"):
        return reason
    if request.architecture != 90:
        return f"was measured on sm_90, got sm_{request.architecture}"
    most = FEW_BIASED_KEYS if request.biased and request.head_dim <= 64 else FEW_KEYS
    if request.keys > most or request.head_dim > 128 or request.dtype not in _HALF:
        return f"keeps {most} keys of 128 elements of 16 bit, got {request.keys} of {request.head_dim} {request.dtype}"
    return None if request.plain else "was measured without a gradient, a traced graph and autocast"


# ---- torch


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    mask = None if key_bias is None else key_bias.to(q.dtype)[:, None, None]  # [B, 1, 1, S]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _sdpa_declines(request: Request) -> str | None:
    """What the fused kernels take, by torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""
    half = request.dtype in _HALF
    if half and not request.biased and request.head_dim <= 256 and request.architecture >= 80:
        return None if _flash_in_torch() else "torch was built without flash attention"
    if request.head_dim % (8 if half else 4) == 0:
        return None
    return (
        f"would write out the L x S matrix: torch has no fused kernel for {request.dtype} heads of {request.head_dim}"
    )


@_backends.once
def _flash_in_torch() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


# ---- ours, on a CPU


def _ours_declines(request: Request) -> str | None:
    if reason := _backends.unavailable("cpu"):
        return reason
    if request.dtype != torch.float32:
        return f"computes float32, got {request.dtype}"
    if not request.plain:
        return "has no gradient, no place in a traced graph and no autocast"
    faster = _products.choose("attention", request.heads, request.keys, request.head_dim)
    return None if faster else "not measured to be faster on this CPU"


def _ours(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, queries, heads, head_dim = q.shape
    out = torch.empty(batch, queries, heads, head_dim)
    bias = None if key_bias is None else key_bias.contiguous()
    module: Any = _backends.extension("cpu")
    module.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], batch, heads, queries, k.shape[1], head_dim, scale,
    )  # fmt: skip
    return out


# ---- packages that may be installed


@_backends.once
def missing(package: str) -> str | None:
    """Why `package` cannot be used, or None."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} does not import ({error})"
    return None


def _flash_declines(package: str, architectures: tuple[int, int], request: Request) -> str | None:
    if reason := missing(package):
        return reason
    first, last = architectures
    if not first <= request.architecture <= last:
        return f"runs on sm_{first} to sm_{last}, got sm_{request.architecture}"
    if request.dtype not in _HALF:
        return f"computes float16 and bfloat16, got {request.dtype}"
    if request.biased:
        return "adds no bias to the logits"
    return None if request.head_dim <= 256 else f"takes heads of up to 256 elements, got {request.head_dim}"


def _flash(package: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    found: Any = importlib.import_module(package).flash_attn_func(q, k, v, softmax_scale=scale)
    out: Tensor = found[0] if isinstance(found, tuple) else found  # the first FlashAttention-3 also returned lse
    return out


def _xformers_declines(request: Request) -> str | None:
    if reason := missing("xformers.ops"):
        return reason
    if request.bias_needs_gradient:
        return "has no gradient for a bias that all heads and queries share"
    wide = 8 if request.dtype in _HALF else 4
    return f"reads rows of whole {wide} elements, got head dim {request.head_dim}" if request.head_dim % wide else None


def _xformers(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    bias = None
    if key_bias is not None:
        # its rows must begin at multiples of 16 bytes: a slice of a longer one
        keys = key_bias.shape[1]
        bias = F.pad(key_bias.to(q.dtype), (0, -keys % 8))[:, None, None, :keys]
        bias = bias.expand(-1, q.shape[2], q.shape[1], -1)
    out: Tensor = importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, bias, scale=scale)
    return out


def _triton(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    raise AssertionError("the Triton kernel is a column of the op, and is not run on what another one packed")


PROVIDERS = {
    "kolors_fast": Provider(_ours_declines, _ours),
    "flash_attn_3": Provider(
        lambda request: _flash_declines("flash_attn_interface", (90, 90), request),
        lambda q, k, v, _, scale: _flash("flash_attn_interface", q, k, v, scale),
    ),
    "sdpa": Provider(_sdpa_declines, _sdpa),
    "flash_attn": Provider(
        lambda request: _flash_declines("flash_attn", (80, 90), request),
        lambda q, k, v, _, scale: _flash("flash_attn", q, k, v, scale),
    ),
    "xformers": Provider(_xformers_declines, _xformers),
    "triton_few_keys": Provider(_few_keys_declines, _triton),
    "triton": Provider(lambda request: _backends.unavailable("triton"), _triton),
    "math": Provider(lambda request: None, _sdpa),
}
