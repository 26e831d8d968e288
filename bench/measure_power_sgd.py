"""Count the bytes that each process gives to the other replicas in one update, with PowerSGD and without. From shapes
alone, so nothing is downloaded and no process is started:

    python bench/measure_power_sgd.py

Gradients are fp32. On "ddp" each process gives those of all weights; on "hybrid" those of its shards, which are 8 here,
a machine's, and the rank is that of a shard. What a ring sends of it is 2 (k - 1) / k times as much, of k replicas.

The second table is of a transformer layer of DALL-E's (Ramesh et al., arXiv 2102.12092, section 2.5), of rank r in all,
r / 8 a shard, of which the paper says that 1 - 5r / 8d is saved. It shards the second MLP matrix along what that reads;
FSDP2 shards every matrix along what it writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import torch
from bench_models import KOLORS_UNET
from torch import nn

from kolors_fast import KolorsUNet, MMDiT, PixArtTransformer
from kolors_fast.assets import bundled
from kolors_fast.training.power_sgd import rank_of

SHARDS = 8
RANKS = (4, 8, 16, 32, 64, 128)
BUNDLED = {
    "kolors-tiny": ("unet", KolorsUNet),
    "sd3-tiny": ("transformer", MMDiT),
    "pixart-tiny": ("transformer", PixArtTransformer),
}
DALL_E = ((1920, 512), (2688, 640), (3968, 896))  # width and rank


def numbers(shapes: Iterable[tuple[int, ...]], rank: int, shards: int = 1) -> tuple[int, int]:
    """Of the gradients of a process, and what it gives of them; the longest shards count."""
    whole = sent = 0
    for shape in shapes:
        rows, columns = math.ceil(shape[0] / shards), math.prod(shape[1:])
        r = rank_of(rows, columns, rank)
        whole += rows * columns
        sent += (rows + columns) * r if r else rows * columns
    return whole, sent


def shapes_of(model: type[nn.Module], config: dict[str, object]) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in model(**config).parameters()]


def models() -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for name, (component, model) in BUNDLED.items():
        config = json.loads((bundled(name) / component / "config.json").read_text())
        found[name] = shapes_of(model, {key: value for key, value in config.items() if not key.startswith("_")})
    return found | {"Kolors' UNet": shapes_of(KolorsUNet, KOLORS_UNET)}


def size(count: int) -> str:
    count *= 4
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def main() -> None:
    print("| gradients | | " + " | ".join(f"rank {rank}" for rank in RANKS) + " |")
    print("|---" * (len(RANKS) + 2) + "|")
    for name, shapes in models().items():
        for engine, shards in (("ddp", 1), ("hybrid", SHARDS)):
            found = [numbers(shapes, rank, shards) for rank in RANKS]
            cells = [f"{size(sent)} ({sent / whole:.3f})" for whole, sent in found]
            print(f"| {name}, {engine} | {size(found[0][0])} | " + " | ".join(cells) + " |")
    print("\n| saved of a layer of DALL-E | 1 - 5r / 8d | counted, sharded as there | counted, as FSDP2 shards |")
    print("|---" * 4 + "|")
    for d, r in DALL_E:
        others = [(d, d)] * 4 + [(4 * d, d)]  # [out, in]
        found = [numbers([*others, second], r // SHARDS, SHARDS) for second in ((4 * d, d), (d, 4 * d))]
        cells = [f"{1 - sent / whole:.3f}" for whole, sent in found]
        print(f"| d {d}, r {r} | {1 - 5 * r / (8 * d):.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
