"""Which library multiplies, in the linear layers and convolutions of the models.

On a GPU it is torch's own choice: cuBLAS and cuDNN. On a CPU in float32 torch multiplies with MKL, and lets oneDNN
reorder a convolution's weights anew in each call. oneDNN's own linear layer, and weights that are reordered once, are
faster for most shapes: `products.json` has the times that bench/measure_products.py took, and the shape nearest to
the one at hand decides. A CPU that was not measured gets torch's choice. The sums are the same up to their order.

Reordered weights are a second copy, of PACKED_LIMIT bytes at most in a process; the weights beyond are read in place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import savings
from . import _backends, _library
from ._marks import Derived

PACKED_LIMIT = 1 << 30
_packed = Derived(PACKED_LIMIT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: `F.linear` by the fastest library at hand."""
    if _chooses(x, weight, bias) and _of_linear(x.shape, weight.shape) == "onednn":
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Sequence[int] = (1, 1), padding: Any = (0, 0)
) -> Tensor:
    """`F.conv2d` without dilation and groups, by the fastest library at hand."""
    if (
        _chooses(x, weight, bias)
        and x.is_contiguous(memory_format=torch.channels_last)  # what was measured
        and _of_conv2d(x.shape, weight.shape, stride[0] * stride[1]) == "packed"
        and not isinstance(padding, str)
    ):
        packed = _packed.get(weight, lambda: _pack(weight, stride, padding, x.shape))
        if packed is not None:
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, padding, stride, (1, 1), 1, "none", [], ""
            )
            return y
    return F.conv2d(x, weight, bias, stride, padding)


def _pack(weight: Tensor, stride: Sequence[int], padding: Sequence[int], shape: torch.Size) -> Tensor:
    """The weight as oneDNN reads it for any input: only its own shape and layout decide."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, shape)
    return packed


@cache
def _of_linear(x: torch.Size, weight: torch.Size) -> str:
    if len(x) < 2:
        return "torch"
    return choose("linear", math.prod(x[:-1]), weight[1], weight[0])


@cache
def _of_conv2d(x: torch.Size, weight: torch.Size, strides: int) -> str:
    if len(x) != 4:
        return "torch"
    return choose("conv2d", x[0] * x[2] * x[3] // strides, math.prod(weight[1:]), weight[0])


# ---- the choice


@cache
def measured(machine: str) -> dict[str, dict[tuple[int, int, int], str]]:
    """kind -> (rows, depth, width) -> the fastest provider, as measured on such a machine."""
    table = json.loads((Path(__file__).parent / "products.json").read_text(encoding="utf-8"))
    found: dict[str, dict[tuple[int, int, int], str]] = {}
    for row in table.get(machine, {}).get("rows", []):
        best = min(row["microseconds"], key=row["microseconds"].get)
        found.setdefault(row["kind"], {})[tuple(row["shape"])] = best
    return found


@cache
def choose(kind: str, rows: int, depth: int, width: int, machine: str | None = None) -> str:
    """The provider that was fastest for the nearest measured shape, in factors of two; "torch" where none was."""
    shapes = measured(this_machine() if machine is None else machine).get(kind, {})
    if not shapes:
        return "torch"
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


def _chooses(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch is not the only one: a float32 product on a CPU of which nothing wants a gradient."""
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.numel() > 0
        and weight.numel() > 0
        and savings.on("products")
        and _backends.forced() != "reference"
        and not (torch.is_grad_enabled() and _library.wants_grad((x, weight, bias)))
        and not _library.tracing(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
    )
