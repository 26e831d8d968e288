"""Noise schedules and the timesteps chosen from them.

Everything is float64, derived from diffusers' float32 constants: betas, 1 - betas and their running product are
rounded to float32 as in the reference, because near t = 0 the rounding of alpha-bar alone moves 1 - alpha-bar by 1e-5
and the published checkpoints are sampled with those rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

KARRAS_RHO = 7.0  # Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 3


def training_betas(steps: int, start: float, end: float, kind: str, trained: Sequence[float] | None = None) -> Tensor:
    """Per-step noise variances, float32 [steps]."""
    if steps < 1:
        raise ValueError(f"num_train_timesteps: expected at least 1, got {steps}")
    if trained is not None:
        if len(trained) != steps:
            raise ValueError(f"trained_betas: expected num_train_timesteps={steps} values, got {len(trained)}")
        return torch.tensor(trained, dtype=torch.float32)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    raise ValueError(f"beta_schedule: expected 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got {kind!r}")


def _cosine_betas(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021: alpha-bar(u) = cos²(π/2 (u + 0.008) / 1.008), each beta at most 0.999."""
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)], dtype=torch.float32)


def training_sigmas(alphas_cumprod: Tensor) -> Array:
    """Noise-to-signal ratios sqrt((1 - A) / A), rounded to float32 like the reference, [T] ascending."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy().astype(np.float64)


def spaced_timesteps(spacing: str, train_steps: int, steps: int, offset: int, *, spare: int = 0) -> Array:
    """`steps` descending timesteps in [0, train_steps - 1], as float64; linspace ones may be fractional.

    `spare` extra points are spaced and dropped at the low end (DPM-Solver keeps its end point out of the list).
    Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"num_inference_steps: expected 1 to num_train_timesteps={train_steps}, got {steps}")
    points = steps + spare
    if spacing == "linspace":
        chosen: Array = np.linspace(0, train_steps - 1, points)[::-1]
    elif spacing == "leading":
        chosen = np.arange(points, dtype=np.float64)[::-1] * (train_steps // points) + float(offset)
        if train_steps < points or chosen[0] > train_steps - 1:
            raise ValueError(
                f"num_inference_steps: expected few enough for leading spacing to stay below timestep {train_steps} "
                f"with steps_offset={offset}, got {steps}"
            )
    elif spacing == "trailing":
        # the float stride can yield one point too many, ending at -1 (T=1100: 15, 30, 60, ... steps); keep `steps`
        chosen = np.arange(train_steps, 0, -train_steps / steps).round() - 1
    else:
        raise ValueError(f"timestep_spacing: expected 'linspace', 'leading' or 'trailing', got {spacing!r}")
    return chosen[:steps].copy()


def given_values(name: str, values: Sequence[float], highest: float) -> Array:
    """A user's own timesteps or sigmas as float64, checked to descend from at most `highest` to at least 0."""
    chosen = np.asarray(values, dtype=np.float64)
    if (
        chosen.ndim != 1
        or not len(chosen)
        or (np.diff(chosen) >= 0).any()
        or not highest >= chosen[0] >= chosen[-1] >= 0
    ):
        raise ValueError(
            f"{name}: expected descending values from at most {highest:g} to at least 0, got {list(values)}"
        )
    return chosen


def karras_sigmas(low: float, high: float, steps: int) -> Array:
    """(high^(1/7) + i/(N-1) (low^(1/7) - high^(1/7)))^7, [steps] descending."""
    ramp = np.linspace(0, 1, steps)
    top, bottom = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return (top + ramp * (bottom - top)) ** KARRAS_RHO


def sigma_to_timestep(sigmas: Array, train_sigmas: Array) -> Array:
    """Fractional timesteps of `sigmas`, linear in log sigma, clamped to the trained range."""
    logs = np.log(train_sigmas.astype(np.float32))
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))


def round_to_float32(values: Array) -> Array:
    """Round like the reference, whose sigmas are float32; the arithmetic on them stays float64."""
    return values.astype(np.float32).astype(np.float64)
