"""Measure up to how many keys the Triton attention that keeps them on chip is faster than torch's on this GPU, for
`FEW_KEYS` and `FEW_BIASED_KEYS` in kolors_fast/ops/_attention.py:

python bench/measure_attention.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import qk_norm_attention, use_backend

QUERIES = ((2, 4096, 10, 64), (2, 1024, 20, 64), (2, 4096, 16, 72))  # Kolors' two levels, PixArt
KEYS = (21, 48, 64, 77, 120, 128, 256)
CALLS = 20


def clock(call: Callable[[], Tensor]) -> Callable[[], float]:
    """What plays some calls as one graph and returns the microseconds of one."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def microseconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / CALLS

    return microseconds


def torchs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)[:, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)


@torch.no_grad()
def main() -> None:
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    print(torch.cuda.get_device_name(), torch.__version__)
    for batch, queries, heads, head_dim in QUERIES:
        for keys in KEYS:
            q = torch.randn(batch, queries, heads, head_dim, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(batch, keys, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            row = f"{batch}x{queries}x{heads}x{head_dim}, {keys:3} keys:"
            for name, bias in (("", None), (", biased", torch.zeros(batch, keys, device="cuda"))):
                with use_backend("triton"):
                    ours = clock(lambda q=q, k=k, v=v, bias=bias: qk_norm_attention(q, k, v, key_bias=bias))
                theirs = clock(lambda q=q, k=k, v=v, bias=bias: torchs(q, k, v, bias))
                times = [(theirs(), ours()) for _ in range(9)]
                medians = [statistics.median(column) for column in zip(*times, strict=True)]
                row += f"{name} torch {medians[0]:5.1f} us, ours {medians[1]:5.1f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
