"""PowerSGD between replicas: against float64 and against training without it, and over resumes and infinities."""

from __future__ import annotations

import math
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kolors_fast.models.dit_layers import FeedForward
from kolors_fast.training import power_sgd
from kolors_fast.training.checkpoint import TrainingStateError
from kolors_fast.training.config import RecipeError, Stage, parse_recipe
from kolors_fast.training.parallel import World
from kolors_fast.training.power_sgd import PowerSGDConfig, rank_of
from kolors_fast.training.trainer import Trainer

from .processes import spawn
from .tiny import make

SIZE, SHARDS = 4, 2  # processes, and how many of them hold a copy where weights are sharded
ENGINES = ("ddp", "hybrid")
STEPS = 4
SHAPES = {
    "bias": (40,), "wide": (24, 30), "one.tall": (64, 12), "one.conv": (12, 5, 3, 3), "two.odd": (15, 26),
    "two.dead": (24, 30), "two.gain": (16,), "two.small": (6, 6), "words.weight": (32, 24),
}  # fmt: skip
RANKS = {"ddp": (2, 3), "hybrid": (2,)}  # torch orthonormalises two columns otherwise than three
INFINITE = ("two.odd", "bias")  # of matrices, and of what is sent as it is
COMPRESSED = {"wide", "one.tall", "one.conv", "two.odd", "two.dead"}
STAGE = Stage("given", "given", 20, 4, 1e-2, warmup=0, decay=0, precision="fp32", power_sgd=PowerSGDConfig(2))


# ---- a module whose gradients are known


