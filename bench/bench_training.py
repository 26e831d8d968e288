"""One training step of Kolors' UNet: ours beside diffusers eager and under torch.compile.

    pytest bench/bench_training.py --benchmark-only

A step is the noise-prediction loss of a batch, its backward pass, clipping to a norm of 1 and AdamW: torch's
`clip_grad_norm_` and fused AdamW behind diffusers' model, the trainer's `clipped_step` behind ours. The providers begin
with the same weights and must agree on the losses of two steps. diffusers
reads the captions as its pipeline makes them, 256 states with pads; ours as the trainer's data has them, the equal pads
as one key with a bias. Latents and text features are given. "selective" and "full" are ours under
`checkpoint_activations`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_models import KOLORS_UNET, REAL_TOKENS, SMALL_UNET
from torch import Tensor, nn

from kolors_fast import KolorsUNet
from kolors_fast.models.unet_conditioning import collapse_pads
from kolors_fast.training.activation_checkpointing import checkpoint_activations
from kolors_fast.training.parallel import World
from kolors_fast.training.update import clipped_step

diffusers = pytest.importorskip("diffusers", reason="the rival is diffusers, which is not installed")

PROVIDERS = ("diffusers", "diffusers_compile", "kolors_fast", "kolors_fast_selective", "kolors_fast_full")
BATCH = 4


def _batch(config: dict[str, Any], side: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = config["encoder_hid_dim"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(device, dtype)

    text = normal(256, width)
    text[:, : 256 - REAL_TOKENS] = text[:, :1]
    sizes = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * BATCH, device=device)
    return {
        "sample": normal(4, side, side),
        "noise": normal(4, side, side),
        "timestep": torch.tensor([10, 300, 600, 1000], device=device),
        "text": text,
        "pooled": normal(width),
        "sizes": sizes,
    }


Update = Callable[[torch.optim.Optimizer, list[nn.Parameter]], None]


def _torchs(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _ours(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    clipped_step(optimizer, 1.0, World(device=parameters[0].device))


def _stepping(
    model: nn.Module, batch: dict[str, Tensor], text: Tensor, update: Update = _torchs, **options: Any
) -> Callable[[], Tensor]:
    """What makes one update and returns the loss."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    added = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]}

    def step() -> Tensor:
        (predicted,) = model(
            batch["sample"], batch["timestep"], text, added_cond_kwargs=added, return_dict=False, **options
        )
        loss = F.mse_loss(predicted.float(), batch["noise"].float())
        loss.backward()
        update(optimizer, parameters)
        optimizer.zero_grad()
        return loss.detach()

    return step


def _line_up(config: dict[str, Any], side: int, device: str, dtype: torch.dtype, selected: set[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = _batch(config, side, device, dtype)
    with torch.device(device):
        rival = diffusers.UNet2DConditionModel(**config).to(dtype)
    weights = {name: value.clone() for name, value in rival.state_dict().items()}

    def theirs() -> Callable[[], Tensor]:
        return _stepping(rival, batch, batch["text"])

    def compiled() -> Callable[[], Tensor]:
        torch.compiler.reset()
        with torch.device(device):
            other = diffusers.UNet2DConditionModel(**config).to(dtype)
        other.load_state_dict(weights)
        return _stepping(torch.compile(other), batch, batch["text"])

    def ours(activations: str = "all") -> Callable[[], Tensor]:
        with torch.device("meta"):
            model = KolorsUNet(**config)
        if activations != "all":
            checkpoint_activations(model, activations)
        model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        collapsed = collapse_pads(batch["text"])
        assert collapsed is not None
        return _stepping(model.requires_grad_(), batch, collapsed[0], _ours, encoder_key_bias=collapsed[1])

    made: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "diffusers": theirs,
        "diffusers_compile": compiled,
        "kolors_fast": ours,
        "kolors_fast_selective": lambda: ours("selective"),
        "kolors_fast_full": lambda: ours("full"),
    }
    steps = {name: make() for name, make in made.items() if name in selected or name == "diffusers"}
    first = None
    for step in steps.values():
        with torch.enable_grad():
            losses = torch.stack([step(), step()])
        first = losses if first is None else first
        slack = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(losses, first, rtol=slack, atol=slack)
    return {name: (step, None) for name, step in steps.items() if name in selected}


def line_up_of(device: str, selected: set[str]) -> dict[str, Any]:
    config, side, dtype = (SMALL_UNET, 32, torch.float32) if device == "cpu" else (KOLORS_UNET, 128, torch.bfloat16)
    return _line_up(config, side, device, dtype, selected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(race: Any, provider: str, device: str, selected: set[str]) -> None:
    what = "33M, latent 32x32" if device == "cpu" else "Kolors 2.58B, 1024x1024"
    dtype = "float32" if device == "cpu" else "weights, gradients and moments in bfloat16"
    group = f"training step, {what}, batch {BATCH}, {REAL_TOKENS} of 256 text tokens, {dtype}"
    race(group, provider, lambda: line_up_of(device, selected), rounds=7, grad=True, memory=True)
