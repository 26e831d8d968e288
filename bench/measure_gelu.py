"""Measure where GELU is faster as oneDNN's epilogue than after the product, for GELU_ROWS in ops/_products.py:

    python bench/measure_gelu.py

One thread, and time of the process, so that others on the machine matter less; the two take turns, and the least time
of each counts.
"""

from __future__ import annotations

import time
from itertools import product

import torch
import torch.nn.functional as F

WIDTHS = (32, 64, 128, 192, 256, 384, 1152)
ROWS = (8, 32, 64, 128, 512)
TURNS, LONGEST, SHORTEST = 7, 1e9, 3e7  # products of the largest one, and of all calls of a turn


def main() -> None:
    torch.set_num_threads(1)
    print("rows, elements in and out, microseconds of product and GELU, of both in one, times as fast")
    for rows, width in product(ROWS, WIDTHS):
        if 4 * rows * width**2 > LONGEST:
            continue
        x, weight, bias = torch.randn(rows, width), torch.randn(4 * width, width) * width**-0.5, torch.randn(4 * width)
        calls = {
            "apart": lambda x=x, w=weight, b=bias: F.gelu(F.linear(x, w, b), approximate="tanh"),
            "one": lambda x=x, w=weight, b=bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu", [], "tanh"),
        }
        count = 2 + int(SHORTEST / (4 * rows * width**2))
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(TURNS):
            for name, call in calls.items():
                started = time.process_time()
                for _ in range(count):
                    call()
                least[name] = min(least[name], (time.process_time() - started) / count * 1e6)
        ratio = least["apart"] / least["one"]
        print(f"{rows:5} {width:5} {4 * width:5} {least['apart']:9.1f} {least['one']:9.1f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