class Part(FeedForward):
    """Parameters that FSDP2 shards as a group; x + the sum of their products with given tensors."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        nn.Module.__init__(self)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(direction(name, 0, -1, shape)))

    def forward(self, x: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
        assert given is not None
        return sum(((p * given[name]).sum() for name, p in self.named_parameters() if name != "dead"), x)


class Given(nn.Module):
    """An objective and its module, whose gradients are `directions`.

    Args:
        infinite: the process, step and parameter of a gradient that is not finite.
    """

    def __init__(self, rank: int, infinite: tuple[int, int, str] | None = None, constant: bool = False) -> None:
        super().__init__()
        self.rank, self.infinite, self.constant = rank, infinite, constant
        self.bias, self.wide = (nn.Parameter(direction(name, 0, -1)) for name in ("bias", "wide"))
        for part in ("one", "two"):
            shapes = {name.removeprefix(f"{part}."): shape for name, shape in SHAPES.items() if name.startswith(part)}
            self.add_module(part, Part(shapes))
        self.words = nn.Embedding(*SHAPES["words.weight"], _weight=direction("words.weight", 0, -1))

    @property
    def module(self) -> nn.Module:
        return self

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        x = (self.bias * given["bias"]).sum() + (self.wide * given["wide"]).sum()
        x = x + (self.words(torch.arange(32)) * given["words.weight"]).sum()
        for part in ("one", "two"):
            inner = {n.removeprefix(f"{part}."): value for n, value in given.items() if n.startswith(part)}
            x = self.get_submodule(part)(x, inner)
        return x

    def loss(self, step: int) -> Tensor:
        given = directions(self.rank, 1 if self.constant else step)
        if self.infinite is not None and self.infinite[:2] == (self.rank, step):
            given[self.infinite[2]].view(-1)[3] = float("inf")
        return self(given)

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        return {}


def direction(name: str, rank: int, step: int, shape: tuple[int, ...] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {rank} {step}".encode()))
    return torch.randn(shape or SHAPES[name], generator=generator)


def directions(rank: int, step: int) -> dict[str, Tensor]:
    """Of "one.tall" they begin late, as those behind a gate that starts at zero do."""
    given = {name: direction(name, rank, step) for name in SHAPES}
    return given if step > 0 else {**given, "one.tall": torch.zeros(SHAPES["one.tall"])}


# ---- in each process


def world_of(engine: str, rank: int) -> World:
    os.environ["LOCAL_WORLD_SIZE"] = str(SHARDS if engine == "hybrid" else SIZE)
    return World(rank, SIZE, engine)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def errors_of(one: Trainer) -> dict[str, Tensor]:
    """The mean over replicas, whole."""
    assert one.compression is not None
    return {name: one.world.mean(whole(error)) for name, error in one.compression.errors.items()}


def given_trainer(folder: Path, engine: str, rank: int, stage: Stage = STAGE, **options: Any) -> Trainer:
    return Trainer(stage, Given(rank, **options), folder, world_of(engine, rank), seed=3)


def reduce_given(folder: Path, engine: str, rank: int, config: PowerSGDConfig, steps: int) -> dict[str, Any]:
    """Gradients and mean errors of every step, and the first Q."""
    one = given_trainer(folder, engine, rank, replace(STAGE, power_sgd=config))
    assert one.compression is not None
    found, starts = [], {name: q.clone() for name, q in one.compression.starts.items()}
    for step in range(steps):
        one.loss(step).backward()
        one.compression.finish()
        gradients = {name: whole(p.grad) for name, p in one.module.named_parameters() if p.grad is not None}
        found.append((gradients, errors_of(one)))
        one.optimizer.zero_grad()
    return {"steps": found, "starts": starts}


def feed_back(folder: Path, engine: str, rank: int) -> list[dict[str, Tensor]]:
    """Sums of the gradients of a constant one, after 0, 16 and 32 updates."""
    one = given_trainer(folder, engine, rank, constant=True)
    assert one.compression is not None
    found: list[dict[str, Tensor]] = [{name: torch.zeros(SHAPES[name]) for name in one.compression.errors}]
    for _ in range(2):
        sums = {name: total.clone() for name, total in found[-1].items()}
        for step in range(16):
            one.loss(step).backward()
            one.compression.finish()
            for name, p in one.module.named_parameters():
                if name in sums and p.grad is not None:
                    sums[name] += whole(p.grad)
            one.optimizer.zero_grad()
        found.append(sums)
    return found


def messages(folder: Path, engine: str, rank: int) -> list[int]:
    """The numbers in what one update gives to other replicas."""
    one = given_trainer(folder, engine, rank)
    assert one.compression is not None
    sent, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    one.loss(1).backward()
    one.compression.finish()
    dist.all_reduce = all_reduce
    return sent


def overflow(folder: Path, engine: str, rank: int, name: str) -> list[dict[str, Any]]:
    """Of updates, of which the second meets an infinite gradient in one process."""
    one = given_trainer(folder, engine, rank, infinite=(1, 1, name))
    assert one.compression is not None
    found = []
    for _ in range(3):
        one.train_step()
        weights = {n: whole(p.detach()) for n, p in one.module.named_parameters()}
        starts = {n: q.clone() for n, q in one.compression.starts.items()}
        found.append({"skipped": float(one.skipped), "weights": weights, "errors": errors_of(one), "starts": starts})
    return found


def resume(folder: Path, engine: str, rank: int) -> dict[str, Any]:
    """A run that goes on behind its checkpoint, and one that is resumed from there."""
    found = {}
    one = given_trainer(folder, engine, rank)
    while one.step < 6:
        one.train_step()
        if one.step == 3:
            one.save()
            found["saved"] = errors_of(one)
    found["left alone"] = {n: whole(p.detach()) for n, p in one.module.named_parameters()}
    one = given_trainer(folder, engine, rank)
    one._resume()
    assert one.step == 3
    while one.step < 6:
        one.train_step()
    return found | {"resumed": {n: whole(p.detach()) for n, p in one.module.named_parameters()}}


def resume_by_another(folder: Path, rank: int) -> dict[str, Tensor]:
    """The errors that DistributedDataParallel takes over from shards."""
    one = given_trainer(folder, "ddp", rank)
    one._resume()
    return errors_of(one)


def train(folder: Path, engine: str, rank: int) -> tuple[list[float], dict[str, Tensor]]:
    """A UNet at full rank: losses of the whole batch, and the average of its weights."""
    stage, objective = make("epsilon", rank=rank, size=SIZE, power_sgd=PowerSGDConfig(1000))
    one = Trainer(stage, objective, folder, world_of(engine, rank))
    losses = [float(one.world.mean(one.train_step())) for _ in range(STEPS)]
    return losses, {name: value.clone() for name, value in one._average().state_dict().items()}


def all_of_it(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[Any, Any] = {}
    for engine in ENGINES:
        for r in RANKS[engine]:
            found["reduced", engine, r] = reduce_given(folder, engine, rank, PowerSGDConfig(r), STEPS)
        found["reduced", engine, "fixed"] = reduce_given(folder, engine, rank, PowerSGDConfig(2, False), STEPS)
        for name in INFINITE:
            found["overflow", engine, name] = overflow(folder, engine, rank, name)
        found["messages", engine] = messages(folder, engine, rank)
        found["fed back", engine] = feed_back(folder, engine, rank)
        found["resume", engine] = resume(folder / engine, engine, rank)
    set_hook = FSDPModule.set_all_reduce_hook
    del FSDPModule.set_all_reduce_hook  # as torch 2.6 has none
    found["without hooks"] = reduce_given(folder, "hybrid", rank, PowerSGDConfig(2), STEPS)
    FSDPModule.set_all_reduce_hook = set_hook
    found["resume", "another"] = resume_by_another(folder / "hybrid", rank)
    power_sgd.LEAST_RATE = 0.0  # even what is not worth it
    for engine in ENGINES:
        found["full rank", engine] = train(folder / "full" / engine, engine, rank)
    return found


# ---- what they found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    if sys.platform != "linux":
        pytest.skip("gloo on Linux")
    return spawn(all_of_it, SIZE, tmp_path_factory.mktemp("power_sgd"))


class Reference:
    """The replicas of one matrix, in float64. P P^T is a projection, so that any basis of its space will do for P."""

    def __init__(self, start: Tensor, ridge: float, warm: bool) -> None:
        self.start, self.ridge, self.warm = start.double(), ridge, warm
        self.errors = [torch.zeros(())] * SIZE

    def reduce(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """G, and the mean error that it leaves."""
        sums = [gradient + error for gradient, error in zip(gradients, self.errors, strict=False)]
        mean = torch.stack(sums).mean(0)
        left = mean @ self.start
        basis = torch.linalg.svd(left + self.ridge * torch.eye(*left.shape, dtype=left.dtype), full_matrices=False).U
        right = mean.T @ basis
        if self.warm and right.any():
            self.start = right / right.norm(dim=0)
        product = basis @ right.T
        self.errors = [total - product for total in sums]
        return product, torch.stack(self.errors).mean(0)


def expected(engine: str, starts: dict[str, Tensor], warm: bool) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What `reduce_given` finds, by one process that plays all of them."""
    shards, ridge = (SHARDS, 1e-6) if engine == "hybrid" else (1, 0.0)
    references = {(name, k): Reference(start, ridge, warm) for name, start in starts.items() for k in range(shards)}
    found = []
    for step in range(STEPS):
        given = [{n: g.double() for n, g in directions(rank, step).items()} for rank in range(SIZE)]
        for one in given:
            one["two.dead"].zero_()
        gradients, errors = {}, {}
        for name, shape in SHAPES.items():
            replicas = [torch.stack([g[name] for g in given[k : k + shards]]).mean(0) for k in range(0, SIZE, shards)]
            gradients[name] = torch.stack(replicas).mean(0)
            if name not in starts:
                continue
            parts = []
            for k, matrices in enumerate(zip(*(r.flatten(1).chunk(shards) for r in replicas), strict=True)):
                turned = engine == "hybrid" and matrices[0].shape[0] > matrices[0].shape[1]
                pair = references[name, k].reduce([one.T if turned else one for one in matrices])
                parts.append([one.T if turned else one for one in pair])
            gradients[name], errors[name] = (torch.cat(one).view(shape) for one in zip(*parts, strict=True))
        found.append((gradients, errors))
    return found


