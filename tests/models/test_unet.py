"""KolorsUNet against diffusers' UNet2DConditionModel, weights copied by state dict."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_fast.models.unet import KolorsUNet

# the smallest model of the family: two levels, attention on the lower one
SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
THREE_LEVELS: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (8, 12, 20),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 3, 5),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "three levels": THREE_LEVELS,  # concats 40, 32, 24, 20, 16: groups straddle the seam of 20+12 and 12+8
    "mixed layers": {**THREE_LEVELS, "layers_per_block": (1, 2, 1), "transformer_layers_per_block": 1},
    "nine inputs": {**SMALL, "in_channels": 9, "out_channels": 3, "norm_eps": 1e-4},
    "attention everywhere": {
        **THREE_LEVELS,
        "block_out_channels": (8, 16, 12),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sine first": {**SMALL, "flip_sin_to_cos": False, "freq_shift": 1, "norm_num_groups": 1},
}
KOLORS: dict[str, Any] = {
    **{k: v for k, v in THREE_LEVELS.items() if k.endswith("_types")},
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 5632,
    "use_linear_projection": True,
}


def pair(config: dict[str, Any]) -> tuple[KolorsUNet, diffusers.UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    ours = KolorsUNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(config: dict[str, Any], batch: int = 2, size: tuple[int, int] = (8, 8), text: int = 7) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(batch, config["in_channels"], *size),
        "timestep": 613,
        "encoder_hidden_states": torch.randn(batch, text, config["encoder_hid_dim"]),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, config["encoder_hid_dim"]),
            "time_ids": torch.randint(0, 2048, (batch, 6)).float(),
        },
    }


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


@torch.no_grad()
def assert_same(models: tuple[KolorsUNet, diffusers.UNet2DConditionModel], **arguments: Any) -> None:
    ours, theirs = models
    lists = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}  # theirs pops from lists
    got, want = ours(**arguments).sample, theirs(**lists).sample
    assert_close(got, want)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "size"), [(2, (8, 8)), (3, (7, 10)), (1, (5, 13))])
def test_matches_diffusers(name: str, batch: int, size: tuple[int, int]) -> None:
    config = CONFIGS[name]
    config.setdefault("in_channels", 4)
    assert_same(pair(config), **inputs(config, batch, size))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys_in_order(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.attn_processors) == list(theirs.attn_processors)
