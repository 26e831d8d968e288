"""The training loop: one for every objective."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from kolors_fast.evaluation.statistics import TimestepBins

from . import checkpoints
from .activation_checkpointing import checkpoint_activations
from .checkpoint import TrainingStateError
from .config import Stage
from .ema import EMA
from .gradient_scaling import BlockGradientScaler
from .log import Log
from .objectives import DenoiserObjective, Objective, validation_loss
from .parallel import World, gather_into
from .pool import Pool
from .report import write_report
from .streams import Streams
from .update import LossScale, clipped_step

PATIENCE = 100  # updates that may be skipped in a row
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by a stage's `autocast`


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint."""


class Trainer:
    """Trains an objective's module for the steps of a stage, resuming from the stage's folder.

    The folder receives checkpoints (weights, average, moments), a log and sample pictures. On one process a run that
    was killed and resumed has the weights, bit for bit, of a run that was not.

    Args:
        seed: of the objective's streams: a resumed run must have the same.
        accept_changes: resume although settings that change the mathematics differ from those of the checkpoint.
    """

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        folder: Path,
        world: World | None = None,
        *,
        seed: int = 0,
        accept_changes: bool = False,
    ) -> None:
        self.stage, self.objective, self.folder = stage, objective, folder
        self.world, self.accept_changes = world or World(), accept_changes
        self.settings = {"seed": seed, **dataclasses.asdict(stage)}
        self.module = objective.module.to(self.world.device).train()
        # what the monitor looks at where no process has a whole average
        self.whole = copy.deepcopy(self.module).eval() if self.world.sharded and self.world.is_main else None
        self.ema = EMA(self.module, stage.ema)
        if stage.activations != "all":
            checkpoint_activations(self.module, stage.activations)
        scale = stage.gradient_scale if stage.precision == "fp16" else "none"
        self.scaler = BlockGradientScaler(self.module, world=self.world) if scale == "block" else None
        self.loss_scale = LossScale(self.world.device) if scale == "global" else None
        for sharded in (self.module, self.ema.module):
            self.world.shard(sharded, replicate=not self.world.compresses(stage.power_sgd))
        self.compression = self.world.compress(self.module, stage.power_sgd, seed=seed)
        self.loss: Callable[[int], Tensor] = self.world.losses(objective, self.compression)
        # an adapter's checkpoint does without the weights that it is added to
        self.left_out = {n for n, p in self.module.named_parameters() if stage.lora and not p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=0.0, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.step = 0
        self.skipped = torch.zeros((), device=self.world.device)  # updates, for gradients that were not finite
        self.idle = 0  # updates skipped in a row, as far as it was reported
        self.log: Log | None = None  # of the main process, while it runs

    def run(self) -> nn.Module:
        """Train to the last step and return the averaged module, on the main process a whole one.

        Raises:
            Stopped: after Ctrl-C, once a checkpoint is written.
            TrainingStateError: no checkpoint can be read, or the settings are not those of it, or the loss or its
                gradient is no longer finite.
        """
        self._resume()
        self.log = Log(self.folder, self.step) if self.world.is_main else None
        losses: list[Tensor] = []
        report_every = max(10, min(100, self.stage.steps // 30))  # of a short run, too, a curve shall be seen
        started, skipped = time.time(), self.skipped.clone()
        with self._bar() as bar, _Interrupts(self.world.is_main) as interrupts, _no_old_garbage():
            while self.step < self.stage.steps:
                losses.append(self.train_step())
                bar.update()
                if self.step % report_every == 0 or self.step == self.stage.steps:
                    self._report(losses, float(self.skipped - skipped), (time.time() - started) / len(losses), bar)
                    losses, started, skipped = [], time.time(), self.skipped.clone()
                paused = time.time()
                saved = self.step % self.stage.checkpoint_every == 0 or self.step == self.stage.steps
                if saved:
                    self._save_or_tell()
                if self.step % self.stage.monitor_every == 0 or self.step == self.stage.steps:
                    self._monitor()
                started += time.time() - paused  # what is reported are steps
                if self.step < self.stage.steps and self.world.any(interrupts.seen):
                    where = self.folder / checkpoints.FOLDER if saved else self.save()
                    told = f"step {self.step} of '{self.stage.name}' is in {where}; the same command continues"
                    raise Stopped(told if self.world.is_main else "")
        if self.log is not None:
            self.log.close()
            tqdm.write(f"{self.stage.name}: {write_report(self.folder)}")
        return self._average()

    def train_step(self) -> Tensor:
        """One update; returns the loss of this process, on its device.

        An update whose gradient is not finite changes nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self._gradient()
        if self.compression is not None:
            self.compression.finish()
        if self.scaler is None:
            self.skipped += clipped_step(self.optimizer, self.stage.clip_norm, self.world, self.loss_scale)
        else:
            self.scaler.step(self.optimizer, self.stage.clip_norm)
            self.scaler.update()
            self.skipped.copy_(self.scaler.skipped)
        self.optimizer.zero_grad()
        self.ema.update(self.module)
        self.step += 1
        return loss

    def _gradient(self) -> Tensor:
        """The backward pass of this process's loss, which it returns; of its rows in parts, as though so many more
        processes were there. Each part's gradient is averaged by itself: DDP with a static graph has no other way.
        """
        parts, losses = self.stage.accumulate, []
        for part in range(parts):
            with part_of(self.objective, part, parts), computing_in(self.stage.autocast, self.world.device.type):
                loss = self.loss(self.step) / parts
            (loss if self.loss_scale is None else self.loss_scale.scale * loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear decay to zero: the constant part can be prolonged without starting anew."""
        stage = self.stage
        rising = (self.step + 1) / max(1, stage.warmup)
        falling = (stage.steps - self.step) / max(1, stage.decay)
        return stage.learning_rate * min(1.0, rising, falling)

    # ---- checkpoints

    def save(self) -> Path:
        """Write a checkpoint; all processes do."""
        if self.compression is not None:
            self.compression.average_errors()
        numbers = {"step": self.step, "updates": self.ema.updates, "settings": self.settings}
        return checkpoints.save(self.folder, self._tensors(), numbers, self.world)

    def _save_or_tell(self) -> None:
        try:
            self.save()
        except OSError as error:
            if self.stage.stop_on_failed_checkpoint:
                raise
            warnings.warn(f"{error}; training goes on", stacklevel=2)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.module.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        state = {"skipped": self.skipped}
        if self.scaler is not None:
            state |= {name: self.scaler.state_dict()[name] for name in ("exponents", "since")}
        if self.loss_scale is not None:
            state |= {"scale": self.loss_scale.scale, "growth_tracker": self.loss_scale.growth_tracker}
        return {
            "model": self._state(self.module), "average": self._state(self.ema.module), "optimizer": moments,
            "trainer": state, "power_sgd": self.compression.state() if self.compression is not None else {},
        }  # fmt: skip

    def _resume(self) -> None:
        found = checkpoints.latest(self.folder, self.world)
        if found is None:
            return
        self._compare(found)
        parameters = dict(self.module.named_parameters())
        for entry in found.names("optimizer"):
            name, key = entry.rsplit(".", 1)
            if name not in parameters:
                raise TrainingStateError(f"{found.path} does not fit stage '{self.stage.name}': it trained {name}")
            like = torch.zeros((), device=self.world.device) if key == "step" else torch.zeros_like(parameters[name])
            self.optimizer.state[parameters[name]][key] = like
        missing = sorted({*parameters} - {*found.names("model")} - self.left_out)
        if missing:
            raise TrainingStateError(f"{found.path} does not fit stage '{self.stage.name}': it has no {missing[0]}")
        tensors = self._tensors()
        kept = {*found.names("power_sgd")}  # another number of processes, or engine, compresses other parameters
        tensors["power_sgd"] = {name: tensor for name, tensor in tensors["power_sgd"].items() if name in kept}
        found.load_into(tensors, self.world)
        if self.scaler is not None:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "skipped": self.skipped})
        self.ema.updates, self.step = int(found.manifest["updates"]), found.step

    def _compare(self, found: checkpoints.Checkpoint) -> None:
        """Refuse to go on with other settings, but those that have changed nothing so far."""
        then: Mapping[str, Any] = found.manifest.get("settings", {})
        now = checkpoints.plain(self.settings)
        changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
        lengths = [settings.get("steps", 0) - settings.get("decay", 0) for settings in (then, now)]
        if found.step <= min(lengths):  # both in their constant part
            changed = [key for key in changed if key not in ("steps", "decay")]
        changed = [key for key in changed if key not in Stage.HARMLESS]
        if changed and not self.accept_changes:
            differences = ", ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed)
            raise TrainingStateError(f"{found.path} was trained with other settings: {differences}")

    # ---- what a person sees

    def _bar(self) -> Any:
        return tqdm(
            total=self.stage.steps,
            initial=self.step,
            desc=self.stage.name,
            unit="step",
            disable=not self.world.is_main,
            mininterval=10,
        )

    def _report(self, losses: list[Tensor], skipped: float, seconds: float, bar: Any) -> None:
        """Figures since the last report; here the loss is looked at for the first time, which waits for the device."""
        loss = float(self.world.mean(torch.stack(losses).mean()))
        self.idle = self.idle + len(losses) if skipped == len(losses) else 0
        if loss != loss or self.idle >= PATIENCE or (self.idle > 0 and self.step == self.stage.steps):
            raise TrainingStateError(
                f"stage '{self.stage.name}', step {self.step}: expected finite losses and gradients, got loss {loss} "
                f"and {self.idle} updates in a row that were skipped"
            )
        rate = self.stage.batch / seconds
        bar.set_postfix(loss=f"{loss:.4f}", images=f"{rate:.3g}/s")
        figures = {"loss": loss, "learning rate": self.optimizer.param_groups[0]["lr"], "seconds per step": seconds}
        bins: TimestepBins | None = getattr(self.objective, "bins", None)
        if bins is not None:
            bins.all_reduce()
            figures |= bins.read()
        self._log({**figures, "images per second": rate, "skipped updates": skipped})

    def _average(self) -> nn.Module:
        """The averaged module; of a sharded training a whole one on the main process, and the shards elsewhere."""
        if not self.world.sharded:
            return self.ema.module
        gather_into(self.whole, self.ema.module)
        return self.whole or self.ema.module

    def _monitor(self) -> None:
        average = self._average()
        with computing_in(self.stage.autocast, self.world.device.type):
            figures = self._validate(average)
            if self.world.is_main:
                figures = self.objective.monitor(average, self.folder / "samples", self.step) | figures
        if self.log is not None:
            self.log.picture(self.step, self.folder / "samples" / f"{self.step:06d}.png")
            if figures:
                self._log(figures)
                tqdm.write(f"{self.stage.name} {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        self.world.wait()

    def _validate(self, average: nn.Module) -> dict[str, float]:
        """The loss of pictures that are held out. Each process takes its share of them; where the weights are sharded
        the main one takes all, for it alone has a whole average."""
        held_out: Pool | None = getattr(self.objective, "held_out", None)
        if held_out is None or (self.world.sharded and not self.world.is_main):
            return {}
        rank, size = (0, 1) if self.world.sharded else (self.world.rank, self.world.size)
        objective, batch = cast(DenoiserObjective, self.objective), max(1, self.stage.batch // self.world.size)
        return validation_loss(objective, average, held_out, batch=batch, rank=rank, size=size).figures()

    def _log(self, figures: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.step, figures)

    def _parameter_groups(self) -> list[dict[str, object]]:
        """Weight decay for matrices and convolutions, none for biases and norms."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def _state(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in module.state_dict().items() if name not in self.left_out}


class _Interrupts:
    """Ctrl-C is noted, to be heard between steps; a second one interrupts at once."""

    def __init__(self, tells: bool) -> None:
        self.seen, self.tells = False, tells

    def __enter__(self) -> _Interrupts:
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread, which hears none
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        if self.tells:
            tqdm.write(
                "stopping after this step; Ctrl-C again stops at once, and loses what follows the last checkpoint"
            )


@contextlib.contextmanager
def _no_old_garbage() -> Iterator[None]:
    """The collector leaves alone what is there, all that is imported above all. bench/bench_training.py, which does not
    do so, shows what a pass over it takes: under selective checkpointing, which makes many objects, the longest of
    seven steps was 1.5 s and the median 0.78 (AMD EPYC)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def part_of(objective: Any, part: int, parts: int) -> Iterator[None]:
    """One of the equal parts of an objective's rows."""
    if parts == 1:
        yield
        return
    whole: Streams = objective.streams
    objective.streams = dataclasses.replace(whole, rank=whole.rank * parts + part, size=whole.size * parts)
    try:
        yield
    finally:
        objective.streams = whole


@contextlib.contextmanager
def computing_in(precision: str, device: str = "cpu") -> Iterator[None]:
    """bf16 and fp16: autocast of matrix products and convolutions, on a CPU attention's own left out."""
    dtype = AUTOCAST.get(precision)
    if dtype is None:
        yield
    elif device == "cpu":
        with torch.autocast("cpu", dtype), _AttentionInFloat32():
            yield
    else:
        with torch.autocast(device, dtype):
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
