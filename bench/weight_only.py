"""Time of one linear layer, ChatGLM's widest but one, with weights of 16, 8 and 4 bits: python bench/weight_only.py"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kolors_fast.models.weight_only import WeightOnlyLinear

ROWS, IN, OUT = 24, 4096, 13696  # 24: a prompt of usual length and an empty one
ROUNDS = 7


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The shortest of some calls."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    linear = nn.Linear(IN, OUT, bias=False)
    int8, int4 = (WeightOnlyLinear.from_linear(linear, bits) for bits in (8, 4))
    q, scale = int8.weight, int8.scale_bits.view(torch.float32).flatten()
    times: dict[str, list[float]] = {name: [] for name in ("nn.Linear", "torch._weight_int8pack_mm", "int8", "int4")}
    for dtype in dtypes:
        x, plain, s = torch.randn(ROWS, IN).to(dtype), linear.weight.to(dtype), scale.to(dtype)
        calls: list[Callable[[], Tensor]] = [
            lambda x=x, plain=plain: nn.functional.linear(x, plain),
            lambda x=x, s=s: torch._weight_int8pack_mm(x, q, s),
            lambda x=x: int8(x),
            lambda x=x: int4(x),
        ]
        for name, call in zip(times, calls, strict=True):
            times[name].append(milliseconds(call))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; fp32, bf16, fp16 in ms")
    for name, row in times.items():
        print("  ".join(f"{value:6.1f}" for value in row), name)


if __name__ == "__main__":
    main()