def assert_close(mine: dict[str, Tensor], right: dict[str, Tensor], where: str = "") -> None:
    for name, value in mine.items():
        torch.testing.assert_close(
            value,
            right[name].to(value.dtype),
            rtol=1e-4,
            atol=2e-5,
            msg=lambda text, name=name: f"{where}{name}: {text}",
        )


@pytest.mark.parametrize(("engine", "rank"), [(e, rank) for e in ENGINES for rank in (*RANKS[e], "fixed")])
def test_gradients_and_errors_are_those_of_float64(found: dict[Any, Any], engine: str, rank: int | str) -> None:
    result = found["reduced", engine, rank]
    # DistributedDataParallel does not tell an embedding from other matrices
    assert {*result["starts"]} == COMPRESSED | ({"words.weight"} if engine == "ddp" else set())
    for step, (gradients, errors) in enumerate(expected(engine, result["starts"], rank != "fixed")):
        mine = result["steps"][step]
        assert {*mine[0]} == {*SHAPES} - {"two.dead"} and {*mine[1]} == {*errors}
        assert_close(mine[0], gradients, f"step {step}, gradient of ")
        assert_close(mine[1], errors, f"step {step}, error of ")


def test_gradients_are_the_same_after_the_backward_pass_and_during_it(found: dict[Any, Any]) -> None:
    for (gradients, errors), after in zip(
        found["reduced", "hybrid", 2]["steps"], found["without hooks"]["steps"], strict=True
    ):
        for now, then in ((gradients, after[0]), (errors, after[1])):
            assert all(torch.equal(now[name], then[name]) for name in now)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_sent_is_what_shapes_say(found: dict[Any, Any], engine: str) -> None:
    """(rows + columns) r of a matrix, in two messages for what is reduced together."""
    shards, names = (1, SHAPES) if engine == "ddp" else (SHARDS, SHAPES.keys() - {"two.dead"})
    count = 0
    for name in names:
        rows, columns = math.ceil(SHAPES[name][0] / shards), math.prod(SHAPES[name][1:])
        takes_part = name in COMPRESSED or (engine == "ddp" and name == "words.weight")
        count += (rows + columns) * 2 if takes_part else rows * columns
    sent = [one for one in found["messages", engine] if one]
    assert sum(sent) == count
    assert len(sent) == (3 if engine == "ddp" else 2 * 3)  # torch sends apart what is not compressed


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_constant_gradient_all_is_sent_in_the_end(found: dict[Any, Any], engine: str) -> None:
    """The mean of 16 compressed gradients is off by what the errors hold, and that of 32 by half as much."""
    means = [
        {name: total / count for name, total in found["fed back", engine][k].items()} for k, count in ((1, 16), (2, 32))
    ]
    for name in means[0].keys() - {"two.dead"}:
        true = torch.stack([direction(name, rank, 1) for rank in range(SIZE)]).mean(0)
        off = [float((mean[name] - true).norm() / true.norm()) for mean in means]
        assert off[0] < 0.5 and off[1] < 0.6 * off[0], (name, off)


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_gradient_in_one_process_skips_the_update_and_poisons_nothing(
    found: dict[Any, Any], engine: str, name: str
) -> None:
    before, at, after = found["overflow", engine, name]
    assert [before["skipped"], at["skipped"], after["skipped"]] == [0, 1, 1]
    for n, weight in before["weights"].items():
        assert torch.equal(at["weights"][n], weight), n
        assert n == "two.dead" or not torch.equal(after["weights"][n], weight), n
    # what is sent with it: all in one bucket, or the first shards of one FSDP module
    together = {"two.odd", "two.dead"} if name == "two.odd" else {"wide"}
    for n, error in before["errors"].items():
        assert at["errors"][n].isfinite().all() and after["errors"][n].isfinite().all(), n
        assert n == "two.dead" or not torch.equal(after["errors"][n], error), n
        if engine == "ddp" or n in together:
            rows = len(error) if engine == "ddp" else math.ceil(len(error) / SHARDS)
            assert torch.equal(at["errors"][n][:rows], error[:rows]), n
            assert torch.equal(at["starts"][n], before["starts"][n]), n


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_run_that_went_on(found: dict[Any, Any], engine: str) -> None:
    result = found["resume", engine]
    assert all(error.any() for name, error in result["saved"].items() if name != "two.dead")
    for name, weight in result["left alone"].items():
        # buckets are laid out anew, and gloo sums them in another order
        torch.testing.assert_close(result["resumed"][name], weight, rtol=1e-6, atol=1e-6, msg=name)


