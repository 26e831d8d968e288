"""One, two and four processes with the same global batch, on DDP and on FSDP2: the same losses and weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast.training.parallel import ENGINES, World
from kolors_fast.training.trainer import Trainer

from .processes import spawn
from .tiny import make

NAMES = ("epsilon", "rectified_flow", "learned_variance")
STEPS = 4


def trainer(folder: Path, name: str, world: World, **settings: Any) -> Trainer:
    stage, objective = make(name, rank=world.rank, size=world.size, **settings)
    return Trainer(stage, objective, folder, world)


def steps_of(one: Trainer, count: int) -> list[float]:
    """The losses of the whole batch."""
    return [float(one.world.mean(one.train_step())) for _ in range(count)]


def whole_average(one: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in one._average().state_dict().items()}


def train_all(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Losses, norms and averages of every engine and objective; checkpoints of half the steps stay in `folder`."""
    found = {}
    for engine in ENGINES if size == 4 else ENGINES[:2]:
        os.environ["LOCAL_WORLD_SIZE"] = "2" if engine == "hybrid" else str(size)
        world = World(rank, size, engine)
        for name in NAMES if size == 2 or engine == "fsdp" else NAMES[:1]:
            one = trainer(folder / engine / name, name, world)
            losses = steps_of(one, STEPS // 2)
            one.save()
            losses += steps_of(one, STEPS - STEPS // 2)
            found[engine, name] = losses, whole_average(one)
        if size == 2:
            one = trainer(folder, "rectified_flow", world, accumulate=2)
            found[f"{engine}, in parts", "rectified_flow"] = steps_of(one, STEPS), whole_average(one)
        if engine == "ddp":
            one.loss(one.step).backward()
            gradients = [p.grad for p in one.module.parameters() if p.grad is not None]
            assert len({grad.untyped_storage().data_ptr() for grad in gradients}) == 1 < len(gradients)  # the bucket's
    return found


def resume_all(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What another number of processes, and the other engine, make of the checkpoints."""
    found = {}
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    for source, engine in (("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("hybrid", "fsdp")):
        for name in NAMES if source == engine == "fsdp" else NAMES[:1]:
            one = trainer(folder / source / name, name, World(rank, size, engine))
            one._resume()
            assert one.step == STEPS // 2
            found[source, engine, name] = steps_of(one, STEPS - STEPS // 2), whole_average(one)
    return found


def validate_all(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What the main process logs of pictures that are held out, and how many it looked at."""
    return {f"{e} {name}": validated(folder, name, World(rank, size, e)) for e in ENGINES[:2] for name in NAMES}


def validated(folder: Path, name: str, world: World) -> tuple[dict[str, float], int]:
    one: Any = trainer(folder / world.engine / name, name, world)
    one.objective.held_out, loss_at, seen = one.objective.pool, one.objective.loss_at, []
    one.objective.loss_at = lambda *arguments: seen.append(len(arguments[2])) or loss_at(*arguments)
    return one._validate(one._average()), sum(seen) // 8  # times


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    found = {}
    for name in NAMES:
        one = trainer(tmp_path_factory.mktemp(name), name, World())
        found[name] = steps_of(one, STEPS), whole_average(one)
    return found


def assert_same(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    losses, average = found
    assert losses == pytest.approx(expected[0][-len(losses) :], rel=1e-5)
    for name, value in average.items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo on Linux")
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_trains_the_same(
    tmp_path: Path, alone: dict[str, tuple[list[float], dict[str, Tensor]]], size: int
) -> None:
    found = spawn(train_all, size, tmp_path)
    assert len(found) == (5 if size == 4 else 8)
    for (_, name), result in found.items():
        assert_same(result, alone[name])
    if size == 4:
        for (*_, name), result in spawn(resume_all, 2, tmp_path).items():
            assert_same(result, alone[name])


@pytest.mark.skipif(sys.platform != "linux", reason="gloo on Linux")
def test_two_processes_validate_as_one_does(tmp_path: Path) -> None:
    """Sharing the work, or by the main one where no other has whole weights."""
    found = spawn(validate_all, 2, tmp_path)
    assert len(found) == 6
    for name in NAMES:
        alone, items = validated(tmp_path, name, World())
        assert len(alone) == 10 and items == 48
        for engine in ENGINES[:2]:
            figures, items = found[f"{engine} {name}"]
            assert figures == pytest.approx(alone, rel=1e-5)
            assert items == (24 if engine == "ddp" else 48)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    _, objective = make("epsilon", size=3)
    with pytest.raises(ValueError, match="batch: expected a multiple of 3, processes times accumulate, got 8"):
        objective.loss(0)


def test_engines_have_names() -> None:
    with pytest.raises(ValueError, match="engine: expected one of ddp, fsdp, hybrid, got 'zero'"):
        World.join("zero")
