"""Whole trajectories against diffusers' schedulers run in float64 on the same float32 schedule constants.

diffusers computes its steps in float32 with up to 2e-5 of rounding; in float64 it is a clean oracle. The table,
executed in float64, must agree with it to 1e-9 at every step; `step`, which computes in float32, to 1e-6 of the
largest term that the step sums.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import kolors_fast.schedulers as ours
from kolors_fast.schedulers import StepTable

KOLORS = {
    "num_train_timesteps": 1100,
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SDXL = {**KOLORS, "num_train_timesteps": 1000, "beta_end": 0.012}
SHAPE = (2, 4, 5, 7)
MODULES = {
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
}
NAMES = list(MODULES)


class Float64Torch:
    """torch, but what a diffusers module calls float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def draw_float32(shape: tuple[int, ...], dtype: torch.dtype, **where: Any) -> Tensor:
    return randn_tensor(shape, dtype=torch.float32, **where).to(dtype)


@contextmanager
def in_float64(name: str) -> Iterator[None]:
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Float64Torch())
        patch.setattr(module, "randn_tensor", draw_float32)
        yield


def test_the_model_of_these_tests_lets_an_error_through() -> None:
    """What one step gets wrong must still be seen at the next ones."""
    scheduler = make(ours, "EulerDiscreteScheduler", KOLORS, 10)
    model = model_for(KOLORS)
    sample = start(scheduler)
    t = scheduler.timesteps[5]
    scale = 1 / (1 + float(scheduler.sigmas[5]) ** 2) ** 0.5
    moved = (model((sample + 0.1) * scale, t) - model(sample * scale, t)).abs()
    assert moved.mean() > 1e-3


