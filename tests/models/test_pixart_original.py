"""PixArt's own files: every key against the released layout, what is computed against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_fast import PixArtTransformer
from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.models.pixart_original import from_original, to_original

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
}


def original_state(sizes: bool) -> dict[str, Tensor]:
    """A random checkpoint, its keys written out from the released code: width 24, captions 10 wide."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 16, 24), "y_embedder.y_embedding": (5, 10)}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("x_embedder.proj", 24, 4, 2, 2)
    layer("t_embedder.mlp.0", 24, 256)
    layer("t_embedder.mlp.2", 24, 24)
    layer("t_block.1", 144, 24)
    layer("y_embedder.y_proj.fc1", 24, 10)
    layer("y_embedder.y_proj.fc2", 24, 24)
    for name in ("csize_embedder", "ar_embedder") if sizes else ():
        layer(f"{name}.mlp.0", 8, 256)
        layer(f"{name}.mlp.2", 8, 8)
    for i in range(2):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, 24)
        layer(f"blocks.{i}.attn.qkv", 72, 24)
        layer(f"blocks.{i}.attn.proj", 24, 24)
        layer(f"blocks.{i}.cross_attn.q_linear", 24, 24)
        layer(f"blocks.{i}.cross_attn.kv_linear", 48, 24)
        layer(f"blocks.{i}.cross_attn.proj", 24, 24)
        layer(f"blocks.{i}.mlp.fc1", 96, 24)
        layer(f"blocks.{i}.mlp.fc2", 24, 96)
    shapes["final_layer.scale_shift_table"] = (2, 24)
    layer("final_layer.linear", 32, 24)
    return {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}


