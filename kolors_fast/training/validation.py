"""The validation loss of a pipeline of any system, on features of pictures that it was not trained on."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from kolors_fast.evaluation.validation_loss import StratifiedLoss
from kolors_fast.pipelines.folder import load_components
from kolors_fast.pipelines.load import pipeline_class
from kolors_fast.schedulers import FlowMatchEulerDiscreteScheduler, Scheduler

from .config import EpsilonStage, PoolStage, RectifiedFlowStage
from .learned_variance import DiffusionProcess
from .mmdit import TRAIN_STEPS
from .objectives import PREDICTION_TYPES, DenoiserObjective, EpsilonObjective, validation_loss
from .pixart import TextObjective
from .precompute import open_features
from .pretrained import STAGES, denoiser_objective
from .streams import Streams

_PREDICTIONS = {told: name for name, told in PREDICTION_TYPES.items()}


def pipeline_validation_loss(
    path_or_id: str | os.PathLike[str],
    features: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: torch.device | str | None = None,
    batch: int = 8,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
) -> StratifiedLoss:
    """`stratified_loss` at 8 times of a pipeline's denoiser on features, of which it reads means and first captions.

        Kolors    mean (prediction - target)^2, the target n, or v where the scheduler's prediction_type says so
        SD3       mean (velocity - (n - x))^2
        PixArt    mean (noise - n)^2 + the bound on the learned variance, see `DiffusionProcess.variational_bound`

    No time weighs more than another, whatever it did in training. The noise schedule is that of the scheduler's config;
    SD3's shift has no part in it, for the times are given.

    Args:
        path_or_id: a folder in diffusers' layout, a Hub id or a bundled model.
        features: a folder that `precompute` made with its autoencoder and text encoders.
        torch_dtype: of the denoiser; None is float32.
        batch: samples at once.
        seed: of the noise.
        rank, size: of several workers, which all call this.

    Raises:
        FeaturesError (an OSError): no such folder, or its features are of another model.
        ValueError: a scheduler of another system, or one for predictions that its denoiser is never trained on.
    """
    kind = pipeline_class(path_or_id)
    pool, name = open_features(features, path_or_id), kind.denoiser_name
    parts = load_components(path_or_id, {name: kind.parts[name]}, torch_dtype, variant, device).components
    denoiser = parts[name].eval()
    denoiser.register_forward_pre_hook(_in_dtype)
    stage = next(stage for pipeline, stage in STAGES.items() if issubclass(kind, pipeline))
    objective = _objective(stage, denoiser, parts["scheduler"], pool)
    return validation_loss(objective, denoiser, pool, batch=batch, seed=seed, rank=rank, size=size)


def _objective(kind: type[PoolStage], denoiser: Any, scheduler: Scheduler, pool: Any) -> DenoiserObjective:
    """The objective whose loss that is."""
    own: dict[str, Any] = {}
    predicted = "flow" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else scheduler.config.prediction_type
    expected = {EpsilonStage: tuple(_PREDICTIONS), RectifiedFlowStage: ("flow",)}.get(kind, ("epsilon",))
    if predicted not in expected:
        raise ValueError(f"scheduler: expected one for predictions of {' or '.join(expected)}, got one of {predicted}")
    if predicted == "flow" and len(scheduler) != TRAIN_STEPS:
        raise ValueError(f"scheduler: num_train_timesteps: expected {TRAIN_STEPS} of a flow, got {len(scheduler)}")
    if kind is EpsilonStage:
        own = {"prediction": _PREDICTIONS[predicted], "train_steps": len(scheduler), "snr_gamma": 0.0}
    stage = kind(
        name="validation", objective="", steps=1, batch=1, learning_rate=0.0, warmup=0, decay=0, **own
    )  # of which no step is taken
    objective = denoiser_objective(denoiser, pool, stage, Streams(0, stage.name))
    if isinstance(objective, EpsilonObjective):
        objective.alpha_bar = scheduler.alphas_cumprod
    elif isinstance(objective, TextObjective):
        objective.process = DiffusionProcess(scheduler.betas)
    return objective


def _in_dtype(denoiser: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Latents and the text's states in the dtype of the weights, as pipelines hand them over; timesteps stay exact."""
    dtype: Any = denoiser.dtype
    return tuple(one.to(dtype) if isinstance(one, Tensor) and one.dim() > 2 else one for one in inputs)
