"""The denoising loop against a scheduler stepped by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kolors_fast.schedulers as schedulers
from kolors_fast.sampling.denoise import denoise

KOLORS = {
    "num_train_timesteps": 1100,
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.5}),
    ("DDIMScheduler", {"clip_sample": True}, {}),
    ("DDPMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
]
CONTEXTS = torch.tensor([-0.3, 0.4, 0.1])  # what distinguishes the predictions of one sample


def model(inputs: Tensor, timestep: Tensor) -> Tensor:
    parts = inputs.reshape(-1, 2, *inputs.shape[1:])
    contexts = CONTEXTS[: len(parts)].reshape(-1, *[1] * inputs.dim())
    return (torch.tanh(parts) + contexts + float(timestep) / 2000).reshape(inputs.shape).to(inputs.dtype)


def model_of(table: Any) -> Any:
    """The model as the loop calls it, by rows."""
    return lambda inputs, row: model(inputs, table.timesteps[row])


def by_hand(scheduler: Any, sample: Tensor, weights: Tensor, begin: int = 0, **options: Any) -> list[Tensor]:
    scheduler.set_begin_index(begin)
    generator, samples = torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps[begin:]:
        inputs = torch.cat([scheduler.scale_model_input(sample, t)] * len(weights))
        guided = sum(w * p for w, p in zip(weights, model(inputs, t).chunk(len(weights)), strict=True))
        sample = scheduler.step(guided, t, sample, generator=generator, **options).prev_sample
        samples.append(sample)
    return samples


def make(name: str, config: dict[str, Any]) -> tuple[Any, Tensor]:
    scheduler = getattr(schedulers, name)(**KOLORS, **config)
    scheduler.set_timesteps(7)
    noise = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    return scheduler, noise * scheduler.init_noise_sigma


@pytest.mark.parametrize(("name", "config", "options"), RUNS)
@pytest.mark.parametrize("weights", [[1.0], [-4.0, 5.0], [-6.0, 8.0, -1.0]], ids=["one", "guided", "perturbed"])
def test_loop_matches_steps_by_hand(
    name: str, config: dict[str, Any], options: dict[str, Any], weights: list[float]
) -> None:
    scheduler, sample = make(name, config)
    expected = by_hand(scheduler, sample, torch.tensor(weights), **options)[-1]
    table = make(name, config)[0].step_table(**options)
    got = denoise(model_of(table), table, sample, torch.tensor(weights), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_starting_and_stopping_on_the_way(name: str) -> None:
    weights = torch.tensor([-4.0, 5.0])
    scheduler, sample = make(name, {})
    expected = by_hand(scheduler, sample, weights, begin=3)
    table = scheduler.step_table(begin=3)
    got = denoise(model_of(table), table, sample, weights, start=3, stop=6)
    torch.testing.assert_close(got, expected[2], rtol=0, atol=1e-5 * float(expected[2].abs().max()))


def test_callback_replaces_the_sample_and_interruption_ends_the_run() -> None:
    scheduler, sample = make("EulerDiscreteScheduler", {})
    seen: list[tuple[int, float]] = []

    def callback(row: int, timestep: Tensor, sample: Tensor) -> Tensor:
        seen.append((row, float(timestep)))
        return torch.full_like(sample, row)

    table = scheduler.step_table()
    result = denoise(
        model_of(table),
        table,
        sample,
        torch.ones(1),
        callback=callback,
        interrupted=lambda: len(seen) == 3,
    )
    assert seen == list(enumerate(scheduler.timesteps[:3].tolist()))
    assert torch.equal(result, torch.full_like(sample, 2))


def test_guidance_may_change_on_the_way() -> None:
    scheduler, sample = make("EulerDiscreteScheduler", {})
    widths = []

    table = scheduler.step_table()

    def counting(inputs: Tensor, row: int) -> Tensor:
        widths.append(len(inputs))
        return model(inputs, table.timesteps[row])

    def weights(row: int) -> Tensor:
        return torch.tensor([-4.0, 5.0]) if row < 2 else torch.ones(1)

    denoise(counting, table, sample, weights)
    assert widths == [4, 4] + [2] * 5


@pytest.mark.parametrize(("name", "config", "options"), RUNS)
def test_weights_of_each_item_make_the_steps_of_the_item_alone(
    name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    """Guided by 5, not guided, guided by 2.5: the bits of three runs of one item."""
    scheduler, _ = make(name, config)
    table = scheduler.step_table(**options)
    sample = torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(0)) * table.initial_scale
    scales = [5.0, 1.0, 2.5]

    def of(inputs: Tensor, row: int) -> Tensor:
        """Negative and positive predictions of each item, or the positive ones alone."""
        parts = inputs.split(inputs.shape[0] // 2) if inputs.shape[0] % 2 == 0 else (inputs,)
        shifts = (-0.3, 0.4)[-len(parts) :]
        times = float(table.timesteps[row]) / 2000
        return torch.cat([torch.tanh(part) + shift + times for part, shift in zip(parts, shifts, strict=True)])

    def run(sample: Tensor, weights: Tensor, seeds: list[int]) -> Tensor:
        return denoise(of, table, sample, weights, generator=[torch.Generator().manual_seed(s) for s in seeds])

    together = run(sample, torch.tensor([[-4.0, 0.0, -1.5], [5.0, 1.0, 2.5]]), [7, 8, 9])
    for item, scale in enumerate(scales):
        alone = torch.tensor([1 - scale, scale]) if scale > 1 else torch.ones(1)
        assert torch.equal(run(sample[item : item + 1], alone, [7 + item]), together[item : item + 1])


def test_dtype_is_kept_and_no_graph_is_built() -> None:
    scheduler, sample = make("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    factor = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    result = denoise(
        lambda inputs, _: inputs * factor * 0.1, scheduler.step_table(), sample.to(torch.bfloat16), torch.ones(1)
    )
    assert result.dtype == torch.bfloat16
    assert not result.requires_grad


def test_half_precision_draws_the_noise_of_the_scheduler() -> None:
    """DPM-Solver's noise is drawn in float32 for samples of any dtype, as in diffusers."""
    scheduler, sample = make("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    sample = sample.to(torch.bfloat16)
    expected = by_hand(scheduler, sample, torch.ones(1))[-1]
    table = scheduler.step_table()
    got = denoise(model_of(table), table, sample, torch.ones(1), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
