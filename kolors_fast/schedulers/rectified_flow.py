"""Rectified flow: straight paths between pictures and noise, and how training weighs the times on them.

Esser et al. 2024 (Stable Diffusion 3), https://arxiv.org/abs/2403.03206; Liu et al. 2022, https://arxiv.org/abs/2209.03003.
Time t runs from 0, the picture x0, to 1, the noise. Where a function takes t [B], it is of the items of the batch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .schedule import Array
from .scheduler import mix_noise

Times = TypeVar("Times", Tensor, Array)

LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # beyond, f of `Mode` turns round in the middle
HALF_ULP = 2.0**-24  # of float32 below 1
BISECTIONS = 60  # halve [0, 1] to below float64's spacing at 1


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x0 + t noise, for t [B], in the dtype of `clean`."""
    return mix_noise(clean, noise, 1 - t, t)


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = dz_t/dt = noise - x0."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x0 = z_t - t v, for t [B]."""
    return mix_noise(noisy, velocity, torch.ones_like(t), -t)


def noise_from_velocity(noisy: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """noise = z_t + (1 - t) v, for t [B]."""
    return mix_noise(noisy, velocity, torch.ones_like(t), 1 - t)


def log_snr(t: Tensor) -> Tensor:
    """lambda_t = 2 ln((1 - t) / t)."""
    return 2 * ((1 - t) / t).log()


def shift_timestep(t: Times, alpha: float) -> Times:
    """alpha t / (1 + (alpha - 1) t), which takes 2 ln alpha from the log-SNR (section 5.3.2)."""
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(pixels_from: int, pixels_to: int) -> float:
    """alpha = sqrt(m / n) from n to m pixels.

    With it the picture is as uncertain at the shifted time as the smaller one was: the mean of k noisy pixels of one
    colour has a deviation that falls as 1 / sqrt(k).
    """
    for name, value in (("pixels_from", pixels_from), ("pixels_to", pixels_to)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return math.sqrt(pixels_to / pixels_from)


class TimestepDensity(Protocol):
    """How often training visits each time."""

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Times in (0, 1), float32, on the generator's device."""
        ...

    def density(self, t: Tensor) -> Tensor:
        """pi(t), which integrates to 1 over (0, 1), float64."""
        ...


@dataclass(frozen=True)
class Uniform:
    """pi(t) = 1."""

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _inside(_uniform(shape, generator))

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(u), u ~ N(mean, std²): exp(-(logit t - mean)² / (2 std²)) / (std sqrt(2 pi) t (1 - t)).

    A mean above 0 is on the side of the noise, as in the paper. diffusers' training scripts count the index of t from
    the noise on, so that their `logit_mean` has the opposite sign.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"logit_normal: std: expected more than 0, got {self.std:g}")

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return _inside(torch.sigmoid(self.mean + self.std * normal))

    def density(self, t: Tensor) -> Tensor:
        t = t.double()
        distance = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-(distance**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode:
    """t = f(u) = 1 - u - scale (cos²(pi u / 2) - 1 + u), u ~ U(0, 1), of density 1 / |f'(f^-1(t))|.

    0 is uniform; above, the middle is visited more, below, the ends are.
    """

    scale: float

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= LARGEST_MODE_SCALE:
            raise ValueError(
                f"mode: scale: expected -1 to 2 / (pi - 2) = {LARGEST_MODE_SCALE:.4f}, where times follow one another, "
                f"got {self.scale:g}"
            )

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _inside(self._time(_uniform(shape, generator)))

    def density(self, t: Tensor) -> Tensor:
        t = t.double()
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(BISECTIONS):  # f falls from 1 to 0
            middle = (low + high) / 2
            beyond = self._time(middle) < t
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * (low + high) / 2))
        return 1 / slope.abs()

    def _time(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


@dataclass(frozen=True)
class CosMap:
    """t = 1 - 1 / (tan(pi u / 2) + 1), u ~ U(0, 1): the log-SNR of the cosine schedule, 2 / (pi - 2 pi t + 2 pi t²)."""

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _inside(1 - 1 / (torch.tan(math.pi / 2 * _uniform(shape, generator)) + 1))

    def density(self, t: Tensor) -> Tensor:
        t = t.double()
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


DENSITIES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def parse_density(text: str) -> TimestepDensity:
    """The density that `text` names: uniform, logit_normal(mean, std), mode(scale) or cosmap."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    kind = DENSITIES.get(found[1]) if found else None
    numbers = re.split(r"\s*,\s*", found[2].strip()) if found and found[2] is not None else []
    if kind is None or len(numbers) != len(fields(kind)) or not all(map(NUMBER.fullmatch, numbers)):
        known = "'uniform', 'logit_normal(mean, std)', 'mode(scale)' or 'cosmap'"
        raise ValueError(f"density: expected {known}, got {text!r}")
    return kind(*map(float, numbers))


def epsilon_weight(t: Tensor, density: TimestepDensity) -> Tensor:
    """w_t = t / (1 - t) pi(t), float64.

    The loss of the velocity at times of density pi is the loss of the noise -1/2 E_{t ~ U} [w_t lambda'_t |e|²]
    (section 3), for an error e of the noise is 1 - t times that of the velocity.
    """
    return t.double() / (1 - t.double()) * density.density(t)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _inside(t: Tensor) -> Tensor:
    """As float32, off the ends, where log-SNR and weights are infinite."""
    return t.clamp(HALF_ULP, 1 - HALF_ULP).float()
