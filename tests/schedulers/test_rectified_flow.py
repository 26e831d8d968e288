"""Rectified flow's formulae against quadrature, and its sampler on a flow that is known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import kolors_fast.schedulers as ours
from kolors_fast.sampling.denoise import denoise
from kolors_fast.schedulers.rectified_flow import (
    LARGEST_MODE_SCALE,
    CosMap,
    LogitNormal,
    Mode,
    TimestepDensity,
    Uniform,
    clean_from_velocity,
    epsilon_weight,
    interpolate,
    log_snr,
    noise_from_velocity,
    parse_density,
    resolution_shift,
    shift_timestep,
    velocity_target,
)

DENSITIES: list[TimestepDensity] = [
    Uniform(),
    CosMap(),
    *[LogitNormal(mean, std) for mean, std in ((0.0, 1.0), (0.5, 0.6), (-0.5, 1.0), (1.0, 0.3))],
    *[Mode(scale) for scale in (-0.8, 0.0, 0.81, 1.29, 1.5)],
]


def middles(cells: int) -> Tensor:
    """Of equal cells of (0, 1), float64."""
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def test_paths_are_straight() -> None:
    clean, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy, velocity = interpolate(clean, noise, t), velocity_target(clean, noise)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])
    later = interpolate(clean, noise, t + 0.25)
    torch.testing.assert_close((later - noisy) / 0.25, velocity)
    torch.testing.assert_close(clean_from_velocity(noisy, velocity, t), clean)
    torch.testing.assert_close(noise_from_velocity(noisy, velocity, t), noise)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.tensor([0.1, 0.5, 0.9])
    got, exact = interpolate(clean, noise, t), interpolate(clean.double(), noise.double(), t.double())
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_densities_integrate_to_one_and_are_those_of_their_samples(density: TimestepDensity) -> None:
    """Kolmogorov-Smirnov: P(sqrt(n) D > x) -> 2 sum_k (-1)^(k-1) exp(-2 k² x²), so D > 1.95 / sqrt(n) once in 1000."""
    cells, draws = 20_000, 40_000
    mass = density.density(middles(cells)) / cells
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    integral = np.concatenate([[0.0], mass.cumsum(0).numpy()])
    times = density.sample((draws // 2, 2), torch.Generator().manual_seed(0))
    assert (times.dtype, times.shape) == (torch.float32, (draws // 2, 2))
    assert 0 < times.min() < times.max() < 1
    expected = np.interp(times.flatten().sort().values.double().numpy(), np.linspace(0, 1, cells + 1), integral)
    ranks = np.arange(draws + 1) / draws
    distance = max((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
    assert distance <= 1.95 / math.sqrt(draws)


def test_densities_have_their_shapes() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    # at 1/2, f(u) = 1/2 and |f'| = 1 + s - s pi / 2; for s below 0 the ends are seen more
    assert float(Mode(1.29).density(t)[1]) == pytest.approx(1 / (1 + 1.29 * (1 - math.pi / 2)), rel=1e-9)
    assert Mode(-0.8).density(t)[1] < 1 < Mode(-0.8).density(t)[0]
    for density in (Mode(1.29), CosMap(), LogitNormal(0.0, 1.0)):
        assert float(density.density(t)[0]) == pytest.approx(float(density.density(t)[2]), rel=1e-6)
    assert float(CosMap().density(t)[1]) == pytest.approx(4 / math.pi)
    assert float(LogitNormal(0.0, 1.0).density(t)[1]) == pytest.approx(4 / math.sqrt(2 * math.pi))


def test_a_mean_above_zero_is_towards_the_noise() -> None:
    towards_noise = LogitNormal(0.8, 0.5).sample((4000,), torch.Generator().manual_seed(0))
    assert float(towards_noise.median()) == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.01)
    density = LogitNormal(0.8, 0.5).density(torch.tensor([0.3, 0.7]))
    assert density[1] > 5 * density[0]


def test_extreme_draws_stay_inside() -> None:
    for mean in (-60.0, 60.0):
        times = LogitNormal(mean, 1.0).sample((100,), torch.Generator().manual_seed(0))
        assert 0 < times.min() <= times.max() < 1
        assert log_snr(times).isfinite().all()
    for scale in (-1.0, LARGEST_MODE_SCALE):  # where f only just does not turn round
        assert Mode(scale).density(middles(8)).isfinite().all()


@pytest.mark.parametrize("density", [Uniform(), CosMap(), LogitNormal(0.4, 0.9), Mode(1.29)], ids=str)
def test_the_weighted_loss_of_the_noise_is_the_loss_of_the_velocity(density: TimestepDensity) -> None:
    """By quadrature over t and pairs of a picture and noise, for a model that is wrong in its own way at each t."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    share = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    clean, noise = (torch.from_numpy(v.ravel()) for v in np.meshgrid(0.7 + 0.4 * nodes, nodes))
    t = middles(2000).requires_grad_()
    (slope,) = torch.autograd.grad(log_snr(t).sum(), t)  # lambda'
    t = t.detach()
    columns = [values.expand(len(t), -1) for values in (clean, noise)]
    noisy, target = interpolate(columns[0], columns[1], t), velocity_target(columns[0], columns[1])
    velocity = torch.tanh(noisy) * (1 + t[:, None]) - 0.3
    error_of_velocity = ((velocity - target) ** 2 * share).sum(1)
    error_of_noise = ((noise_from_velocity(noisy, velocity, t) - columns[1]) ** 2 * share).sum(1)
    by_velocity = (density.density(t) * error_of_velocity).mean()
    by_noise = -(epsilon_weight(t, density) * slope * error_of_noise).mean() / 2
    assert float(by_velocity) > 0.1
    torch.testing.assert_close(by_noise, by_velocity, rtol=1e-9, atol=0)


