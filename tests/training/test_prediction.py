"""What a stage can ask for: velocities, offset noise, precisions, checkpointed activations; and gradients of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from kolors_fast import without
from kolors_fast.models.layers import ResnetBlock
from kolors_fast.models.mmdit_blocks import JointAttention
from kolors_fast.models.unet_blocks import FeedForward
from kolors_fast.training.config import RecipeError
from kolors_fast.training.objectives import add_noise, draw_timesteps, with_offset
from kolors_fast.training.streams import Streams
from kolors_fast.training.trainer import Trainer

from .tiny import OBJECTIVES, make

STEP = 3


def drawn(objective: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and timesteps of a step."""
    stage = objective.stage
    batch = objective.pool.draw(STEP, stage.batch, stage.caption_dropout, objective.streams)
    generator = objective.streams.torch(STEP)
    return batch.latents, batch.noise, draw_timesteps(stage.batch, stage.train_steps, 1.0, 1.0, generator)


def answering(objective: Any, answer: Any) -> None:
    """Puts `answer(noisy, timesteps)` in the place of the model's."""
    objective.predict = lambda module, noisy, timesteps, texts, time_ids: answer(noisy, timesteps)


def test_velocities_are_those_of_diffusers() -> None:
    _, one = make("epsilon", prediction="v", snr_gamma=0.0)
    latents, noise, timesteps = drawn(one)
    scheduler = DDPMScheduler(1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear")
    answering(one, lambda noisy, t: torch.zeros_like(noisy))
    expected = scheduler.get_velocity(latents, noise, timesteps).square().mean()
    assert float(one.loss(STEP)) == pytest.approx(float(expected), rel=1e-5)


def test_the_same_picture_has_the_same_loss_as_noise_and_as_velocity() -> None:
    losses = []
    for prediction in ("epsilon", "v"):
        _, one = make("epsilon", prediction=prediction, snr_gamma=5.0)
        latents, noise, timesteps = drawn(one)
        signal = one.alpha_bar[timesteps]  # type: ignore[attr-defined]
        guess = noise + 0.1 * latents.roll(1, 0)
        noisy = add_noise(latents, noise, signal)
        root = signal.sqrt().view(-1, 1, 1, 1)
        velocity = (guess - (1 - signal).sqrt().view(-1, 1, 1, 1) * noisy) / root
        answering(one, lambda z, t, made=guess if prediction == "epsilon" else velocity: made)
        losses.append(float(one.loss(STEP)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 1e-3


def test_another_prediction_is_refused() -> None:
    with pytest.raises(RecipeError, match="prediction: expected 'epsilon' or 'v', got 'x'"):
        make("epsilon", prediction="x")


def test_an_offset_is_shared_by_a_picture_s_channel_and_by_nothing_else() -> None:
    streams = Streams(0, "stage")
    noise = streams.noise(0, 400, (4, 8, 8))
    assert with_offset(noise, 0.0, streams, 0) is noise
    added = with_offset(noise, 0.5, streams, 0) - noise
    assert torch.allclose(added, added.mean((2, 3), keepdim=True).expand_as(added), atol=1e-6)
    shared = added[:, :, 0, 0]
    assert float(shared.std()) == pytest.approx(0.5, rel=4 / 1600**0.5)
    assert abs(float(torch.corrcoef(torch.stack([shared.flatten(), noise[:, :, 0, 0].flatten()]))[0, 1])) < 0.1
    parts = [
        with_offset(part.noise(0, 400, (4, 8, 8)), 0.5, part, 0)
        for part in (Streams(0, "stage", rank, 2) for rank in range(2))
    ]
    assert torch.equal(torch.cat(parts), noise + added) or torch.allclose(torch.cat(parts), noise + added, atol=1e-6)
    losses = [one.loss(0).detach() for one in (make("epsilon", noise_offset=0.1)[1], make("epsilon")[1])]
    assert losses[0] != losses[1]


def train(folder: Path, name: str, **settings: Any) -> list[float]:
    stage, objective = make(name, **settings)
    trainer = Trainer(stage, objective, folder)
    return [float(trainer.train_step()) for _ in range(4)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_precisions_and_activations_train_alike(tmp_path: Path, name: str) -> None:
    plain = train(tmp_path, name)
    assert train(tmp_path, name, activations="selective") == pytest.approx(plain, rel=1e-5)
    with without("products"):  # of which torch's are what a recomputing region sees
        assert train(tmp_path, name, activations="selective") == train(tmp_path, name)
    assert train(tmp_path, name, activations="full") == pytest.approx(plain, rel=1e-4)
    for precision, slack in (("bf16", 3e-2), ("fp16", 1e-2)):
        for activations in ("all", "selective"):
            losses = train(tmp_path, name, precision=precision, activations=activations)
            # Adam's first steps are of full size, whatever the gradient's: rounding soon shows
            assert losses[:2] == pytest.approx(plain[:2], rel=slack) and losses != plain


BLOCKS: dict[str, Any] = {
    "ResnetBlock with a skip": (
        lambda: ResnetBlock(6, 4, time_dim=5, num_groups=2, eps=1e-5),
        ((1, 4, 3, 3), (1, 4), (1, 2, 3, 3)),
    ),
    "FeedForward": (lambda: FeedForward(4), ((1, 3, 4),)),
    "JointAttention": (lambda: JointAttention(8, 2, last=False), ((1, 3, 8), (1, 2, 8))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_blocks_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    build, shapes = BLOCKS[name]
    block: nn.Module = build().double()
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    parameters = [p for p in block.parameters() if p.numel() <= 16]
    assert parameters
    assert torch.autograd.gradcheck(lambda *given: block(*given[: len(inputs)]), (*inputs, *parameters))
