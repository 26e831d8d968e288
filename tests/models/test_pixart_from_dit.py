"""PixArt's start from a class-conditional DiT, against diffusers' DiTTransformer2DModel without its class embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_fast import PixArtTransformer
from kolors_fast.models.checkpoint import CheckpointError

DEPTH, DIM, HEADS = 3, 32, 4


def dit_state() -> dict[str, Tensor]:
    """A random DiT with the keys of the released files, for 8 x 8 latents."""
    torch.manual_seed(0)
    shapes = {
        "x_embedder.proj": (DIM, 4, 2, 2), "t_embedder.mlp.0": (DIM, 256), "t_embedder.mlp.2": (DIM, DIM),
        "final_layer.linear": (32, DIM), "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    }  # fmt: skip
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * DIM, DIM), f"blocks.{i}.attn.proj": (DIM, DIM),
            f"blocks.{i}.mlp.fc1": (4 * DIM, DIM), f"blocks.{i}.mlp.fc2": (DIM, 4 * DIM),
            f"blocks.{i}.adaLN_modulation.1": (6 * DIM, DIM),
        }  # fmt: skip
    state = {"pos_embed": torch.zeros(1, 16, DIM), "y_embedder.embedding_table.weight": torch.randn(11, DIM)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape) * 0.3, f"{name}.bias": torch.randn(shape[0]) * 0.3}
    return state


def theirs_of(state: dict[str, Tensor]) -> diffusers.DiTTransformer2DModel:
    """With a class embedding of zero."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, num_layers=DEPTH, sample_size=8,
        num_embeds_ada_norm=10, norm_eps=1e-6, out_channels=8,
    ).eval()  # fmt: skip
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    found = {}
    for i in range(DEPTH):
        new, old = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{new}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{new}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{new}.norm1.linear": f"{old}.adaLN_modulation.1",
            f"{new}.attn1.to_out.0": f"{old}.attn.proj",
            f"{new}.ff.net.0.proj": f"{old}.mlp.fc1",
            f"{new}.ff.net.2": f"{old}.mlp.fc2",
        }
        found[f"{new}.norm1.emb.class_embedder.embedding_table.weight"] = torch.zeros(11, DIM)
        for kind in ("weight", "bias"):
            for letter, rows in zip("qkv", state[f"{old}.attn.qkv.{kind}"].split(DIM), strict=True):
                found[f"{new}.attn1.to_{letter}.{kind}"] = rows
    found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in names.items() for kind in ("weight", "bias")}
    model.load_state_dict(found)
    for block in model.transformer_blocks:  # diffusers has 1 here; facebookresearch/DiT divides by half the width
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def both(ours: PixArtTransformer, timestep: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    sample, captions = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 10)
    steps = torch.tensor([timestep] * 2)
    with torch.no_grad():
        want = theirs_of(dit_state())(sample, steps, class_labels=torch.tensor([0, 3])).sample
        return ours(sample, captions, steps).sample, want


def start(**options: Any) -> PixArtTransformer:
    given = {"caption_channels": 10, "num_attention_heads": HEADS, **options}
    return PixArtTransformer.from_dit(dit_state(), **given)


@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_dit_at_500_for_any_caption(seed: int) -> None:
    got, want = both(start(), 500, seed)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_differs_at_other_timesteps(timestep: int) -> None:
    got, want = both(start(), timestep)
    assert (got - want).abs().max() > 1e-3 * want.abs().max()


def test_what_a_dit_leaves_open() -> None:
    ours = start()
    assert ours.config.sample_size == 8
    assert ours.config.out_channels == 8
    assert not ours.has_sizes
    assert not any(p.abs().max() for b in ours.transformer_blocks for p in b.attn2.to_out.parameters())
    assert ours.transformer_blocks[1].attn2.to_k.weight.std() > 0.1  # Xavier-uniform: sqrt(2 / (2 * 32)) = 0.18
    again, other = (start(generator=torch.Generator().manual_seed(seed)) for seed in (7, 8))
    same = start(generator=torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), same.parameters(), strict=True))
    assert not torch.equal(again.transformer_blocks[0].attn2.to_k.weight, other.transformer_blocks[0].attn2.to_k.weight)
    assert start(sample_size=16).pos_embed.base_size == 8


def test_files(tmp_path: Path) -> None:
    for content in (dit_state(), {"ema": dit_state(), "model": {}}):
        torch.save(content, tmp_path / "dit.pt")
        ours = PixArtTransformer.from_dit(tmp_path / "dit.pt", caption_channels=10, num_attention_heads=HEADS)
        got, want = both(ours, 500)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def changed(**changes: Any) -> dict[str, Tensor]:
    state = {**dit_state(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


REFUSED = {
    "incomplete": (
        changed(blocks__1__mlp__fc2__bias=None),
        "no class-conditional DiT: it lacks 'blocks.1.mlp.fc2.bias'",
    ),
    "without networks": (changed(final_layer__adaLN_modulation__1__weight=None), "lacks 'final_layer.adaLN_modulation"),
    "a PixArt": (
        changed(t_block__1__weight=torch.zeros(1)),
        "the state dict is no .* DiT: it holds 't_block.1.weight'",
    ),
    "empty": ({}, "lacks 'x_embedder.proj.weight', .* and 17 more"),
    "another shape": (
        changed(x_embedder__proj__bias=torch.zeros(3)),
        r"pos_embed.proj.bias \(expected \(32,\), got \(3,",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name: str) -> None:
    state, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        PixArtTransformer.from_dit(state, caption_channels=10, num_attention_heads=HEADS)


def test_what_a_state_dict_does_not_tell() -> None:
    with pytest.raises(ValueError, match="sample_size: expected a number, for the state dict has no position table"):
        PixArtTransformer.from_dit(changed(pos_embed=None), caption_channels=10, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="num_attention_heads: expected a divisor of 32, got 5"):
        start(num_attention_heads=5)


# ---- fresh weights


def test_fresh_weights() -> None:
    model = PixArtTransformer(
        num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96, num_layers=2, caption_channels=64,
        sample_size=8, use_additional_conditions=True,
    )  # fmt: skip
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name == "proj_out.weight" or "attn2.to_out" in name or name.endswith("bias"):
            want = 0.0
        elif "table" in name:
            want = 96**-0.5
        elif name.startswith(("adaln_single", "caption_projection")):
            want = 0.02
        else:
            inputs, outputs = parameter[0].numel(), len(parameter)
            want = (2 / (inputs + outputs)) ** 0.5
        assert abs(float(parameter.detach().std()) - want) <= 0.15 * want, name
    with torch.no_grad():
        sizes = {"resolution": torch.rand(1, 2), "aspect_ratio": torch.rand(1, 1)}
        assert not model(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 64), 3, sizes).sample.any()
