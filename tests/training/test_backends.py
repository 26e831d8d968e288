"""Training on the fused ops against training in plain PyTorch: every objective, 20 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kolors_fast import without
from kolors_fast.ops import _backends, use_backend
from kolors_fast.savings import SAVINGS
from kolors_fast.training.trainer import Trainer

from .tiny import OBJECTIVES, make

STEPS = 20


def train(folder: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    stage, objective = make(name)
    trainer = Trainer(stage, objective, folder)
    losses = [float(trainer.train_step()) for _ in range(STEPS)]
    return losses, {key: value.detach().clone() for key, value in objective.module.named_parameters()}


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_training_is_that_of_plain_pytorch(tmp_path: Path, name: str) -> None:
    fused, ours = train(tmp_path, name)
    with use_backend("reference"), without(*SAVINGS):
        plain, theirs = train(tmp_path, name)
    assert fused != plain  # the backends do differ in rounding: else nothing is compared
    assert fused == pytest.approx(plain, rel=1e-5)
    before = {key: value.detach() for key, value in make(name)[1].module.named_parameters()}
    assert max(float((value - before[key]).norm() / value.norm()) for key, value in ours.items()) > 0.01
    error = torch.stack([(ours[key] - value).norm() for key, value in theirs.items()]).norm()
    assert float(error / torch.stack([value.norm() for value in theirs.values()]).norm()) < 1e-5
