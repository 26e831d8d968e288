"""DDPM with the variance that the model predicts, against diffusers' and through the denoising loop."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import kolors_fast.schedulers as ours
from kolors_fast.sampling.denoise import denoise
from kolors_fast.sampling.graphs import StepGraphs

PIXART: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "variance_type": "learned_range", "clip_sample": False}
SHAPE = (2, 4, 5, 3)


def model(inputs: Tensor, timestep: Tensor | float) -> Tensor:
    """Noise, and a variance that differs among pixels and goes past its bounds, for each of P parts."""
    parts = inputs.reshape(-1, SHAPE[0], *inputs.shape[1:])
    contexts = torch.tensor([-0.3, 0.4, 0.1], dtype=inputs.dtype)[: len(parts)].reshape(-1, 1, 1, 1, 1)
    noise = torch.tanh(parts) + contexts + float(timestep) / 2000
    return torch.cat([noise, 1.2 * torch.sin(3 * parts + 5 * contexts)], dim=2).flatten(0, 1)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def truth(config: dict[str, Any], steps: int, weights: list[float], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """diffusers in float64, after every step; guidance as DiT does it, on the noise alone."""

    def draw(shape: Any, dtype: torch.dtype, **where: Any) -> Tensor:
        return randn_tensor(shape, dtype=torch.float32, **where).to(dtype)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)
    scheduler = diffusers.DDPMScheduler(**config)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), scheduler.one.double()
    generator, sample, samples = torch.Generator().manual_seed(1), start().double(), []
    for t in scheduler.timesteps:
        predictions = model(torch.cat([sample] * len(weights)), t).chunk(len(weights))
        guided = sum(w * p[:, :4] for w, p in zip(weights, predictions, strict=True))
        output = torch.cat([torch.as_tensor(guided), predictions[-1][:, 4:]], dim=1)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("config", [{}, {"clip_sample": True}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 25, 100])
def test_steps_are_those_of_diffusers(config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**PIXART, **config}
    expected = truth(config, steps, [1.0], monkeypatch)
    scheduler = ours.DDPMScheduler(**config)
    scheduler.set_timesteps(steps)
    generator, before = torch.Generator().manual_seed(1), start().double()
    for t, after in zip(scheduler.timesteps, expected, strict=True):  # each from diffusers' sample
        sample = before.float()
        got = scheduler.step(model(before, t).float(), t, sample, generator=generator).prev_sample
        assert got.shape == SHAPE
        assert (got - after).abs().max() <= 1e-6 * max(float(before.abs().max()), 1.0)
        before = after


@pytest.mark.parametrize("weights", [[1.0], [-3.5, 4.5], [-5.5, 7.5, -1.0]], ids=["one", "guided", "perturbed"])
def test_trajectories_through_the_loop(weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**PIXART, "clip_sample": True}
    expected = truth(config, 25, weights, monkeypatch)
    scheduler = ours.DDPMScheduler(**config)
    scheduler.set_timesteps(25)
    table, seen = scheduler.step_table(), []
    denoise(
        lambda inputs, row: model(inputs, table.timesteps[row]),
        table,
        start(),
        torch.tensor(weights),
        generator=torch.Generator().manual_seed(1),
        callback=lambda row, t, sample: seen.append(sample) or sample,  # type: ignore[func-returns-value]
    )
    for got, want in zip(seen, expected, strict=True):
        assert (got - want).abs().max() <= 1e-5  # float32 rounds at each of the 25 steps


def test_weights_of_each_item_take_the_variance_of_the_item() -> None:
    scheduler = ours.DDPMScheduler(**PIXART)
    scheduler.set_timesteps(10)
    table, weights = scheduler.step_table(), torch.tensor([[-3.0, 0.0], [4.0, 1.0]])
    noise, predictions = torch.randn(2, *SHAPE), model(torch.cat([start()] * 2), 500)
    both = table.advance(4, start(), predictions, weights, noise=noise[0])
    for item in range(2):
        own = predictions[item::2]
        alone = table.advance(
            4, start()[item : item + 1], own, weights[:, item].contiguous(), noise=noise[0, item : item + 1]
        )
        for together, one in zip(both, alone, strict=True):
            assert torch.equal(together[item : item + 1], one)


class Nothing:
    """A plan of nothing but the row."""

    def at(self, row: Any) -> Any:
        return row

    def signature(self) -> Any:
        return None

    def fixed(self) -> Nothing:
        return self

    def load(self, other: Any) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_is_the_eager_one(dtype: torch.dtype) -> None:
    graphs = StepGraphs(nn.Linear(1, 1), record=lambda program: program.run)
    results = []
    for learned in ("learned_range", "fixed_small", "learned_range"):  # a graph of the one must not serve the other
        scheduler = ours.DDPMScheduler(**{**PIXART, "clip_sample": True, "variance_type": learned})
        scheduler.set_timesteps(6)
        table, channels = scheduler.step_table(), 8 if learned == "learned_range" else 4

        def predict(inputs: Tensor, _: Any, channels: int = channels) -> Tensor:
            return model(inputs, 500)[:, :channels]

        pair = [
            denoise(
                lambda inputs, row: predict(inputs, row),
                table,
                start().to(dtype),
                torch.tensor([-3.0, 4.0]),
                generator=torch.Generator().manual_seed(2),
                step=step,
            )
            for step in (
                None,
                lambda row, sample, *rest: graphs.step(predict, Nothing(), table, row, sample, *rest),  # noqa: B023
            )
        ]
        assert torch.equal(*pair)
        results.append(pair[0])
    assert len(graphs) == 2
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_bad_outputs() -> None:
    scheduler = ours.DDPMScheduler(**PIXART)
    scheduler.set_timesteps(4)
    message = r"model_output: expected twice the sample's channels \(2, 8, 5, 3\), got \(2, 4, 5, 3\)"
    with pytest.raises(ValueError, match=message):
        scheduler.step(start(), scheduler.timesteps[0], start())
    table = scheduler.step_table()
    with pytest.raises(ValueError, match="predictions: expected 8 channels, noise and variance, got 4"):
        table.advance(0, start(), start(), torch.ones(1), noise=start())
    assert (table.learned_variance, ours.DDPMScheduler().step_table().learned_variance) == (True, False)
