"""The learned variance's loss against closed forms, quadrature and diffusers, and its sampler on a toy."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from kolors_fast.training.learned_variance import (
    TRAIN_STEPS,
    DiffusionProcess,
    gaussian_divergence,
    log_probability_of_bin,
    sample,
)

PROCESS = DiffusionProcess()
LATER = torch.tensor([1, 2, 50, 250, 500, 999])
SHAPE = (len(LATER), 3, 4, 4)


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_signal_and_variances_are_those_of_diffusers():
    scheduler = DDPMScheduler(variance_type="learned_range")
    assert len(PROCESS.signal) == TRAIN_STEPS == len(scheduler)
    torch.testing.assert_close(PROCESS.signal, scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    for timestep in LATER.tolist():
        for v, table in ((-1.0, PROCESS.log_smallest), (1.0, PROCESS.log_largest)):
            wanted = scheduler._get_variance(timestep, predicted_variance=torch.tensor(v))
            assert float(table[timestep]) == pytest.approx(float(wanted), rel=1e-4)
    # the variance at t = 0 would be zero, and that of t = 1 takes its place
    assert PROCESS.log_smallest[0] == PROCESS.log_smallest[1] < PROCESS.log_largest[1]


def test_divergence_is_that_of_normals():
    mean, apart, log_true, log_model = draws(4)
    wanted = kl_divergence(Normal(mean, (log_true / 2).exp()), Normal(mean - apart, (log_model / 2).exp()))
    torch.testing.assert_close(gaussian_divergence(apart, log_true, log_model), wanted)


@pytest.mark.parametrize(
    ("x", "low", "high"), [(-1.3, -60, -1.3 + 1 / 255), (0.2, 0.2 - 1 / 255, 0.2 + 1 / 255), (1.0, 1 - 1 / 255, 60)]
)
@pytest.mark.parametrize("log_variance", [-9.0, -4.0, 1.0])
def test_probability_of_a_bin_is_an_integral(x, low, high, log_variance):
    apart, deviation = 0.03, math.exp(log_variance / 2)
    # the density is nothing to speak of 30 deviations from its mean
    mean = x - apart
    points = np.linspace(max(low, mean - 30 * deviation), min(high, mean + 30 * deviation), 200001)
    density = np.exp(-(((points - mean) / deviation) ** 2) / 2) / deviation / math.sqrt(2 * math.pi)
    got = log_probability_of_bin(*(torch.tensor(value, dtype=torch.float64) for value in (x, apart, log_variance)))
    assert float(got) == pytest.approx(math.log(np.trapezoid(density, points)), rel=1e-6, abs=1e-9)


def test_bound_is_the_divergence_of_the_reverse_step():
    latents, noise, predicted, v = draws(4)
    betas = torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    beta, bar, before = (one[LATER - shift].view(-1, 1, 1, 1) for one, shift in ((betas, 0), (bars, 0), (bars, 1)))
    noisy = bar.sqrt() * latents + (1 - bar).sqrt() * noise
    from_noise = (noisy - (1 - bar).sqrt() * predicted) / bar.sqrt()

    def mean(start):  # of q(x_t-1 | x_t, x_0 = start), equation 7 of DDPM
        return (before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - bar)

    true = beta * (1 - before) / (1 - bar)
    share = (v + 1) / 2
    deviation = (share * beta.log() + (1 - share) * true.log()).exp().sqrt()
    wanted = kl_divergence(Normal(mean(latents), true.sqrt()), Normal(mean(from_noise), deviation)).mean((1, 2, 3))
    got = PROCESS.variational_bound(torch.cat([predicted, v], 1), latents, noise, LATER)
    torch.testing.assert_close(got, wanted / math.log(2), rtol=1e-4, atol=1e-6)  # its tables are fp32


def test_bound_at_the_last_step_is_a_likelihood():
    latents, noise, predicted, v = draws(4)
    beta = 1e-4
    noisy = (1 - beta) ** 0.5 * latents + beta**0.5 * noise
    mean = (noisy - beta**0.5 * predicted) / (1 - beta) ** 0.5
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * float(PROCESS.log_smallest[0])
    normal, half = Normal(mean, (log_variance / 2).exp()), 1 / 255
    inner = normal.cdf(latents + half) - normal.cdf(latents - half)
    inner = torch.where(latents > 0.999, 1 - normal.cdf(latents - half), inner)
    inner = torch.where(latents < -0.999, normal.cdf(latents + half), inner)
    wanted = -inner.clamp(min=1e-12).log2().mean((1, 2, 3))
    got = PROCESS.variational_bound(torch.cat([predicted, v], 1), latents, noise, torch.zeros(len(LATER)).long())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_bound_is_zero_where_the_model_is_the_posterior():
    latents, noise = draws(2)
    exact = torch.cat([noise, torch.full_like(noise, -1.0)], 1)
    assert float(PROCESS.variational_bound(exact, latents, noise, LATER).abs().max()) < 1e-12
    assert float(PROCESS.variational_bound(exact + 0.1, latents, noise, LATER).min()) > 1e-5


def test_bound_trains_the_variance_alone():
    latents, noise, predicted, v = draws(4)
    output = torch.cat([predicted, v], 1).requires_grad_()
    PROCESS.variational_bound(output, latents, noise, torch.tensor([0, *LATER[1:]])).sum().backward()
    of_noise, of_variance = output.grad.chunk(2, dim=1)
    assert (of_noise == 0).all() and (of_variance != 0).any((1, 2, 3)).all()


def test_sampler_reaches_a_normal_and_reads_the_noise_alone():
    mean, deviation = 1.5, 0.4
    signal = PROCESS.signal

    def predict(noisy, timesteps):
        bar = signal[timesteps].view(-1, 1, 1, 1)
        exact = (1 - bar).sqrt() * (noisy - bar.sqrt() * mean) / (bar * deviation**2 + 1 - bar)
        exact[: len(noisy) // 2] += 7.0  # of the empty captions: a guidance of 1 does not see it
        return torch.cat([exact, torch.full_like(exact, float("nan"))], 1)

    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = sample(predict, noise, steps=50, guidance=1.0)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
