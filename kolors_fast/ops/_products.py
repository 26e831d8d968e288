"""Who multiplies in the linear layers and convolutions of the models.

On a GPU it is torch's own choice: cuBLAS and cuDNN. On a CPU in float32 there are, beside torch's choice of MKL:
`onednn`, oneDNN's linear layer; `packed`, oneDNN's convolution with weights reordered once instead of in each call;
and our own: `kolors_fast`, a linear layer of packed weights (csrc/cpu/linear.cpp), and `winograd`, a 3x3 convolution at
4/9 of its products (csrc/cpu/winograd.cpp). `products.json` has the times that bench/measure_products.py took, and the
shape nearest to the one at hand decides. A CPU that was not measured gets torch's choice. The sums are the same up to
their order; each element's does not depend on the number of threads or on the other rows, where ours multiplies.

Packed weights are a second copy, of PACKED_LIMIT bytes at most in a process, a quarter of the machine's memory; the
weights beyond are read in place.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import savings
from . import _backends, _library, _rows
from ._marks import Derived

PACKED_LIMIT = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
_packed = Derived(PACKED_LIMIT)
PANEL = 32  # columns, as csrc/cpu/product.h has them
POSITIONS = 16  # of a window, as csrc/cpu/winograd.cpp has them
_OURS = ("kolors_fast",)
# below, nothing is gained (2 rows of 64 by 64 take 4.5 and 4.8 us, AMD EPYC: the call is most of it), and torch errs
# less, for ours adds up a depth of 64 in one chain
LEAST_PRODUCTS = 1 << 14
# on a CPU that was not measured: from which oneDNN's GELU as an epilogue is faster than by itself; below, it costs more
# to set up and to reorder the weight than it saves. Of one thread of an Intel Xeon (bench/measure_gelu.py), times as
# fast: 0.9 to 1.1 for 32 rows of 128 to 384 elements, 1.2 to 1.5 for 128 rows, 1.3 to 2.0 for 512; 0.3 to 0.7 for 8
GELU_ROWS, GELU_PRODUCTS = 64, 1e6


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: `F.linear` by the fastest at hand."""
    if _chooses(x, weight, bias) and x.shape[-1] == weight.shape[1]:
        for provider in _for_linear(x.shape, weight.shape):
            y = _onednn_linear(x, weight, bias) if provider == "onednn" else _packed_linear(x, weight, bias)
            if y is not None:
                return y
    if _trains(x, weight, bias) and "onednn" in _for_linear(x.shape, weight.shape):
        trained: Tensor = _TrainedLinear.apply(x, weight, bias)
        return trained
    return F.linear(x, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x @ weight^T + bias) in its tanh form, as the epilogue of the product where a library offers that.

    On a CPU that is ours or oneDNN's, but for few rows. On a GPU it is cuBLASLt's, in 16 bit.
    """
    if _chooses(x, weight, bias) and x.shape[-1] == weight.shape[1]:
        for provider in _for_gelu(x.shape, weight.shape):
            ours = provider == "kolors_fast"
            y = _packed_linear(x, weight, bias, gelu=True) if ours else _onednn_linear(x, weight, bias, "gelu")
            if y is not None:
                return y
    if _has_epilogue(x, weight, bias):
        assert bias is not None
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], -1)
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """value * gelu(gate) of the halves of x @ weight^T + bias in one kernel, or None where ours is not the fastest."""
    fits = x.shape[-1] == weight.shape[1]
    if fits and _chooses(x, weight, bias) and _for_linear(x.shape, weight.shape)[:1] == _OURS:
        return _packed_linear(x, weight, bias, gated=True)
    return None


def linear_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, add: Tensor) -> Tensor:
    """add + concat(parts) @ weight^T + bias, the concat never built: parts [..., K_i], weight [N, sum of K_i, ...]."""
    fits = sum(x.shape[-1] for x in parts) == weight.shape[1] and add.dtype == weight.dtype
    fits = fits and all(add.shape == (*x.shape[:-1], weight.shape[0]) for x in parts)
    y: Tensor | None = add.contiguous() if fits else None
    first = 0
    for x in parts:
        ours = _chooses(x, weight, bias, add) and _for_linear(x.shape, weight.shape)[:1] == _OURS
        y = _packed_linear(x, weight, None if first else bias, add=y, first=first) if ours and y is not None else None
        first += x.shape[-1]
    if y is not None:
        return y
    halves = weight.flatten(1).split([x.shape[-1] for x in parts], dim=1)  # read in place
    y = F.linear(parts[0].flatten(0, -2), halves[0], bias)
    for x, half in zip(parts[1:], halves[1:], strict=True):
        y = torch.addmm(y, x.flatten(0, -2), half.t())
    return add + y.view(add.shape)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Sequence[int] = (1, 1), padding: Any = (0, 0)
) -> Tensor:
    """`F.conv2d` without dilation and groups, by the fastest at hand."""
    if (
        _chooses(x, weight, bias)
        and x.shape[1:2] == weight.shape[1:2]
        and x.is_contiguous(memory_format=torch.channels_last)  # what was measured
        and not isinstance(padding, str)
    ):
        for provider in _for_conv2d(x.shape, weight.shape, *stride, *padding):
            if provider == "packed":
                y = _packed_conv2d(x, weight, bias, stride, padding)
            elif provider == "kolors_fast":  # 1x1: a linear layer of the pixels
                tokens = _packed_linear(x.permute(0, 2, 3, 1), weight, bias)
                y = None if tokens is None else tokens.permute(0, 3, 1, 2)
            else:
                y = _winograd(x, weight, bias) if savings.on("winograd") else None
            if y is not None:
                return y
    return F.conv2d(x, weight, bias, stride, padding)


class _TrainedLinear(torch.autograd.Function):
    """A linear layer and its gradients by oneDNN, where MKL is slower: on CPUs that are not Intel's, above all.

    Of the weight's gradient [N, K] and its transpose, the one with fewer rows is multiplied, which is faster. Training
    the small UNet is 1.5 times as fast as diffusers' with it and 1.2 without (bench/bench_training.py, AMD EPYC).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = _onednn_linear(grad, weight.t(), None) if of_x else None
        grad_weight, (rows, grads) = None, (x.flatten(0, -2), grad.flatten(0, -2))
        if of_weight and len(weight) <= weight.shape[1]:
            grad_weight = _onednn_linear(grads.t(), rows.t(), None)
        elif of_weight:
            grad_weight = _onednn_linear(rows.t(), grads.t(), None).t()
        return grad_x, grad_weight, grads.sum(0) if of_bias else None


