"""Measure three ways to leave out the pads of captions in PixArt's cross-attention, for `trimmed` in
kolors_fast/models/pixart_conditioning.py:

    OMP_NUM_THREADS=1 python bench/measure_captions.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kolors_fast.models.pixart_conditioning import masked, trimmed
from kolors_fast.ops import qk_norm_attention

HEADS, HEAD_DIM, LENGTH = 16, 72, 120


def ways(patches: int, counts: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    """Attention of a batch whose captions have so many tokens: to all under a bias, to as many as the longest has, and
    of one sample after the other to its own."""
    samples = len(counts)
    q = torch.randn(samples, patches, HEADS, HEAD_DIM)
    states = torch.randn(samples, LENGTH, HEADS * HEAD_DIM)
    mask = (torch.arange(LENGTH) < torch.tensor(counts)[:, None]).long()
    everything, short = masked(states, mask), trimmed(masked(states, mask))
    own = [states[row : row + 1, :count].unflatten(2, (HEADS, -1)).contiguous() for row, count in enumerate(counts)]

    def of(captions: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
        keys = captions.unflatten(2, (HEADS, -1)).contiguous()
        return lambda: qk_norm_attention(q, keys, keys, key_bias=bias)

    return {
        "all tokens": of(everything.states, everything.bias),
        "trimmed": of(short.states, short.bias),
        "one by one": lambda: torch.cat([qk_norm_attention(q[i : i + 1], k, k) for i, k in enumerate(own)]),
    }


@torch.no_grad()
def main() -> None:
    for patches in (256, 1024, 4096):
        for counts in ((1, 20), (1, 60), (20, 20), (120, 120), (1, 1, 20, 35)):
            functions = ways(patches, counts)
            times: dict[str, list[float]] = {name: [] for name in functions}
            for _ in range(12):
                for name, function in functions.items():
                    start = time.process_time()
                    function()
                    times[name].append(1e3 * (time.process_time() - start))
            for name, found in times.items():
                low, middle, high = statistics.quantiles(found[2:], n=4)
                print(f"{patches:5} patches, tokens {counts}: {name:10} {middle:7.2f} ms ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
