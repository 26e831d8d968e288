"""Training of adapters: where they begin, their gradients, and that nothing else moves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kolors_fast import KolorsUNet, MMDiT, PixArtTransformer
from kolors_fast.models.lora_adapter import load_lora, lora_of, save_lora
from kolors_fast.training.lora import LoRAConfig, add_lora, narrow_frozen
from kolors_fast.training.trainer import Trainer

from . import tiny

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
}
MMDIT: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "unet": (KolorsUNet, UNET, ("ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj", "proj_in")),
    "mmdit": (MMDiT, MMDIT, ("add_k_proj", "norm1.linear", "ff_context.net.0.proj", "context_embedder")),
    "pixart": (PixArtTransformer, PIXART, ("ff.net.2", "linear_1", "pos_embed.proj")),
}


def make(name: str = "unet") -> nn.Module:
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    return kind(**config).double().train()


def inputs(name: str = "unet") -> dict[str, Any]:
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 10).double()
    if name == "unet":
        added = {"text_embeds": torch.randn(2, 10).double(), "time_ids": torch.randint(0, 2048, (2, 6)).float()}
        return {"sample": latents, "timestep": 613, "encoder_hidden_states": text, "added_cond_kwargs": added}
    shared = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([30, 990])}
    if name == "mmdit":
        return {**shared, "pooled_projections": torch.randn(2, 7).double()}
    return {**shared, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def loss(model: nn.Module, name: str, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """The square of the distance to a fixed prediction."""
    arguments = inputs(name)
    got = functional_call(model, parameters or {}, (), arguments).sample
    return (got - torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)).square().mean()


def train(model: nn.Module, name: str, parameters: list[nn.Parameter], steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, name)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_move_the_adapter_alone_by_the_gradients_of_a_sum(name: str) -> None:
    """Against a plain model whose weights are W + (alpha / rank) B A, all in float64."""
    model, plain = make(name), make(name)
    config = LoRAConfig(rank=3, alpha=2.0, targets=(*LoRAConfig().targets, *MODELS[name][2]))
    parameters = add_lora(model, config, dtype=torch.float64)
    with torch.no_grad():
        assert abs(loss(model, name) - loss(plain, name)) <= 1e-12 * loss(plain, name)  # it does nothing yet
    before = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    losses = train(model, name, parameters)
    assert losses[-1] < 0.9 * losses[0]
    after = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))
    assert all(p.grad is not None for p in parameters)

    for parameter in parameters:
        parameter.grad = None
    loss(model, name).backward()
    leaves, weights = [], {}
    for path, lora in lora_of(model).items():
        down, up = (one.detach().clone().requires_grad_() for one in (lora.down, lora.up))
        weight = plain.get_submodule(path).weight.detach()
        weights[f"{path}.weight"] = weight + 2 / 3 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        leaves += [down, up]
    loss(plain, name, weights).backward()
    for leaf, parameter in zip(leaves, parameters, strict=True):
        assert parameter.grad is not None and leaf.grad is not None
        assert (parameter.grad - leaf.grad).abs().max() <= 1e-10 * leaf.grad.abs().max()
        assert leaf.grad.abs().max() > 0


def test_a_saved_adapter_trains_on(tmp_path: Path) -> None:
    """Loaded into another model it has the weights, and the next step, of the one that was saved."""
    model, other, file = make(), make(), tmp_path / "lora.safetensors"
    parameters = add_lora(model, LoRAConfig(), dtype=torch.float64)
    train(model, "unet", parameters, steps=3)
    save_lora(model, file, base_model="Kwai-Kolors/Kolors-diffusers")
    loaded = load_lora(other, file, None)
    assert all(torch.equal(a, b) for a, b in zip(loaded, parameters, strict=True))
    assert train(other, "unet", loaded, steps=2) == train(model, "unet", parameters, steps=2)


# ---- where an adapter begins


def test_the_seed_alone_tells_the_first_weights() -> None:
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        model = make().half() if number else make()
        torch.manual_seed(number)
        state = torch.get_rng_state()
        add_lora(model, LoRAConfig(rank=8), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(lora_of(model))
    first, again, other = drawn
    assert len(first) == 4 * 2 * 4  # of two attentions each: down, twice up and mid
    for path, lora in first.items():
        assert lora.alpha == 8
        assert lora.down.dtype == lora.up.dtype == torch.float32
        assert torch.equal(lora.down, again[path].down)
        assert not torch.equal(lora.down, other[path].down)
        assert not lora.up.any()
        bound = lora.down.shape[1] ** -0.5
        assert 0.7 * bound < lora.down.abs().max() <= bound


def test_targets_are_whole_names_at_the_ends_of_paths() -> None:
    def paths(*targets: str) -> list[str]:
        model = make()
        add_lora(model, LoRAConfig(targets=targets))
        return list(lora_of(model))

    block = "mid_block.attentions.0.transformer_blocks.0"
    assert paths(f"{block}.attn1.to_q") == [f"{block}.attn1.to_q"]
    assert len(paths("to_q")) == 2 * len(paths("attn2.to_q"))
    assert paths("conv_in", "conv_out") == ["conv_in", "conv_out"]
    assert paths("conv_out", "conv_in") == ["conv_in", "conv_out"]


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("to_g", "'to_v', 'to_q', 'to_k'"),
        ("to_out", "'to_out.0', "),
        ("attn1", "'attn1.to_"),
        ("o_q", "'to_q', "),
        ("query", ""),
        ("attn1.to_qq", "'attn1.to_q', "),
    ],
)
def test_unknown_targets_are_told_the_nearest(target: str, near: str) -> None:
    model = make()
    message = f"targets: expected ends of paths of linear layers and convolutions of KolorsUNet, such as {near}"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*, got '{target}'"):
        add_lora(model, LoRAConfig(targets=("to_v", target)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_configs() -> None:
    for arguments, message in (
        ({"rank": 0}, "rank: expected 1 or more, got 0"),
        ({"alpha": 0.0}, "alpha: expected more than 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha: expected more than 0, got nan"),
        ({"targets": ()}, "targets: expected one or more, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["epsilon", "rectified_flow", "learned_variance"])
def test_frozen_weights_in_autocasts_dtype_change_no_bit(tmp_path: Path, name: str) -> None:
    """Of linear layers and convolutions, which are nearly all of a model's bytes."""

    def train(narrow: bool) -> tuple[list[float], list[Tensor]]:
        stage, objective = tiny.make(name, precision="bf16", lora=LoRAConfig(rank=4, targets=("to_q", "net.2")))
        add_lora(objective.module, stage.lora, seed=5)
        whole = sum(p.nbytes for p in objective.module.parameters() if not p.requires_grad)
        if narrow:
            narrow_frozen(objective.module, torch.bfloat16)
            left = [p for p in objective.module.parameters() if not p.requires_grad]
            assert sum(p.nbytes for p in left) < 0.55 * whole
            assert all(p.dtype == torch.float32 for p in objective.module.parameters() if p.requires_grad)
        one = Trainer(stage, objective, tmp_path)
        losses = [float(one.train_step()) for _ in range(4)]
        return losses, [p.detach() for p in objective.module.parameters() if p.requires_grad]

    (losses, adapter), (expected, other) = train(True), train(False)
    assert losses == expected and all(map(torch.equal, adapter, other))