# ---- the providers; None where there is no room for packed weights


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str = "none") -> Tensor:
    """The epilogue may be "gelu", in the tanh form."""
    algorithm = "tanh" if epilogue == "gelu" else ""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, epilogue, [], algorithm)
    return y


def _packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool = False,
    gelu: bool = False,
    add: Tensor | None = None,  # of the result's size, contiguous
    first: int = 0,  # the column of weight that meets the first of x
) -> Tensor | None:
    depth = x.shape[-1]

    def pack() -> Tensor:
        return pack_linear(weight.detach().flatten(1)[:, first : first + depth], gated)

    packed = _packed.get(weight, pack, "gated" if gated else f"linear {first} {depth}")
    if packed is None:
        return None
    width = weight.shape[0] // (2 if gated else 1)
    x, y = _rows.as_rows(x), torch.empty(*x.shape[:-1], width)
    module: Any = _backends.extension("cpu")
    module.linear(
        x.data_ptr(), packed.data_ptr(), _address(bias), _address(add), y.data_ptr(), x.numel() // depth,
        _rows.row_stride(x), depth, width, gated, gelu,
    )  # fmt: skip
    return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack_linear(weight: Tensor, gated: bool = False) -> Tensor:
    """[columns, depth] as csrc/cpu/linear.cpp reads it; gated: the columns are values, then their gates."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    width, depth = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    packed = torch.empty(math.ceil(width / (PANEL // 2 if gated else PANEL)) * PANEL * depth)
    module: Any = _backends.extension("cpu")
    module.pack_linear(weight.data_ptr(), packed.data_ptr(), weight.stride(0), depth, width, gated)
    return packed


def _packed_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    def pack() -> Tensor:  # for any input: only the weight's own shape and layout decide
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, x.shape)
        return packed

    packed = _packed.get(weight, pack, "conv2d")
    if packed is None:
        return None
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")
    return y


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    batch, channels, height, width = x.shape
    out = weight.shape[0]
    module: Any = _backends.extension("cpu")

    def pack() -> Tensor:
        packed = torch.empty(math.ceil(out / PANEL) * PANEL * POSITIONS * channels)
        dense = weight.detach().contiguous(memory_format=torch.channels_last)
        module.pack_winograd(dense.data_ptr(), packed.data_ptr(), channels, out)
        return packed

    packed = _packed.get(weight, pack, "winograd")
    if packed is None:
        return None
    y = torch.empty(batch, out, height, width, memory_format=torch.channels_last)
    module.winograd(x.data_ptr(), packed.data_ptr(), _address(bias), y.data_ptr(), batch, height, width, channels, out)
    return y


# ---- the choice


@cache
def _for_linear(x: torch.Size, weight: torch.Size) -> tuple[str, ...]:
    rows = math.prod(x[:-1])
    if len(x) < 2 or rows * math.prod(weight) < LEAST_PRODUCTS:
        return ()
    return choose("linear", rows, weight[1], weight[0])


@cache
def _for_gelu(x: torch.Size, weight: torch.Size) -> tuple[str, ...]:
    rows = math.prod(x[:-1])
    if "gelu_linear" in measured(this_machine()):
        return choose("gelu_linear", rows, weight[1], weight[0])
    return ("onednn",) if rows >= GELU_ROWS and rows * math.prod(weight) >= GELU_PRODUCTS else ()


@cache
def _for_conv2d(x: torch.Size, weight: torch.Size, *steps: int) -> tuple[str, ...]:
    if len(x) != 4:
        return ()
    rows, depth = x[0] * x[2] * x[3] // (steps[0] * steps[1]), math.prod(weight[1:])
    if weight[2:] == (1, 1) and steps == (1, 1, 0, 0) and choose("linear", rows, depth, weight[0])[:1] == _OURS:
        return (*_OURS, "packed")
    found = choose("conv2d", rows, depth, weight[0])
    of_any_kernel = tuple(provider for provider in found if provider != "winograd")
    return found if weight[2:] == (3, 3) and steps == (1, 1, 1, 1) else of_any_kernel


@cache
def measured(machine: str) -> dict[str, dict[tuple[int, int, int], tuple[str, ...]]]:
    """kind -> (rows, depth, width) -> the providers faster than torch, as measured on such a machine, fastest first."""
    table = json.loads((Path(__file__).parent / "products.json").read_text(encoding="utf-8"))
    found: dict[str, dict[tuple[int, int, int], tuple[str, ...]]] = {}
    for row in table.get(machine, {}).get("rows", []):
        times = row["microseconds"]
        ranking = sorted(times, key=times.get)
        found.setdefault(row["kind"], {})[tuple(row["shape"])] = tuple(ranking[: ranking.index("torch")])
    return found


@cache
def choose(kind: str, rows: int, depth: int, width: int, machine: str | None = None) -> tuple[str, ...]:
    """The providers that were faster than torch, for the nearest measured shape in factors of two; fastest first."""
    shapes = measured(this_machine() if machine is None else machine).get(kind, {})
    if not shapes:
        return ()
    here = [math.log2(max(n, 1)) for n in (rows, depth, width)]
    nearest = min(shapes, key=lambda shape: math.dist(here, [math.log2(n) for n in shape]))
    return shapes[nearest]


@cache
def this_machine() -> str:
    """What decides among the libraries: the CPU's maker, for MKL runs other code on AMD's, and its instruction set."""
    module: Any = _backends.extension("cpu")
    if isinstance(module, str) or not torch.backends.mkldnn.is_available():
        return "unknown"
    try:
        vendor = re.search(r"vendor_id\s*:\s*(\w+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return f"{vendor[1]} {module.isa()}" if vendor else "unknown"


def _has_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would hand the GELU to cuBLASLt: 16 bit on a GPU, of which nothing wants a gradient."""
    return (
        x.is_cuda
        and bias is not None
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.dtype == weight.dtype == bias.dtype
        and x.numel() > 0
        and _backends.forced() != "reference"
        and not (torch.is_grad_enabled() and _library.wants_grad((x, weight, bias)))
        and not _library.transformed()
        and not torch.is_autocast_enabled("cuda")
    )


def _chooses(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> bool:
    """Whether torch is not the only one: a float32 product on a CPU of which nothing wants a gradient."""
    return (
        _measured_kind(x, weight, bias, add)
        and not _library.tracing(x, weight, bias, add)
        and not _wants_grad(x, weight, bias, add)
    )


def _trains(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The same where a gradient is wanted, once, and in reverse."""
    fits = x.dim() > 1 and x.shape[-1] == weight.shape[-1] and weight.dim() == 2
    return (
        fits
        and _measured_kind(x, weight, bias)
        and (not _library.tracing(x, weight, bias) or _library.checkpointing(x, weight, bias))
        and _wants_grad(x, weight, bias)
        and forward_ad._current_level < 0
    )


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and _library.wants_grad(tensors)


def _measured_kind(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> bool:
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and (bias is None or (bias.dtype is torch.float32 and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and x.numel() > 0
        and weight.numel() > 0
        and savings.on("products")
        and _backends.forced() != "reference"
        and not _library.transformed()
        and not torch.is_autocast_enabled("cpu")
    )
