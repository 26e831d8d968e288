"""Inputs of the LayerNorm ops: the models' own shapes, and the ones that break kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._spec import Case, Inputs

# [B, L, D] at 1024x1024 with guidance
MMDIT_SHAPES = {
    "sd3_2x4096x1536": (2, 4096, 1536),
    "sd3_text_2x333x1536": (2, 333, 1536),
    "sd35_large_2x4096x2432": (2, 4096, 2432),
    "pixart_2x4096x1152": (2, 4096, 1152),
}
UNET_SHAPES = {"kolors_2x4096x640": (2, 4096, 640), "kolors_2x1024x1280": (2, 1024, 1280)}

Build = Callable[..., Inputs]  # (generator, shape, *, mean, scale, dtype) -> inputs


def normal(generator: torch.Generator, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean


def chunk(generator: torch.Generator, batch: int, width: int, dtype: torch.dtype) -> Tensor:
    """[B, D]: the last of six chunks of a projection, small beside 1, as in the models.

    Its rows are 6 D apart, and after the last one the allocation ends: a sanitizer sees what is read past it.
    """
    return (0.2 * normal(generator, batch, 6 * width)).to(dtype).chunk(6, dim=1)[-1]


def cases(build: Build, models: Mapping[str, tuple[int, ...]]) -> tuple[Case, ...]:
    """Those every op of the family has."""

    def case(name: str, shape: tuple[int, ...], model: bool = False, **options: Any) -> Case:
        return Case(name, lambda generator: build(generator, shape, **options), model)

    def changed(name: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor], **options: Any) -> Case:
        def make(generator: torch.Generator) -> Inputs:
            inputs = build(generator, shape, **options)
            return {**inputs, "x": change(inputs["x"])}

        return Case(name, make)

    def holds(value: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            x[0, 2, 1] = value
            return x

        return change

    return (
        case("plain", (2, 6, 64)),
        case("two_pieces", (2, 3, 160)),
        case("prime", (3, 5, 37)),
        case("one_channel", (2, 3, 1)),
        case("one_row", (1, 1, 48)),
        case("no_rows_axis", (3, 40)),
        case("image", (2, 3, 4, 24)),
        case("many_rows", (2, 67, 12)),
        case("batch_0", (0, 5, 16)),
        case("parameters_fp32", (2, 5, 40), dtype=torch.float32),
        case("large_mean", (2, 4, 96), mean=1000.0),
        case("huge", (2, 4, 32), scale=1e4),
        case("tiny", (2, 4, 32), scale=1e-3),
        changed("constant", (2, 3, 37), lambda x: torch.full_like(x, 0.3)),
        changed("transposed", (2, 5, 24), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        changed("offset_view", (2, 3, 40), _offset_view),
        changed("holds_nan", (2, 4, 16), holds(float("nan"))),
        changed("holds_inf", (2, 4, 16), holds(float("inf"))),
        *(case(name, shape, model=True) for name, shape in models.items()),
    )


def _offset_view(x: Tensor) -> Tensor:
    """x starts one element into its storage, so that no wide load is aligned."""
    view = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return view.copy_(x)
