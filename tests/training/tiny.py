"""Objectives of every system on small models and random data, which several tests train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kolors_fast.models.mmdit import MMDiT
from kolors_fast.models.pixart import PixArtTransformer
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.training.config import (
    CaptionConditionalStage,
    ClassConditionalStage,
    EpsilonLinearStage,
    EpsilonStage,
    RectifiedFlowStage,
)
from kolors_fast.training.dit import DiT
from kolors_fast.training.encoded import EncodedCaptions
from kolors_fast.training.mmdit import EpsilonLinearObjective, RectifiedFlowObjective, SD3Captions
from kolors_fast.training.objectives import EpsilonObjective, Objective
from kolors_fast.training.pixart import ClassConditionalObjective, Kinds, T5Captions, TextObjective
from kolors_fast.training.pool import Bucket, LatentPool
from kolors_fast.training.streams import Streams

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 16,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "norm_num_groups": 4,
}
MMDIT = {
    "sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 16, "in_channels": 4, "out_channels": 4,
    "pos_embed_max_size": 8, "qk_norm": "rms_norm",
}  # fmt: skip
PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "cross_attention_dim": 32,
    "caption_channels": 16, "sample_size": 8,
}  # fmt: skip
DIT = {"heads": 2, "head_dim": 16, "depth": 2, "channels": 4, "patch_size": 2, "sample_size": 8}
ITEMS, CAPTIONS, CLASSES = 24, 2, 5
SETTINGS: dict[str, Any] = {
    "name": "tiny", "steps": 20, "batch": 8, "learning_rate": 1e-3, "warmup": 4, "decay": 4, "precision": "fp32",
    "captions": CAPTIONS, "checkpoint_every": 1000, "monitor_every": 1000,
}  # fmt: skip


class Seen:
    """The monitor of no objective: drawing takes longer than all the rest."""

    def monitor(self, averaged: nn.Module, folder: Any, step: int) -> dict[str, float]:
        return {"weights": float(sum(p.double().sum() for p in averaged.parameters()))}


class Epsilon(Seen, EpsilonObjective):
    pass


class RectifiedFlow(Seen, RectifiedFlowObjective):
    pass


class EpsilonLinear(Seen, EpsilonLinearObjective):
    pass


class Text(Seen, TextObjective):
    pass


class ClassConditional(Seen, ClassConditionalObjective):
    pass


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pool(captions: Callable[[int], Any], streams: Streams) -> LatentPool:
    """Two buckets, of which one is wide."""
    sizes = ((64, 64), (64, 32))
    buckets = [
        Bucket(size, _normal(ITEMS, 4, size[0] // 8, size[1] // 8, seed=n).half(), captions(ITEMS * CAPTIONS + 1))
        for n, size in enumerate(sizes)
    ]
    return LatentPool(buckets, streams)


def _starts(count: int) -> Tensor:
    lengths = 2 + torch.arange(count) % 4
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _chatglm(count: int) -> EncodedCaptions:
    starts = _starts(count)
    return EncodedCaptions(_normal(int(starts[-1]), 16).half(), starts, _normal(count, 16, seed=1).half())


def _t5(count: int) -> T5Captions:
    starts = _starts(count)
    return T5Captions(_normal(int(starts[-1]), 16).half(), starts)


def _kinds(count: int) -> Kinds:
    return Kinds(torch.arange(count) % (CLASSES + 1))


def _sd3(count: int) -> SD3Captions:
    shapes = ((5, 6), (6,), (5, 10), (10,), (7, 24))
    return SD3Captions(*(_normal(count, *shape, seed=n).half() for n, shape in enumerate(shapes)))


def _drawn(model: nn.Module) -> Any:
    """No weight is zero: what starts with zeros hides what is behind it."""
    for n, parameter in enumerate(model.parameters()):
        if not parameter.any():
            parameter.data.copy_(0.1 * _normal(*parameter.shape, seed=n))
    return model


def epsilon(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    stage = EpsilonStage(objective="epsilon", **{**SETTINGS, **settings})
    return stage, Epsilon(_drawn(KolorsUNet(**UNET)), None, None, None, _pool(_chatglm, streams), stage, streams)  # type: ignore[arg-type]


def rectified_flow(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    stage = RectifiedFlowStage(objective="rectified_flow", shift=3.0, **{**SETTINGS, **settings})
    return stage, RectifiedFlow(_drawn(MMDiT(**MMDIT)), None, None, _pool(_sd3, streams), stage, streams)  # type: ignore[arg-type]


def epsilon_linear(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    stage = EpsilonLinearStage(objective="epsilon_linear", **{**SETTINGS, **settings})
    return stage, EpsilonLinear(_drawn(MMDiT(**MMDIT)), None, None, _pool(_sd3, streams), stage, streams)  # type: ignore[arg-type]


def learned_variance(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    stage = CaptionConditionalStage(objective="learned_variance", **{**SETTINGS, **settings})
    return stage, Text(_drawn(PixArtTransformer(**PIXART)), None, None, _pool(_t5, streams), stage, streams)  # type: ignore[arg-type]


def velocity(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    return epsilon(streams, prediction="v", noise_offset=0.1, **settings)


def class_conditional(streams: Streams, **settings: Any) -> tuple[Any, Objective]:
    stage = ClassConditionalStage(objective="class_conditional", **{**SETTINGS, **settings})
    model = _drawn(DiT(classes=CLASSES, **DIT))
    return stage, ClassConditional(model, None, None, _pool(_kinds, streams), stage, streams)  # type: ignore[arg-type]


OBJECTIVES = {
    "epsilon": epsilon,
    "velocity": velocity,
    "rectified_flow": rectified_flow,
    "epsilon_linear": epsilon_linear,
    "learned_variance": learned_variance,
    "class_conditional": class_conditional,
}


def make(name: str, *, rank: int = 0, size: int = 1, **settings: Any) -> tuple[Any, Objective]:
    """A stage and its objective, the same in every process but for the part of a batch that it sees."""
    torch.manual_seed(5)
    return OBJECTIVES[name](Streams(7, "tiny", rank, size), **settings)
