"""Inputs of group_norm_silu: the models' own shapes, and the ones that break kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ._spec import Case, Inputs

# (C of x, C of skip, side of the latent at 1024x1024, SiLU): every GroupNorm of the Kolors UNet, recorded by hooks on
# the model (tests/models/test_recorded_shapes.py holds them equal)
KOLORS_UNET_SHAPES = (
    (320, 0, 128, True),
    (320, 320, 128, True),
    (640, 320, 128, True),
    (320, 0, 64, True),
    (640, 0, 64, True),
    (640, 0, 64, False),
    (640, 320, 64, True),
    (640, 640, 64, True),
    (1280, 640, 64, True),
    (640, 0, 32, True),
    (1280, 0, 32, True),
    (1280, 0, 32, False),
    (1280, 640, 32, True),
    (1280, 1280, 32, True),
)


def _inputs(
    generator: torch.Generator,
    n: int,
    c: int,
    spatial: tuple[int, ...],
    groups: int,
    *,
    c_skip: int = 0,
    add: bool = False,
    silu: bool = True,
    channels_last: bool = False,
    mean: float = 0.0,
    scale: float = 1.0,
    eps: float = 1e-5,
    weight_dtype: torch.dtype = torch.float64,
) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def image(channels: int) -> Tensor:
        h = normal(n, channels, *spatial) * scale + mean
        return h.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else h

    total = c + c_skip
    return {
        "x": image(c),
        "num_groups": groups,
        "weight": (1 + 0.2 * normal(total)).to(weight_dtype),
        "bias": (0.2 * normal(total)).to(weight_dtype),
        "eps": eps,
        "skip": image(c_skip) if c_skip else None,
        "channel_add": normal(n, total) * scale if add else None,
        "activation": "silu" if silu else None,
    }


def _small(name: str, *shape: object, **options: object) -> Case:
    return Case(name, lambda generator: _inputs(generator, *shape, **options))  # type: ignore[arg-type]


def _offset_view(generator: torch.Generator) -> Inputs:
    """x starts one element into its storage, so that no wide load is aligned."""
    inputs = _inputs(generator, 2, 16, (5, 6), 4, channels_last=True)
    x: Tensor = inputs["x"]
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype)
    view = storage[1:].view(2, 5, 6, 16).movedim(-1, 1)
    view.copy_(x)
    return {**inputs, "x": view}


def _strided(generator: torch.Generator) -> Inputs:
    inputs = _inputs(generator, 2, 12, (6, 5), 3)
    return {**inputs, "x": torch.cat([inputs["x"]] * 2, dim=3)[..., ::2]}


def _with_value(value: float) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs = _inputs(generator, 2, 8, (4, 4), 2)
        inputs["x"][0, 1, 2, 3] = value
        return inputs

    return Case(f"holds_{value}", make)


def _model(c: int, c_skip: int, side: int, silu: bool) -> Case:
    name = f"kolors_2x{c}{f'+{c_skip}' if c_skip else ''}x{side}x{side}{'' if silu else '_no_silu'}"
    options = {"c_skip": c_skip, "silu": silu, "eps": 1e-5 if silu else 1e-6, "channels_last": True}
    return Case(name, lambda g: _inputs(g, 2, c, (side, side), 32, **options), model=True)  # type: ignore[arg-type]


CASES = (
    _small("plain", 2, 32, (8, 8), 8),
    _small("channels_last", 2, 32, (8, 8), 8, channels_last=True),
    _small("no_silu", 2, 32, (8, 8), 8, silu=False, eps=1e-6, channels_last=True),
    _small("odd", 3, 15, (7, 5), 5),
    _small("odd_channels_last", 3, 15, (7, 5), 5, channels_last=True),
    _small("prime", 1, 7, (13, 11), 1, channels_last=True),
    _small("ten_per_group", 2, 40, (6, 9), 4, channels_last=True),
    _small("one_pixel", 2, 12, (1, 1), 4, channels_last=True),
    _small("no_spatial", 3, 12, (), 4),
    _small("tokens", 2, 24, (33,), 6, channels_last=True),
    _small("batch_0", 0, 8, (4, 4), 2),
    _small("skip", 2, 16, (6, 6), 4, c_skip=16),
    _small("skip_channels_last", 2, 16, (6, 6), 4, c_skip=16, channels_last=True),
    _small("seam", 2, 20, (5, 7), 5, c_skip=10),  # 6 per group: one group straddles the seam
    _small("seam_channels_last", 2, 20, (5, 7), 5, c_skip=10, channels_last=True, add=True),
    _small("seam_odd", 1, 13, (4, 5), 4, c_skip=7, channels_last=True),
    _small("channel_add", 2, 32, (6, 6), 8, add=True),
    _small("channel_add_channels_last", 2, 32, (6, 6), 8, add=True, channels_last=True),
    _small("weights_fp32", 2, 16, (5, 5), 4, channels_last=True, weight_dtype=torch.float32),
    _small("many_pixels", 1, 8, (64, 48), 2, channels_last=True),
    _small("large_mean", 2, 16, (8, 8), 4, mean=1000.0, channels_last=True),
    _small("large_mean_nchw", 2, 16, (8, 8), 4, mean=-1000.0),
    _small("huge", 2, 16, (6, 6), 4, scale=1e4, channels_last=True),
    _small("tiny", 2, 16, (6, 6), 4, scale=1e-3, eps=1e-6, channels_last=True),
    Case("constant", lambda g: {**_inputs(g, 1, 8, (4, 4), 2), "x": torch.full((1, 8, 4, 4), 3.0).double()}),
    Case("offset_view", _offset_view),
    Case("strided", _strided),
    _with_value(float("nan")),
    _with_value(float("inf")),
    *(_model(*shape) for shape in KOLORS_UNET_SHAPES),
)
