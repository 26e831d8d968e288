"""Measure where joint attention gains from projections that write in place, on the GPU where there is one and else on
the CPU, for `JOINT_QKV_ON` and `JOINT_QKV_FROM` in kolors_fast/models/mmdit_blocks.py:

python bench/measure_joint_qkv.py
"""

from __future__ import annotations

import statistics
import time

import torch

from kolors_fast import without
from kolors_fast.models import mmdit_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # width, tokens of the picture, tokens of the text, samples
    "cpu": [(128, 256, 32, 2), (384, 256, 77, 2), (384, 1024, 77, 2), (1536, 256, 154, 1), (1536, 256, 154, 2)],
    "cuda": [(1536, tokens, 154, samples) for tokens in (256, 1024, 4096) for samples in (1, 2, 8)],
}


def milliseconds(layer: mmdit_blocks.JointAttention, x: torch.Tensor, context: torch.Tensor) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    layer(x, context)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@torch.no_grad()
def main() -> None:
    mmdit_blocks.JOINT_QKV_ON, mmdit_blocks.JOINT_QKV_FROM = (DEVICE,), 1
    for dtype in (torch.float32, torch.bfloat16):
        for width, tokens, length, samples in SHAPES[DEVICE]:
            for norms in (False, True):
                layer = mmdit_blocks.JointAttention(width, max(width // 64, 1), last=False).to(DEVICE, dtype).eval()
                if norms:
                    layer.add_norms()
                x = torch.randn(samples, tokens, width, device=DEVICE, dtype=dtype)
                context = torch.randn(samples, length, width, device=DEVICE, dtype=dtype)
                times: list[tuple[float, float]] = []
                for _ in range(16):
                    with without("joint_qkv"):
                        apart = milliseconds(layer, x, context)
                    times.append((apart, milliseconds(layer, x, context)))
                apart, joint = (statistics.median(column) for column in zip(*times[1:], strict=True))
                ratio = statistics.median(joint / apart for apart, joint in times[1:])
                name = f"{samples} x ({tokens} + {length}) x {width} {dtype}{' with norms' if norms else ''}"
                print(f"{name:52} {apart:8.2f} ms, in place {joint:8.2f}, {ratio:.2f} of it", flush=True)


if __name__ == "__main__":
    main()
