"""Measure from which size on upsampling by phases pays on this CPU, for `PHASES_FROM` in kolors_fast/models/layers.py:

python bench/measure_upsampling.py
"""

from __future__ import annotations

import statistics
import time

import torch

from kolors_fast import without
from kolors_fast.models import layers


def microseconds(layer: layers.Upsample, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(10):
        layer(x)
    return (time.perf_counter() - start) * 1e5


@torch.no_grad()
def main() -> None:
    layers.PHASES_FROM = 0
    for channels in (32, 64, 96, 128, 256):
        for side in (2, 4, 8, 16, 32):
            layer = layers.Upsample(channels).eval()
            x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last)
            times: list[tuple[float, float]] = []
            for _ in range(9):
                with without("upsample_phases"):
                    whole = microseconds(layer, x)
                times.append((whole, microseconds(layer, x)))
            whole, phases = (statistics.median(column) for column in zip(*times[1:], strict=True))
            work = 2 * 4 * side * side * 9 * channels * channels
            print(
                f"{channels:4} channels {side:3}^2 {work / 1e6:8.1f} M products: {whole:7.0f} us, phases {phases:7.0f}"
            )


if __name__ == "__main__":
    main()
