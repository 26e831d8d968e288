"""Measure from which size on upsampling by phases pays on this CPU, for `PHASES_FROM` in kolors_fast/models/layers.py,
and where there is a GPU, `doubled_map` beside torch's nearest neighbour:

python bench/measure_upsampling.py
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from kolors_fast import without
from kolors_fast.models import layers


def microseconds(layer: layers.Upsample, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(10):
        layer(x)
    return (time.perf_counter() - start) * 1e5


@torch.no_grad()
def on_gpu() -> None:
    """Kolors' two maps, and those of its autoencoder."""
    from measure_attention import clock

    torch.cuda.set_stream(torch.cuda.Stream())
    for shape in ((2, 1280, 32, 32), (2, 640, 64, 64), (1, 512, 128, 128), (1, 512, 256, 256), (1, 256, 512, 512)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        theirs = clock(lambda x=x: F.interpolate(x, scale_factor=2.0, mode="nearest"))
        ours = clock(lambda x=x: layers.doubled_map(x))
        medians = [statistics.median(column) for column in zip(*[(theirs(), ours()) for _ in range(9)], strict=True)]
        print(f"{shape}: torch {medians[0]:7.1f} us, ours {medians[1]:7.1f}")


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
    if torch.cuda.is_available():
        on_gpu()
    main()
