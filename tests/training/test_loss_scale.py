"""One gradient scale for all: torch.amp.GradScaler's rule, and the updates that it, clip_grad_norm_ and AdamW make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_fast.training.config import AutoencoderStage, RecipeError, Stage
from kolors_fast.training.parallel import World
from kolors_fast.training.trainer import Trainer, computing_in
from kolors_fast.training.update import LossScale, clipped_step

from .tiny import make

CPU = torch.device("cpu")


def grad_scaler_after(gradients: list[float]) -> list[tuple[float, int]]:
    """Scale and growth tracker of torch's after each of these gradients."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler, found = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu"), []
    scaler.scale(torch.zeros(()))
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient])
        scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return found


def test_scale_and_tracker_are_those_of_torch() -> None:
    infinite = {0, 1, 700, 2700, 2701}  # 1999 finite ones after 700, twice 2000 after 2701
    gradients = [float("inf") if n in infinite else 1.0 for n in range(7000)]
    ours, found = LossScale(CPU), []
    for gradient in gradients:
        ours.update(torch.tensor(float(gradient == float("inf"))))
        found.append((float(ours.scale), int(ours.growth_tracker)))
    assert found == grad_scaler_after(gradients)
    assert found[2700][0] == 2.0**12 and found[-1][0] == 2.0**13


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3))

    def loss(self, step: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        with computing_in("fp16"):
            return F.mse_loss(self.layers(x).float(), x[:, :3].sin())


def test_updates_are_those_of_torch() -> None:
    """Twelve, all clipped but the skipped one."""
    ours, theirs = Net(), Net()
    adamw = [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for net in (ours, theirs)]
    scale, scaler = LossScale(CPU), torch.amp.GradScaler("cpu")
    skipped = []
    for step in range(12):
        loss = ours.loss(step)
        assert loss.dtype == torch.float32
        (scale.scale * loss).backward()
        scaler.scale(theirs.loss(step)).backward()
        for net in (ours, theirs):
            if step == 5:
                net.layers[0].weight.grad[3, 2] = float("inf")
        skipped.append(int(clipped_step(adamw[0], 0.05, World(), scale)))
        scaler.unscale_(adamw[1])
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert norm > 0.05
        scaler.step(adamw[1])
        scaler.update()
        for optimizer in adamw:
            optimizer.zero_grad()
        assert float(scale.scale) == scaler.get_scale()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # clipping divides once, or rounds in between
    assert skipped == [0] * 5 + [1] + [0] * 6
    assert float(scale.scale) == 2.0**15


# ---- in the trainer

STEPS = 6


def trainer(folder: Path, name: str, precision: str = "fp16") -> Trainer:
    stage, objective = make(name, precision=precision, gradient_scale="global" if precision == "fp16" else "block")
    return Trainer(stage, objective, folder)


def test_a_resumed_run_keeps_scale_and_tracker(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> Trainer:
        one = trainer(folder, "rectified_flow")
        one._resume()
        while one.step < steps:
            if one.step == 1:
                weight = one.module.transformer_blocks[0].ff.net[2].weight
                handle = weight.register_hook(lambda grad: grad * float("inf"))
            one.train_step()
            if one.step == 2:
                handle.remove()
            if one.step == 4:
                one.save()
        return one

    whole = train(tmp_path / "whole", STEPS)
    train(tmp_path / "resumed", 4)
    resumed = train(tmp_path / "resumed", STEPS)
    for one in (whole, resumed):
        assert one.loss_scale is not None
        assert (float(one.loss_scale.scale), int(one.loss_scale.growth_tracker)) == (2.0**15, STEPS - 2)
        assert float(one.skipped) == 1
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["epsilon", "rectified_flow", "learned_variance"])
def test_every_denoiser_trains(tmp_path: Path, name: str) -> None:
    """Losses near those of fp32, and nearer than bf16's, whose mantissa has three bits less."""

    def losses(precision: str) -> Tensor:
        one = trainer(tmp_path / precision, name, precision)
        if one.loss_scale is not None:
            one.loss_scale.scale.fill_(2.0**10)  # at 2^16 epsilon's first four overflow, as the rule means it
        found = torch.stack([one.train_step() for _ in range(STEPS)])
        assert float(one.skipped) == 0
        return found

    exact = losses("fp32")
    half, brain = ((losses(precision) - exact).abs().max() for precision in ("fp16", "bf16"))
    assert 0 < half < brain / 2 and half < 1e-3 * exact.max()


def test_recipes() -> None:
    stage = Stage("stage", "any", 12, 4, 1e-2, warmup=2, decay=4, precision="fp16", gradient_scale="global")
    assert stage.autocast == "fp16"
    assert make("epsilon", precision="fp16")[0].autocast == "fp32"
    with pytest.raises(RecipeError, match="gradient_scale: expected 'block' or 'global', got 'none'"):
        replace(stage, gradient_scale="none")
    with pytest.raises(RecipeError, match="expected 'global' only with precision 'fp16', got it with 'bf16'"):
        replace(stage, precision="bf16")
    with pytest.raises(RecipeError, match="precision: expected one of fp32, bf16, got 'fp16'"):
        AutoencoderStage("stage", "autoencoder", 12, 4, 1e-2, warmup=2, decay=4, precision="fp16")