def test_errors_outlive_a_change_of_engine(found: dict[Any, Any]) -> None:
    for name, error in found["resume", "hybrid"]["saved"].items():
        assert torch.equal(found["resume", "another"][name], error), name


@pytest.mark.parametrize("engine", ENGINES)
def test_at_full_rank_training_is_that_without_compression(found: dict[Any, Any], engine: str, tmp_path: Path) -> None:
    stage, objective = make("epsilon")
    one = Trainer(stage, objective, tmp_path)
    losses = [float(one.train_step()) for _ in range(STEPS)]
    assert found["full rank", engine][0] == pytest.approx(losses, rel=1e-5)
    assert_close(found["full rank", engine][1], one.ema.module.state_dict())


# ---- what needs one process


def test_half_of_a_matrix_is_the_most_that_is_sent() -> None:
    assert rank_of(64, 64, 15) == 15 and rank_of(64, 64, 16) == 0  # (64 + 64) 16 is half of 64^2
    assert rank_of(4096, 3, 8) == 0 and rank_of(4096, 3, 1) == 1  # a rank is no more than the shorter side


def test_one_replica_trains_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trainer(STAGE, Given(0), tmp_path)
    one.train_step()
    other = Trainer(replace(STAGE, power_sgd=None), Given(0), tmp_path)
    other.train_step()
    assert all(map(torch.equal, one.module.parameters(), other.module.parameters()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not World(0, 2, "hybrid").compresses(STAGE.power_sgd)  # one machine
    assert World(0, 4, "hybrid").compresses(STAGE.power_sgd)


def test_what_cannot_be_compressed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="engine: expected ddp or hybrid with power_sgd, got fsdp, which has no replicas"
    ):
        Trainer(STAGE, Given(0), tmp_path, World(0, 2, "fsdp"))
    with pytest.raises(ValueError, match="power_sgd: expected a rank at which a matrix is compressed, got 50: none is"):
        Trainer(replace(STAGE, power_sgd=PowerSGDConfig(50)), Given(0), tmp_path, World(0, 2, "ddp"))
    with pytest.raises(RecipeError, match="precision: expected fp32 or bf16 with power_sgd, got 'fp16'"):
        make("epsilon", precision="fp16", power_sgd=PowerSGDConfig(8))
    with pytest.raises(RecipeError, match="accumulate: expected 1 with power_sgd, got 2"):
        make("epsilon", accumulate=2, power_sgd=PowerSGDConfig(8))


def test_a_recipe_has_a_table_for_it() -> None:
    table: dict[str, Any] = {"name": "t", "system": "pretrained", "pretrained": "kolors-tiny", "seed": 0}
    stage = {"name": "s", "objective": "epsilon", "steps": 2000, "batch": 8, "learning_rate": 1e-3}
    recipe = parse_recipe({**table, "stage": [{**stage, "power_sgd": {"rank": 8}}]}, "recipe")
    assert recipe.stages[0].power_sgd == PowerSGDConfig(8)
    with pytest.raises(RecipeError, match="power_sgd: rank: expected 1 or more, got 0"):
        parse_recipe({**table, "stage": [{**stage, "power_sgd": {"rank": 0}}]}, "recipe")
    with pytest.raises(RecipeError, match="power_sgd: missing key 'rank'"):
        parse_recipe({**table, "stage": [{**stage, "power_sgd": {}}]}, "recipe")


def test_another_rank_is_another_training(tmp_path: Path) -> None:
    Trainer(STAGE, Given(0), tmp_path).save()
    with pytest.raises(TrainingStateError, match=r"power_sgd was {'rank': 2, .*} and is {'rank': 3, "):
        Trainer(replace(STAGE, power_sgd=PowerSGDConfig(3)), Given(0), tmp_path)._resume()
