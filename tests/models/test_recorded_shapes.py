"""The shapes that ops are tested and timed on are the model's own, recorded by hooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from kolors_fast import KolorsUNet
from kolors_fast.models import layers
from kolors_fast.ops._group_norm_silu_cases import KOLORS_UNET_SHAPES


def test_group_norm_cases_are_those_of_the_full_size_unet() -> None:
    with torch.device("meta"):
        model = KolorsUNet()
    calls: Counter[tuple[int, int, int, bool]] = Counter()

    def record(module: layers.GroupNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, skip = args[0], kwargs.get("skip")
        skip_channels = 0 if skip is None else skip.shape[1]
        calls[x.shape[1], skip_channels, x.shape[2], kwargs.get("activation", "silu") is not None] += 1

    for module in model.modules():
        if isinstance(module, layers.GroupNorm):
            module.register_forward_pre_hook(record, with_kwargs=True)
    added = {"text_embeds": torch.empty(2, 4096, device="meta"), "time_ids": torch.empty(2, 6, device="meta")}
    model(
        torch.empty(2, 4, 128, 128, device="meta"),
        500,
        torch.empty(2, 256, 4096, device="meta"),
        added_cond_kwargs=added,
    )
    assert sum(calls.values()) == 46
    assert set(calls) == set(KOLORS_UNET_SHAPES)
    # 11 normalise the tokens of a transformer, without SiLU
    assert sum(count for (_, _, _, silu), count in calls.items() if not silu) == 11