def test_resolution_shift_moves_the_log_snr() -> None:
    alpha = resolution_shift(256 * 256, 1024 * 1024)
    assert alpha == 4
    t = middles(50)
    torch.testing.assert_close(log_snr(shift_timestep(t, alpha)), log_snr(t) - 2 * math.log(alpha))
    torch.testing.assert_close(shift_timestep(shift_timestep(t, alpha), 1 / alpha), t)
    # the mean of m noisy pixels of one colour is as uncertain at the shifted time as that of n: t / ((1 - t) sqrt(n))
    before, after = (u / (1 - u) / side for u, side in ((t, 256), (shift_timestep(t, alpha), 1024)))
    torch.testing.assert_close(before, after)
    with pytest.raises(ValueError, match="pixels_to: expected at least 1, got 0"):
        resolution_shift(4, 0)


@pytest.mark.parametrize(
    ("text", "density"),
    [
        ("uniform", Uniform()),
        ("logit_normal(0,1)", LogitNormal(0.0, 1.0)),
        (" logit_normal( -0.5 , 1e-1 ) ", LogitNormal(-0.5, 0.1)),
        ("mode(1.29)", Mode(1.29)),
        ("cosmap", CosMap()),
    ],
)
def test_densities_are_read_from_recipes(text: str, density: TimestepDensity) -> None:
    assert parse_density(text) == density


@pytest.mark.parametrize(
    "text",
    ["", "normal", "uniform()x", "logit_normal", "logit_normal(1)", "mode(a)", "mode(1,2)", "mode(nan)", "cosmap(1)"],
)
def test_other_texts_are_refused(text: str) -> None:
    message = r"density: expected 'uniform', 'logit_normal\(mean, std\)', 'mode\(scale\)' or 'cosmap', got '"
    with pytest.raises(ValueError, match=message):
        parse_density(text)


def test_bad_densities() -> None:
    for scale in (-1.01, 1.76, math.nan):
        with pytest.raises(ValueError, match=r"mode: scale: expected -1 to 2 / \(pi - 2\) = 1\.7519, .*, got "):
            Mode(scale)
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="logit_normal: std: expected more than 0, got "):
            LogitNormal(0.0, std)


def transported(steps: int, shift: float) -> Tensor:
    """Noise of mean 0 and deviation 1 carried to N(0.7, 0.4²) by the exact velocity E[noise - x0 | z_t]."""
    mean, std = 0.7, 0.4
    scheduler = ours.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    table = scheduler.step_table()

    def velocity(z: Tensor, row: int) -> Tensor:
        t = float(table.timesteps[row]) / 1000
        surprise = (z - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * surprise - (mean + (1 - t) * std**2 * surprise)

    noise = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = ((noise - noise.mean()) / noise.std()).float()
    return denoise(velocity, table, noise, torch.ones(1)).double()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_exact_flow_arrives_and_arrives_closer_with_more_steps(shift: float) -> None:
    """Euler is of first order: four times the steps, a quarter of the error."""
    errors = []
    for steps in (5, 20, 80, 320):
        arrived = transported(steps, shift)
        assert float(arrived.mean()) == pytest.approx(0.7, abs=1e-4)  # the path of the mean is straight
        errors.append(abs(float(arrived.std()) - 0.4))
    assert all(3.5 < before / after < 4.5 for before, after in pairwise(errors))
    assert errors[-1] < 0.005