def diffusers_state(state: dict[str, Tensor], sizes: bool) -> dict[str, Tensor]:
    """The same for diffusers, by the table of its own conversion script."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }
    if sizes:
        for new, old in (("resolution", "csize"), ("aspect_ratio", "ar")):
            names[f"adaln_single.emb.{new}_embedder.linear_1"] = f"{old}_embedder.mlp.0"
            names[f"adaln_single.emb.{new}_embedder.linear_2"] = f"{old}_embedder.mlp.2"
    found = {"scale_shift_table": state["final_layer.scale_shift_table"]}
    for i in range(2):
        new, old = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{new}.attn1.to_out.0": f"{old}.attn.proj",
            f"{new}.attn2.to_q": f"{old}.cross_attn.q_linear",
            f"{new}.attn2.to_out.0": f"{old}.cross_attn.proj",
            f"{new}.ff.net.0.proj": f"{old}.mlp.fc1",
            f"{new}.ff.net.2": f"{old}.mlp.fc2",
        }
        found[f"{new}.scale_shift_table"] = state[f"{old}.scale_shift_table"]
        for kind in ("weight", "bias"):
            qkv, kv = state[f"{old}.attn.qkv.{kind}"], state[f"{old}.cross_attn.kv_linear.{kind}"]
            for row, letter in enumerate("qkv"):
                found[f"{new}.attn1.to_{letter}.{kind}"] = qkv[24 * row : 24 * row + 24]
            for row, letter in enumerate("kv"):
                found[f"{new}.attn2.to_{letter}.{kind}"] = kv[24 * row : 24 * row + 24]
    for new, old in names.items():
        for kind in ("weight", "bias"):
            found[f"{new}.{kind}"] = state[f"{old}.{kind}"]
    return found


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 10),
        "timestep": torch.tensor([3, 613]),
        "added_cond_kwargs": {"resolution": torch.rand(2, 2) * 900, "aspect_ratio": torch.rand(2, 1)},
    }


@pytest.mark.parametrize("sizes", [False, True])
@torch.no_grad()
def test_files_travel_both_ways(sizes: bool, tmp_path: Path) -> None:
    state = original_state(sizes)
    theirs = diffusers.PixArtTransformer2DModel(**CONFIG, use_additional_conditions=sizes).eval()
    theirs.load_state_dict(diffusers_state(state, sizes))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
    ours = PixArtTransformer.from_single_file(tmp_path / "theirs.pth", sample_size=8, num_attention_heads=3)
    assert not ours.training
    assert {**CONFIG, "use_additional_conditions": sizes}.items() <= ours.config.items()
    got, want = ours(**inputs()).sample, theirs(**inputs()).sample
    assert (got - want).abs().max() < 2e-6 * want.abs().max()

    ours.save_pretrained(tmp_path / "folder")  # whatever lies where
    ours.save_single_file(tmp_path / "new" / "ours.pth")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ours.pth"]
    saved = torch.load(tmp_path / "new" / "ours.pth", weights_only=True)["state_dict"]
    assert saved.keys() == state.keys() - {"pos_embed"}
    assert all(torch.equal(value, state[key]) for key, value in saved.items())
    folder = PixArtTransformer.from_pretrained(tmp_path / "folder")
    assert torch.equal(folder(**inputs()).sample, got)
    assert folder.null_caption is None
    back = from_original(to_original(ours.state_dict()))
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_forms_of_a_file(tmp_path: Path) -> None:
    state, averaged = original_state(False), {k: v + 1 for k, v in original_state(False).items()}
    file = tmp_path / "model.pth"

    def first_bias(**options: Any) -> Tensor:
        model = PixArtTransformer.from_single_file(file, sample_size=8, num_attention_heads=3, **options)
        assert model.null_caption is not None
        return model.proj_out.bias.float()

    bias = state["final_layer.linear.bias"]
    torch.save(state, file)
    assert torch.equal(first_bias(), bias)
    torch.save({"state_dict_ema": averaged}, file)
    assert torch.equal(first_bias(), bias + 1)
    torch.save({"state_dict_ema": averaged, "state_dict": state}, file)
    assert torch.equal(first_bias(), bias)
    assert torch.equal(first_bias(ema=True), bias + 1)
    assert torch.equal(first_bias(torch_dtype=torch.bfloat16), bias.bfloat16().float())


@torch.no_grad()
def test_the_null_caption_stays(tmp_path: Path) -> None:
    state = original_state(False)
    torch.save(state, tmp_path / "model.pth")
    options: dict[str, Any] = {"sample_size": 8, "num_attention_heads": 3}
    model = PixArtTransformer.from_single_file(tmp_path / "model.pth", **options, torch_dtype=torch.float16)
    assert model.null_caption is not None
    assert torch.equal(model.null_caption, state["y_embedder.y_embedding"])
    model.null_caption = None
    model.save_single_file(tmp_path / "without.pth")
    assert PixArtTransformer.from_single_file(tmp_path / "without.pth", **options).null_caption is None


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in original_state(False).items() if not k.startswith(key)}


def with_(key: str) -> dict[str, Tensor]:
    return {**original_state(False), key: torch.zeros(24)}


REFUSED: dict[str, tuple[Any, str]] = {
    "compressed": (with_("blocks.1.attn.sr.weight"), r"keys and values are compressed \('blocks.1.attn.sr.weight'\)"),
    "normalised": (with_("blocks.1.attn.q_norm.weight"), "hold 'blocks.1.attn.q_norm.weight', unknown to PixArtTransf"),
    "an MM-DiT": (
        {"joint_blocks.0.x_block.mlp.fc1.bias": torch.zeros(3)},
        "no PixArt .* lacks 'x_embedder.proj.weight'",
    ),
    "diffusers'": (
        {"transformer_blocks.0.attn1.to_q.bias": torch.zeros(3)},
        "has 'transformer_blocks.0.attn1.to_q.bia",
    ),
    "empty": ({}, "has no key"),
    "incomplete": (without("blocks.1.mlp.fc2"), "lack 'transformer_blocks.1.ff.net.2.weight'"),
    "a hole": (without("blocks.0.mlp"), "lack 'transformer_blocks.0.ff.net.0.proj.weight'"),
    "a list": ([torch.zeros(3)], "must hold a dict of tensors, by itself or under one of state_dict, state_dict_ema"),
    "an object": ({"state_dict": original_state}, "is truncated or not a file of plain tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        PixArtTransformer.from_single_file(tmp_path / "model.pth", sample_size=8, num_attention_heads=3)


def test_missing_and_mismatched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the file .*none.pth is missing"):
        PixArtTransformer.from_single_file(tmp_path / "none.pth", sample_size=8)
    torch.save(original_state(False), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="num_attention_heads: expected a divisor of 24, got 5"):
        PixArtTransformer.from_single_file(tmp_path / "model.pth", sample_size=8, num_attention_heads=5)
    torch.save({**original_state(False), "t_block.1.bias": torch.zeros(24)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"adaln_single.linear.bias \(expected \(144,\), got \(24,\)\)"):
        PixArtTransformer.from_single_file(tmp_path / "model.pth", sample_size=8, num_attention_heads=3)
