"""Measure which library multiplies fastest on this CPU, for kolors_fast/ops/products.json:

    python bench/measure_products.py

Rows of other machines in the file stay; those of this one are replaced. Weights take turns, as many as do not fit a
cache, for a model comes back to a weight only after all others; the providers take turns too, round by round.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import _attention, _products

TABLE = Path(_products.__file__).parent / "products.json"
LINEAR = [*product((2, 32, 128, 512, 2048), [(64, 64), (128, 128), (256, 256), (256, 1024), (1024, 256), (1280, 1280)])]
# queries, keys and values of a diffusion transformer, and its feed-forward layer up and down
LINEAR += product((128, 512), [(128, 384), (128, 512), (512, 128), (384, 384), (384, 1152), (384, 1536), (1536, 384)])
GELU = [*product((8, 32, 128, 512, 2048), [(64, 256), (128, 512), (256, 1024), (384, 1536)])]
CONV2D = [(side, c, o) for side in (8, 16, 32, 64) for c, o in [(32, 32), (64, 64), (128, 128), (256, 256), (512, 256)]]
# heads of all samples, tokens, elements of a head
ATTENTION = [*product((2, 8, 40), (16, 64, 256, 1024), (16, 64)), (1, 1024, 512), (1, 4096, 512), (2, 4096, 64)]
CACHE, ROUNDS, LONGEST = 48 << 20, 7, 2e9  # bytes; rounds; products of a call

for parameter, value in ((-4, 0), (-1, -1)):  # as in bench/conftest.py: freed memory stays with the process
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, value)


def linear(rows: int, depth: int, width: int) -> dict[str, Callable[[], Any]]:
    weights = [torch.randn(width, depth) for _ in range(_copies(4 * depth * width))]
    x, bias = torch.randn(rows, depth), torch.randn(width)
    return {
        "torch": lambda: [F.linear(x, w, bias) for w in weights],
        "onednn": lambda: [_products._onednn_linear(x, w, bias) for w in weights],
        "kolors_fast": lambda: [_products._packed_linear(x, w, bias) for w in weights],
    }


def gelu_linear(rows: int, depth: int, width: int) -> dict[str, Callable[[], Any]]:
    """With weights of 1 / depth in variance: GELU by itself takes longer for large elements."""
    weights = [torch.randn(width, depth) * depth**-0.5 for _ in range(_copies(4 * depth * width))]
    x, bias = torch.randn(rows, depth), torch.randn(width)
    return {
        "torch": lambda: [F.gelu(F.linear(x, w, bias), approximate="tanh") for w in weights],
        "onednn": lambda: [_products._onednn_linear(x, w, bias, "gelu") for w in weights],
        "kolors_fast": lambda: [_products._packed_linear(x, w, bias, gelu=True) for w in weights],
    }


def conv2d(side: int, channels: int, out: int) -> dict[str, Callable[[], Any]]:
    def last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    weights = [last(torch.randn(out, channels, 3, 3)) for _ in range(_copies(36 * channels * out))]
    x, bias, one = last(torch.randn(2, channels, side, side)), torch.randn(out), (1, 1)
    return {
        "torch": lambda: [F.conv2d(x, w, bias, 1, 1) for w in weights],
        "packed": lambda: [_products._packed_conv2d(x, w, bias, one, one) for w in weights],
        "winograd": lambda: [_products._winograd(x, w, bias) for w in weights],
    }


def attention(heads: int, tokens: int, head_dim: int) -> dict[str, Callable[[], Any]]:
    count = _copies(12 * heads * tokens * head_dim)
    inputs = [torch.randn(1, tokens, 3 * heads, head_dim).chunk(3, dim=2) for _ in range(count)]
    scale = head_dim**-0.5
    return {
        "torch": lambda: [_attention._sdpa(*qkv, None, scale) for qkv in inputs],
        "kolors_fast": lambda: [_attention._ours(*qkv, None, scale) for qkv in inputs],
    }


def _copies(size: int) -> int:
    return min(200, max(2, CACHE // size))


def microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of one product, the median over rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            count = len(call())
            times[name].append((time.perf_counter() - start) / count * 1e6)
    return {name: round(statistics.median(found[1:]), 1) for name, found in times.items()}


def main() -> None:
    rows = []
    with torch.no_grad():
        for count, (depth, width) in LINEAR:
            if 2 * count * depth * width <= LONGEST:
                rows.append(("linear", (count, depth, width), microseconds(linear(count, depth, width))))
                print(*rows[-1], flush=True)
        for count, (depth, width) in GELU:
            rows.append(("gelu_linear", (count, depth, width), microseconds(gelu_linear(count, depth, width))))
            print(*rows[-1], flush=True)
        for side, channels, out in CONV2D:
            shape = (2 * side * side, 9 * channels, out)
            if 2 * math.prod(shape) <= LONGEST:
                rows.append(("conv2d", shape, microseconds(conv2d(side, channels, out))))
                print(*rows[-1], flush=True)
        for shape in ATTENTION:
            rows.append(("attention", shape, microseconds(attention(*shape))))
            print(*rows[-1], flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    table[_products.this_machine()] = {
        "command": "python bench/measure_products.py",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [{"kind": kind, "shape": shape, "microseconds": times} for kind, shape, times in rows],
    }
    text = json.dumps(table, indent=1)
    for row in (row for machine in table.values() for row in machine["rows"]):  # one line each
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n   "), json.dumps(row))
    TABLE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
