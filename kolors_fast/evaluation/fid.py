"""The Frechet distance between two sets of pictures, as a feature extractor of the user's sees them."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import Moments

Features = Callable[[Tensor], Tensor]  # pictures uint8 [B, 3, H, W] -> features [B, D], or [B, D, 1, 1]


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2, the squared 2-Wasserstein distance of two Gaussians.

    With F F^T = C for each, the last trace is the sum of the singular values of F1^T F2, whose squares are the
    eigenvalues of C1 C2. F are the eigenvectors times the roots of the eigenvalues, without those that are zero to
    rounding: no root of a matrix that is not symmetric, and nothing special about singular covariances, which all are
    that come of fewer pictures than features. Such few pictures put the distance too high; compare equal counts.

    FID is this of an Inception-v3's pooled features (Heusel et al. 2017, https://arxiv.org/abs/1706.08500).
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features: expected two sets of one width, got {len(first.mean)} and {len(second.mean)}")
    mean1, mean2 = first.mean.cpu(), second.mean.cpu()
    covariance1, covariance2 = first.covariance.cpu(), second.covariance.cpu()
    common = torch.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * common
    return max(0.0, float(distance))  # which rounding may have taken below


def _factor(covariance: Tensor) -> Tensor:
    """F [D, r] with F F^T = covariance, r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def load_features(spec: str, device: torch.device | str = "cpu") -> tuple[Features, str]:
    """The feature extractor that `spec` names, and a name to keep with its statistics.

    Args:
        spec: a TorchScript file, or "module.path:name" of a callable, an nn.Module, or a class of the latter that is
            made without arguments. It is given uint8 pictures [B, 3, H, W] on `device`, RGB, and does the resizing and
            scaling that it needs. The name of a file is its SHA-256.

    Raises:
        ValueError: there is no such file, module or name, or it is not callable.
    """
    if Path(spec).is_file():
        try:
            found: Any = torch.jit.load(spec, map_location=device)
        except RuntimeError as error:
            raise ValueError(f"features: expected a TorchScript file, got {spec}, which torch cannot read") from error
        name = f"sha256:{hashlib.sha256(Path(spec).read_bytes()).hexdigest()}"
    else:
        found, name = _named(spec), spec
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = found()
    if not callable(found):
        raise ValueError(f"features: expected something callable, got {spec}, a {type(found).__name__}")
    if isinstance(found, nn.Module):
        found = found.eval().to(device)

    @torch.inference_mode()
    def features(pictures: Tensor) -> Tensor:
        rows = found(pictures.to(device))
        shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        if shape[:1] != [len(pictures)] or len(shape) < 2 or any(side != 1 for side in shape[2:]):
            raise ValueError(f"features: expected {spec} to return [{len(pictures)}, D], got {shape}")
        return rows.flatten(1)

    return features, name


def _named(spec: str) -> Any:
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(f"features: expected a TorchScript file or 'module.path:callable', got {spec!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: cannot import {spec!r} (is it on PYTHONPATH?): {error}") from error
