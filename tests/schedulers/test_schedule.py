"""Timesteps, sigmas, noising and refusals."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

import kolors_fast.schedulers as ours

KOLORS = {
    "num_train_timesteps": 1100,
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SDXL = {**KOLORS, "num_train_timesteps": 1000, "beta_end": 0.012}
NAMES = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
]
SPACINGS = ["leading", "linspace", "trailing"]
FLAWED = [15, 30, 60, 63, 119, 120]  # step counts at which diffusers' trailing spacing runs on to t = -1 for T = 1100


def euler(steps: int, spacing: str, **config: Any) -> ours.EulerDiscreteScheduler:
    scheduler = ours.EulerDiscreteScheduler(**{**KOLORS, "timestep_spacing": spacing, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def test_noise_levels_of_kolors() -> None:
    """Values computed independently in float64 from the straight line of sqrt(beta)."""
    bars = ours.DDPMScheduler(**KOLORS).alphas_cumprod
    expected = {0: 0.99915, 1: 0.9982960, 10: 0.9904292, 100: 0.8940159, 250: 0.6725936, 500: 0.2737555}
    expected |= {750: 0.0547185, 999: 0.0044084, 1099: 0.0011827}
    for t, bar in expected.items():
        assert float(bars[t]) == pytest.approx(bar, abs=6e-7)  # 5e-7 apart: float32 1 - beta


def test_leading_run_of_kolors() -> None:
    scheduler = euler(50, "leading")
    assert scheduler.timesteps[:3].tolist() == [1079, 1057, 1035]
    assert scheduler.timesteps[-2:].tolist() == [23, 1]
    assert float(scheduler.sigmas[0]) == pytest.approx(25.2813, abs=1e-4)
    assert float(scheduler.sigmas[-2]) == pytest.approx(0.0413, abs=5e-5)
    assert scheduler.init_noise_sigma == pytest.approx(25.3011, abs=5e-5)


def test_sigmas_of_25_leading_steps() -> None:
    expected = (
        "21.7838 16.3914 12.548 9.7645 7.7171 6.1883 5.0295 4.1385 3.4434 2.8934 2.4521 2.093 1.7968 1.549 1.3389 "
        "1.1584 1.001 .8621 .7375 .624 .5187 .4185 .3193 .2126 .0413 0"
    )
    assert euler(25, "leading").sigmas.tolist() == pytest.approx([float(s) for s in expected.split()], abs=5.1e-5)


@pytest.mark.parametrize(("steps", "sigma"), [(20, 20.255), (10, 14.3114), (4, 5.8685), (30, 20.123)])
def test_first_leading_sigma(steps: int, sigma: float) -> None:
    assert float(euler(steps, "leading").sigmas[0]) == pytest.approx(sigma, abs=5.1e-4 if steps in (20, 30) else 5.1e-5)


def test_other_spacings_start_at_the_noisiest_level() -> None:
    for spacing in ("linspace", "trailing"):
        scheduler = euler(50, spacing)
        assert scheduler.timesteps[0] == 1099
        assert float(scheduler.sigmas[0]) == pytest.approx(29.0612, abs=5e-5)
        assert scheduler.init_noise_sigma == float(scheduler.sigmas[0])


def test_karras_runs() -> None:
    scheduler = euler(25, "leading", use_karras_sigmas=True)
    assert scheduler.sigmas[:3].tolist() == pytest.approx([21.784, 18.292, 15.292], abs=5e-4)
    assert scheduler.sigmas[-3:].tolist() == pytest.approx([0.0623, 0.0413, 0], abs=5e-5)
    assert float(scheduler.timesteps[0]) == pytest.approx(1057, abs=1e-3)
    solver = ours.DPMSolverMultistepScheduler(**{**KOLORS, "use_karras_sigmas": True})
    solver.set_timesteps(25)
    assert solver.timesteps[:4].tolist() == [1099, 1072, 1044, 1013]
    assert solver.timesteps[-4:].tolist() == [13, 5, 2, 0]
    assert float(solver.sigmas[0]) == pytest.approx(29.061, abs=5e-4)
    assert float(solver.sigmas[-2]) == pytest.approx(0.0292, abs=5e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [KOLORS, SDXL], ids=["kolors", "sdxl"])
def test_timesteps_and_sigmas_are_those_of_diffusers(name: str, spacing: str, schedule: dict[str, Any]) -> None:
    for steps in (1, 2, 7, 20, 25, 50, 77, 333):
        made = []
        for library in (diffusers, ours):
            scheduler = getattr(library, name)(**{**schedule, "timestep_spacing": spacing})
            scheduler.set_timesteps(steps)
            made.append(scheduler)
        theirs, mine = made
        assert mine.timesteps.dtype == theirs.timesteps.dtype
        torch.testing.assert_close(mine.timesteps, theirs.timesteps[:steps], rtol=0, atol=0)
        assert float(mine.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        if hasattr(theirs, "sigmas"):
            torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", FLAWED)
def test_trailing_has_as_many_steps_as_asked(name: str, steps: int) -> None:
    """On purpose unlike diffusers, whose float stride adds a step at t = -1 here."""
    theirs = diffusers.DDIMScheduler(**{**KOLORS, "timestep_spacing": "trailing"})
    theirs.set_timesteps(steps)
    assert len(theirs.timesteps) == steps + 1
    assert theirs.timesteps[-1] == -1
    mine = getattr(ours, name)(**{**KOLORS, "timestep_spacing": "trailing"})
    mine.set_timesteps(steps)
    assert mine.timesteps.tolist() == theirs.timesteps[:-1].tolist()


def test_of_equal_timesteps_the_second_is_meant() -> None:
    """Rounded Karras timesteps repeat at the low end."""
    made = []
    for library in (diffusers, ours):
        made.append(library.DPMSolverMultistepScheduler(**{**KOLORS, "use_karras_sigmas": True}))
        made[-1].set_timesteps(60)
    theirs, mine = made
    assert len(set(mine.timesteps.tolist())) < 60
    for t in mine.timesteps:
        assert mine.index_for_timestep(t) == theirs.index_for_timestep(t)


@pytest.mark.parametrize("name", NAMES)
def test_before_set_timesteps_the_run_is_the_training_schedule(name: str) -> None:
    theirs, mine = (getattr(library, name)(**KOLORS) for library in (diffusers, ours))
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()
    assert len(mine) == len(theirs) == 1100
    assert float(mine.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_noise(name: str, dtype: torch.dtype) -> None:
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, mine = (getattr(library, name)(**KOLORS) for library in (diffusers, ours))
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(20)
    at = theirs.timesteps[[3, 10, 19]]
    expected = theirs.add_noise(clean.double(), noise.double(), at)
    got = mine.add_noise(clean, noise, at)
    assert got.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 6e-4}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", NAMES)
def test_bad_step_counts(name: str) -> None:
    scheduler = getattr(ours, name)(**KOLORS)
    for steps in (0, -3, 1101):
        with pytest.raises(ValueError, match=f"num_inference_steps: expected 1 to .*1100, got {steps}"):
            scheduler.set_timesteps(steps)


def test_leading_beyond_the_trained_range() -> None:
    scheduler = ours.DDIMScheduler(**KOLORS)
    with pytest.raises(ValueError, match=r"num_inference_steps: expected few enough .* steps_offset=1, got 1100"):
        scheduler.set_timesteps(1100)


@pytest.mark.parametrize("name", NAMES)
def test_bad_spacing(name: str) -> None:
    scheduler = getattr(ours, name)(**{**KOLORS, "timestep_spacing": "sideways"})
    with pytest.raises(ValueError, match=r"timestep_spacing: expected .*'trailing', got 'sideways'"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "final_sigmas_type", "tiny"),
        ("EulerAncestralDiscreteScheduler", "rescale_betas_zero_snr", True),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("DDPMScheduler", "thresholding", True),
        ("DDPMScheduler", "variance_type", "learned"),
        ("DDPMScheduler", "trained_betas", [0.1, 0.2]),
        ("DPMSolverMultistepScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "solver_type", "bh2"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
    ],
)
def test_refused_settings(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected .*, got "):
        getattr(ours, name)(**{**KOLORS, key: value})


@pytest.mark.parametrize("name", NAMES)
def test_bad_prediction_type(name: str) -> None:
    scheduler = getattr(ours, name)(**{**KOLORS, "prediction_type": "dream"})
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"prediction_type: expected .*, got 'dream'"):
        scheduler.step_table()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("given", [[], [5, 9], [5, 5], [1100, 3], [7, -1]], ids=str)
def test_bad_given_timesteps(name: str, given: list[int]) -> None:
    scheduler = getattr(ours, name)(**KOLORS)
    with pytest.raises(ValueError, match="timesteps: expected descending values from at most 1099 to at least 0, got"):
        scheduler.set_timesteps(timesteps=given)
    with pytest.raises(ValueError, match="set_timesteps: expected exactly one of num_inference_steps, timesteps"):
        scheduler.set_timesteps(5, timesteps=[5])
    with pytest.raises(ValueError, match="set_timesteps: expected exactly one of num_inference_steps, timesteps"):
        scheduler.set_timesteps()


def test_bad_given_sigmas() -> None:
    scheduler = ours.EulerDiscreteScheduler(**KOLORS)
    for given in ([1.0, 2.0], [2.0, -1.0], []):
        with pytest.raises(ValueError, match="sigmas: expected descending values from at most inf to at least 0, got"):
            scheduler.set_timesteps(sigmas=given)
    scheduler = ours.EulerDiscreteScheduler(**KOLORS, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="timesteps: expected None with use_karras_sigmas=True, got a list"):
        scheduler.set_timesteps(timesteps=[500, 100])


@pytest.mark.parametrize("name", NAMES)
def test_methods_take_the_arguments_of_diffusers(name: str) -> None:
    for method in ("set_timesteps", "step", "add_noise", "set_begin_index", "index_for_timestep"):
        theirs = getattr(getattr(diffusers, name), method, None)
        if theirs is None:  # DDIM and DDPM have no step index there
            continue
        wanted = list(inspect.signature(theirs).parameters)
        got = list(inspect.signature(getattr(getattr(ours, name)(), method)).parameters)
        assert ["self", *got] == [parameter for parameter in wanted if parameter != "schedule_timesteps"]


def test_bad_steps() -> None:
    scheduler = euler(4, "leading")
    sample = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"timestep: expected one of the floating-point .*, got the integer 3"):
        scheduler.step(sample, 3, sample)
    with pytest.raises(ValueError, match=r"timestep: expected one of scheduler.timesteps, got 3\.5"):
        scheduler.step(sample, 3.5, sample)
    with pytest.raises(
        ValueError, match=r"model_output: expected the sample's shape \(1, 4, 2, 2\), got \(1, 8, 2, 2\)"
    ):
        scheduler.step(torch.zeros(1, 8, 2, 2), scheduler.timesteps[0], sample)
    for t in scheduler.timesteps:
        scheduler.step(sample, t, sample)
    with pytest.raises(ValueError, match="step: expected at most 4 calls after set_timesteps, got one more"):
        scheduler.step(sample, t, sample)


def test_bad_eta_and_generators() -> None:
    scheduler = ours.DDIMScheduler(**KOLORS)
    sample = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="step: expected set_timesteps to be called first"):
        scheduler.step(sample, 5, sample)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"eta: expected 0 \(DDIM\) to 1 \(DDPM\), got 1\.5"):
        scheduler.step(sample, scheduler.timesteps[0], sample, eta=1.5)
    with pytest.raises(ValueError, match="generator: expected a list of 2 generators, got 1"):
        scheduler.step(sample, scheduler.timesteps[0], sample, eta=1.0, generator=[torch.Generator()])


def test_a_generator_per_item_draws_as_diffusers_does() -> None:
    results = []
    for library in (diffusers, ours):
        scheduler = library.EulerAncestralDiscreteScheduler(**KOLORS)
        scheduler.set_timesteps(4)
        sample = torch.ones(2, 4, 2, 2)
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        scheduler.scale_model_input(sample, scheduler.timesteps[0])
        results.append(scheduler.step(sample, scheduler.timesteps[0], sample, generator=generators).prev_sample)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
