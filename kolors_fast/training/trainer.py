"""The training loop: one for every objective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .checkpoint import TrainingStateError, read_state, tensors, write_state
from .config import Stage
from .ema import EMA
from .log import Log
from .objectives import Objective
from .parallel import World

STATE = "state.pt"


class Trainer:
    """Trains an objective's module for the steps of a stage, resuming from the stage's folder.

    The folder receives `state.pt` (weights, average, optimizer, step), a log and sample pictures. On one process
    a run that was killed and resumed has the weights, bit for bit, of a run that was not.
    """

    def __init__(self, stage: Stage, objective: Objective, folder: Path, world: World | None = None) -> None:
        self.stage, self.objective, self.folder = stage, objective, folder
        self.world = world or World()
        self.module = objective.module.train()
        self.ema = EMA(self.module, stage.ema)
        # an adapter's checkpoint does without the weights that it is added to
        self.left_out = {n for n, p in self.module.named_parameters() if stage.lora and not p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=0.0, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.step = 0
        self.log: Log | None = None  # of the main process, while it runs

    def run(self) -> nn.Module:
        """Train to the last step and return the averaged module."""
        self._resume()
        self.log = Log(self.folder, self.step) if self.world.is_main else None
        with tqdm(
            total=self.stage.steps,
            initial=self.step,
            desc=self.stage.name,
            unit="step",
            disable=not self.world.is_main,
            mininterval=10,
        ) as bar:
            recent, started = [], time.time()
            while self.step < self.stage.steps:
                recent.append(self.train_step())
                bar.update()
                if self.step % 100 == 0 or self.step == self.stage.steps:
                    loss, seconds = sum(recent) / len(recent), (time.time() - started) / len(recent)
                    bar.set_postfix(loss=f"{loss:.4f}")
                    self._log({"loss": loss, "learning rate": self.learning_rate(), "seconds per step": seconds})
                    recent, started = [], time.time()
                if self.step % self.stage.checkpoint_every == 0 or self.step == self.stage.steps:
                    self.save()
                if self.step % self.stage.monitor_every == 0 or self.step == self.stage.steps:
                    self._monitor()
        if self.log is not None:
            self.log.close()
        return self.ema.module

    def train_step(self) -> float:
        """One update; returns the loss of this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with computing_in(self.stage.precision):
            loss = self.objective.loss(self.step)
        loss.backward()
        self.world.average_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.stage.clip_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.module)
        self.step += 1
        return float(loss.detach())

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear decay to zero: the constant part can be prolonged without starting anew."""
        stage = self.stage
        rising = (self.step + 1) / max(1, stage.warmup)
        falling = (stage.steps - self.step) / max(1, stage.decay)
        return stage.learning_rate * min(1.0, rising, falling)

    def save(self) -> None:
        """Write the checkpoint; the main process does."""
        if self.world.is_main:
            state = {
                "step": self.step,
                "model": self._state(self.module),
                "average": self._state(self.ema.module),
                "updates": self.ema.updates,
                "optimizer": self.optimizer.state_dict(),
            }
            write_state(self.folder / STATE, state)

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        state = read_state(path)
        try:
            for module, saved in ((self.module, state["model"]), (self.ema.module, state["average"])):
                own = module.state_dict()
                module.load_state_dict({**{name: own[name] for name in self.left_out}, **saved})
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.updates, self.step = state["updates"], state["step"]
        except (KeyError, RuntimeError, ValueError) as error:
            first_line = str(error).split("\n", 1)[0]
            raise TrainingStateError(f"{path} does not fit stage '{self.stage.name}': {first_line}") from error

    def _state(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value for name, value in tensors(module).items() if name not in self.left_out}

    def _parameter_groups(self) -> list[dict[str, object]]:
        """Weight decay for matrices and convolutions, none for biases and norms."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def _monitor(self) -> None:
        if self.world.is_main:
            with computing_in(self.stage.precision):
                figures = self.objective.monitor(self.ema.module, self.folder / "samples", self.step)
            self._log(figures)
            tqdm.write(f"{self.stage.name} {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        self.world.wait()

    def _log(self, figures: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.step, figures)


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """bf16: autocast of matrix products and convolutions, attention's own left out."""
    if precision == "fp32":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _AttentionInFloat32():
        yield


class _AttentionInFloat32(TorchFunctionMode):
    """Attention without autocast: forward and backward, the fused CPU attention takes 35 ms in fp32 and 88 in bf16, and
    plain products in bf16 54 (64 x 4 heads x 129 tokens x 32 channels, torch 2.13, one core of an AMD EPYC)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float32, args), **{name: _float32(value) for name, value in (kwargs or {}).items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
