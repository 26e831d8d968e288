"""Gradient scales, and adapters, where weights are sharded: one, two and four processes train the same."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kolors_fast.models.lora_adapter import save_lora
from kolors_fast.training import checkpoints
from kolors_fast.training import trainer as training
from kolors_fast.training.gradient_scaling import BlockGradientScaler
from kolors_fast.training.lora import LoRAConfig, add_lora
from kolors_fast.training.parallel import World, locals_of
from kolors_fast.training.trainer import Trainer

from .processes import spawn
from .test_parallel import assert_same, steps_of, whole_average
from .tiny import make

STEPS = 4
LORA = LoRAConfig(rank=4, targets=("to_q", "add_k_proj", "net.2"))


def trainer(folder: Path, name: str, world: World, **settings: Any) -> Trainer:
    stage, objective = make(name, rank=world.rank, size=world.size, **settings)
    if stage.lora is not None:
        add_lora(objective.module, stage.lora, seed=5)
    return Trainer(stage, objective, folder, world)


def main_average(one: Trainer) -> dict[str, Tensor]:
    """All make the average whole, and the main process has it."""
    average = whole_average(one)
    return average if one.world.is_main else {}


def scaled_by(exponent: int, one: Trainer) -> Trainer:
    if one.loss_scale is not None:
        one.loss_scale.scale.fill_(2.0**exponent)
    if one.scaler is not None:
        state = one.scaler.state_dict()
        state["exponents"].fill_(1000 * exponent)
        one.scaler.load_state_dict(state)
    return one


def half_and_global(folder: Path, world: World) -> dict[str, Any]:
    """Losses in float16, of blocks and of all, at scales at which nothing overflows.

    At 2^13 some does, and where depends on the number of processes: a loss that is the mean over fewer pictures has
    larger gradients in each.
    """
    found = {}
    for scale in ("block", "global"):
        one = scaled_by(8, trainer(folder / scale, "epsilon", world, precision="fp16", gradient_scale=scale))
        found[scale] = steps_of(one, STEPS)
        assert float(one.skipped) == 0
    return found


def in_float32(folder: Path, world: World) -> dict[str, Any]:
    """Losses and averages under scales of branches that do not round."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BlockGradientScaler", partial(BlockGradientScaler, dtype=torch.float32))
        for name in ("epsilon", "rectified_flow"):
            one = trainer(folder / name, name, world, precision="fp16")
            found[name] = steps_of(one, STEPS), main_average(one)
    return found


def spoilt(folder: Path, world: World, scale: str) -> dict[str, Tensor]:
    """What becomes of scales if the second update's gradient is infinite in one row of one layer: it comes from the
    last process's pictures, and lies in the first one's shard."""

    def spoil(_layer: nn.Module, _args: Any, output: Tensor) -> None:
        row = torch.arange(output.shape[-1]) == 0
        output.register_hook(lambda grad: grad.masked_fill(row, float("inf")))

    one = trainer(folder / scale, "rectified_flow", world, precision="fp16", gradient_scale=scale)
    one.train_step()
    if world.rank == world.size - 1:
        one.module.transformer_blocks[0].ff.net[0].proj.register_forward_hook(spoil)
    held = locals_of([*one.module.parameters(), *(state["exp_avg"] for state in one.optimizer.state.values())])
    before = [value.detach().clone() for value in held]
    one.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
    return one._tensors()["trainer"]


def plain(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in state.items()}


def adapted(folder: Path, world: World) -> dict[str, Any]:
    """An adapter trained, its file written, and a checkpoint of half the steps gone on with."""
    one = trainer(folder, "rectified_flow", world, lora=LORA)
    losses = steps_of(one, STEPS // 2)
    one.save()
    losses += steps_of(one, STEPS - STEPS // 2)
    average = main_average(one)
    module = one._average()
    if world.is_main:
        save_lora(module, folder / "adapter.safetensors")
    resumed = trainer(folder, "rectified_flow", world, lora=LORA)
    resumed._resume()
    return {
        "adapter": (losses, average),
        "resumed adapter": (steps_of(resumed, STEPS - STEPS // 2), main_average(resumed)),
    }


def train_all(rank: int, size: int, folder: Path) -> dict[str, Any]:
    if size > 1:  # a process of its own
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    world = World(rank, size, "fsdp" if size == 2 else "hybrid")
    found = {**in_float32(folder, world), **adapted(folder / "adapter", world)}
    found |= {f"spoilt {scale}": spoilt(folder / "spoilt", world, scale) for scale in ("block", "global")}
    if size < 4:
        found |= half_and_global(folder, world)
    if size == 2:
        found["spoilt on ddp"] = spoilt(folder / "ddp", World(rank, size, "ddp"), "global")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train_all(0, 1, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo on Linux")
@pytest.mark.parametrize("size", [2, 4], ids=["fsdp", "hybrid"])
def test_sharded_they_train_the_same(tmp_path: Path, alone: tuple[Path, dict[str, Any]], size: int) -> None:
    folder, expected = alone
    found = spawn(train_all, size, tmp_path)
    for name in ("epsilon", "rectified_flow", "adapter"):
        assert_same(found[name], expected[name])
    losses, average = found["adapter"]
    assert found["resumed adapter"][0] == losses[STEPS // 2 :]
    assert all(torch.equal(value, average[name]) for name, value in found["resumed adapter"][1].items())
    if size == 2:  # the gradients of each process's pictures are rounded to float16 by themselves
        for name in ("block", "global"):
            assert found[name] == pytest.approx(expected[name], rel=2**-11)

    for rank in range(size):  # all agree
        each = torch.load(tmp_path / f"train_all-{rank}.pt", weights_only=True)
        assert plain(each["spoilt block"]) == plain(expected["spoilt block"])
        assert plain(each["spoilt global"]) == plain(expected["spoilt global"])
        if size == 2:
            assert plain(each["spoilt on ddp"]) == plain(expected["spoilt global"])

    whole, ours = (load_file(path / "adapter" / "adapter.safetensors") for path in (folder, tmp_path))
    assert whole.keys() == ours.keys() and len(ours) == 2 * 7
    for name, value in ours.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=2e-5, msg=name)
    of_one, of_all = (checkpoints.latest(path / "adapter", World()) for path in (folder, tmp_path))
    assert of_one is not None and of_all is not None
    for part in ("model", "average", "optimizer", "trainer"):
        assert sorted(of_one.names(part)) == sorted(of_all.names(part))
    resumed = trainer(tmp_path / "adapter", "rectified_flow", World(), lora=LORA)  # one process goes on
    resumed._resume()
    assert_same((steps_of(resumed, STEPS - STEPS // 2), whole_average(resumed)), expected["adapter"])


def test_one_spoilt_layer_lowers_its_own_scale(alone: tuple[Path, dict[str, Any]]) -> None:
    blocks, whole = (alone[1][f"spoilt {scale}"] for scale in ("block", "global"))
    assert blocks["skipped"] == whole["skipped"] == 1
    assert blocks["exponents"].tolist() == [13_002, 12_501, 13_002, 13_002, 13_002]
    assert (whole["scale"], whole["growth_tracker"]) == (2.0**15, 0)