def make(library: Any, name: str, config: dict[str, Any], steps: int) -> Any:
    scheduler = getattr(library, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def widen(scheduler: Any) -> None:
    for key in ("sigmas", "alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, key):
            setattr(scheduler, key, getattr(scheduler, key).double())


def model_for(config: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """A model that half sees a fixed picture in the noise: its trajectory neither explodes nor is chaotic."""
    bars = ours.DDPMScheduler(**{k: config[k] for k in KOLORS}).alphas_cumprod.double().numpy()
    generator = torch.Generator().manual_seed(3)
    picture, fault = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)

    def model(seen: Tensor, timestep: Tensor) -> Tensor:
        bar = float(np.interp(float(timestep), np.arange(len(bars)), bars))
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        clean = 0.5 * picture + 0.5 * torch.tanh(seen.double()) + 0.1 * torch.sin(fault + float(timestep))
        noise = (seen.double() - alpha * clean) / sigma
        kind = config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            noise = alpha * noise - sigma * clean
        return (clean if kind == "sample" else noise).to(seen.dtype)

    return model


def start(scheduler: Any) -> Tensor:
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return sample.double() * float(scheduler.init_noise_sigma)


def run(scheduler: Any, config: dict[str, Any], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The sample after every step."""
    model, generator = model_for(config), torch.Generator().manual_seed(0)
    samples = [start(scheduler).to(dtype)]
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(samples[-1], t), t)
        samples.append(scheduler.step(output, t, samples[-1], generator=generator, return_dict=False, **options)[0])
    return samples[1:]


def truth(name: str, config: dict[str, Any], steps: int, **options: Any) -> list[Tensor]:
    scheduler = make(diffusers, name, config, steps)
    widen(scheduler)
    with in_float64(name):
        return run(scheduler, config, torch.float64, **options)


def run_table(table: StepTable, scheduler: Any, config: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """The definition of a table, in float64; also the largest term that each step sums."""
    model, generator = model_for(config), torch.Generator().manual_seed(0)
    sample, before = start(scheduler), torch.zeros(SHAPE, dtype=torch.float64)
    samples, largest = [], []
    for i, t in enumerate(table.timesteps):
        c = table.coefficients[i]
        output = model(sample * table.input_scale[i], t)
        denoised = c[4] * sample + c[5] * output
        if table.clip is not None:
            denoised = before = denoised.clamp(-table.clip, table.clip)
        noise = torch.zeros(())
        if table.needs_noise[i]:
            noise = torch.randn(SHAPE, generator=generator).double()
        terms = (c[0] * sample, c[1] * output, c[2] * before, c[3] * noise)
        sample, before = sum(terms, torch.zeros(())), denoised
        samples.append(sample)
        largest.append(max(float(term.abs().max()) for term in terms))
    return samples, largest


def assert_near(got: list[Tensor], expected: list[Tensor], largest: list[float], limit: float) -> None:
    assert len(got) == len(expected)
    for a, b, scale in zip(got, expected, largest, strict=True):
        assert (a - b).abs().max() <= limit * scale


def check_table(name: str, config: dict[str, Any], steps: int, **options: Any) -> None:
    expected = truth(name, config, steps, **options)
    scheduler = make(ours, name, config, steps)
    tabled, _ = run_table(scheduler.step_table(**options), scheduler, config)
    assert_near(tabled, expected, [float(sample.abs().max()) for sample in expected], 1e-9)


def check_steps(name: str, config: dict[str, Any], steps: int, **options: Any) -> None:
    expected = truth(name, config, steps, **options)
    largest = [float(sample.abs().max()) for sample in expected]
    if not options.get("s_churn"):  # churn raises the sample before the row, so it is no part of the table
        scheduler = make(ours, name, config, steps)
        _, terms = run_table(scheduler.step_table(**options), scheduler, config)
        # a step from pure noise cancels terms up to 29 times its result, which no float32 sum survives to 1e-6
        largest = [max(pair) for pair in zip(largest, terms, strict=True)]
    stepped = run(make(ours, name, config, steps), config, torch.float32, **options)
    assert_near(stepped, expected, largest, 1e-6)


def check(name: str, config: dict[str, Any], steps: int, **options: Any) -> None:
    check_table(name, config, steps, **options)
    check_steps(name, config, steps, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [KOLORS, SDXL], ids=["kolors", "sdxl"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
def test_spacings(name: str, schedule: dict[str, Any], spacing: str, steps: int) -> None:
    config = {**schedule, "timestep_spacing": spacing}
    if name in ("DDIMScheduler", "DDPMScheduler"):
        config["clip_sample"] = False
    check(name, config, steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types(name: str, kind: str) -> None:
    if name == "EulerAncestralDiscreteScheduler" and kind == "sample":
        pytest.skip("diffusers' ancestral sampler does not implement prediction_type 'sample'")
    for steps in (1, 10):
        check(name, {**KOLORS, "prediction_type": kind, "timestep_spacing": "leading"}, steps)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
@pytest.mark.parametrize("schedule", [KOLORS, SDXL], ids=["kolors", "sdxl"])
def test_karras(name: str, steps: int, schedule: dict[str, Any]) -> None:
    check(name, {**schedule, "use_karras_sigmas": True, "timestep_spacing": "leading"}, steps)


def test_karras_with_given_range() -> None:
    config = {**KOLORS, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0}
    check("EulerDiscreteScheduler", config, 10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_with_noise(eta: float, to_one: bool, steps: int) -> None:
    check("DDIMScheduler", {**KOLORS, "clip_sample": False, "set_alpha_to_one": to_one}, steps, eta=eta)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_clipping(kind: str, limit: float) -> None:
    config = {**KOLORS, "clip_sample": True, "clip_sample_range": limit, "prediction_type": kind}
    for steps in (4, 25):
        check("DDPMScheduler", config, steps)
        check("DDIMScheduler", config, steps, eta=0.5)
        check("DDIMScheduler", config, steps, eta=0.5, use_clipped_model_output=True)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_variances(variance: str) -> None:
    for steps in (1, 25):
        check("DDPMScheduler", {**KOLORS, "variance_type": variance, "clip_sample": False}, steps)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "ending",
    [
        {},
        {"solver_order": 1},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    ],
    ids=["default", "order 1", "second order to the end", "lower order final", "euler at final"],
)
@pytest.mark.parametrize("steps", [4, 14, 15])
def test_dpmsolver(algorithm: str, solver: str, ending: dict[str, Any], steps: int) -> None:
    config = {**KOLORS, "algorithm_type": algorithm, "solver_type": solver, **ending}
    check("DPMSolverMultistepScheduler", config, steps)


def test_euler_variants() -> None:
    for config in ({}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}):
        check_steps(
            "EulerDiscreteScheduler", {**KOLORS, **config}, 10, s_churn=3.0, s_noise=1.01, s_tmin=0.1, s_tmax=15.0
        )
    check("EulerDiscreteScheduler", {**KOLORS, "final_sigmas_type": "sigma_min"}, 10)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", NAMES)
def test_other_beta_schedules(name: str, beta_schedule: str) -> None:
    config = {**SDXL, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": beta_schedule}
    if name in ("DDIMScheduler", "DDPMScheduler"):
        config["clip_sample"] = False
    check_table(name, config, 10)  # alone: the cosine schedule starts at sigma 10000, beyond float32's 1e-6


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_given_timesteps(name: str) -> None:
    schedulers = [getattr(library, name)(**KOLORS) for library in (diffusers, ours)]
    for scheduler in schedulers:
        scheduler.set_timesteps(timesteps=[1050, 700, 333, 20])
    expected, got = (run(scheduler, KOLORS, torch.float32) for scheduler in schedulers)
    assert_near(got, expected, [float(sample.abs().max()) for sample in expected], 2e-6)


def test_given_sigmas() -> None:
    schedulers = [library.EulerDiscreteScheduler(**KOLORS) for library in (diffusers, ours)]
    for scheduler in schedulers:
        scheduler.set_timesteps(sigmas=[20.0, 7.0, 2.0, 0.4, 0.0])
    torch.testing.assert_close(schedulers[1].timesteps, schedulers[0].timesteps, rtol=1e-6, atol=0)
    expected, got = (run(scheduler, KOLORS, torch.float32) for scheduler in schedulers)
    assert_near(got, expected, [float(sample.abs().max()) for sample in expected], 2e-6)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_starting_in_the_middle(name: str) -> None:
    """Image-to-image: noise at the begin index, then the rest; DPM-Solver must restart at first order there."""
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    results = []
    for library in (diffusers, ours):
        scheduler = make(library, name, KOLORS, 10)
        scheduler.set_begin_index(6)
        left = scheduler.timesteps[6:]
        sample = scheduler.add_noise(clean, noise, left[:1].repeat(2))
        model = model_for(KOLORS)
        for t in left:
            output = model(scheduler.scale_model_input(sample, t), t)
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
        results.append(sample)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6 * float(results[0].abs().max()))


HALF_CASES = [
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
]


def test_half_precision_sample() -> None:
    """The step computes in float32 whatever the dtype; only the stored sample is rounded."""
    for dtype in (torch.float16, torch.bfloat16):
        for name, more in HALF_CASES:
            config = {**KOLORS, **more}
            scheduler = make(ours, name, config, 10)
            sample, output = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
            generator = torch.Generator().manual_seed(0)
            got = scheduler.step(output, scheduler.timesteps[0], sample, generator=generator)
            table = make(ours, name, config, 10).step_table()
            noise = torch.zeros(SHAPE)
            if table.needs_noise[0]:
                drawn_as = table.noise_dtype or dtype
                noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=drawn_as).to(dtype)
            c = table.coefficients[0]
            exact = c[0] * sample.double() + c[1] * output.double() + c[3] * noise.double()
            assert got.prev_sample.dtype == dtype
            limit = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * exact.abs().max()
            assert ((got.prev_sample.double() - exact).abs() <= limit).all(), (name, dtype)
