"""A stage that trains an adapter: what it moves, averages, keeps and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kolors_fast.models.lora_adapter import load_lora, lora_of
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.training import checkpoints
from kolors_fast.training.checkpoint import TrainingStateError
from kolors_fast.training.config import EpsilonStage, RecipeError, load_recipe
from kolors_fast.training.lora import LoRAConfig, add_lora
from kolors_fast.training.parallel import World
from kolors_fast.training.session import Session
from kolors_fast.training.trainer import Trainer

MMDIT: dict[str, Any] = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
    "in_channels": 4,
    "out_channels": 4,
}
LORA = LoRAConfig(rank=8, targets=("to_q", "add_k_proj"))
STAGE = EpsilonStage(
    name="style", objective="epsilon", steps=8, batch=2, learning_rate=1e-2, warmup=0, decay=2, checkpoint_every=3,
    precision="fp32", lora=LORA,
)  # fmt: skip


class Killed(Exception):
    pass


class Objective:
    """Noise from noise, by the step's number."""

    killed_at: int | None = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = MMDiT(**MMDIT)

    def loss(self, step: int) -> Tensor:
        if step == self.killed_at:
            raise Killed
        generator = torch.Generator().manual_seed(step)
        latents, text, pooled = (
            torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 10), (2, 7))
        )
        got = self.module(latents, text, pooled, torch.tensor([30.0, 990.0])).sample
        return (got - latents).square().mean()

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        with torch.no_grad():
            averaged(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 10), torch.zeros(1, 7), torch.tensor([30.0]))
        return {}


def trainer(folder: Path, killed_at: int | None = None, stage: EpsilonStage = STAGE) -> Trainer:
    objective = Objective()
    objective.killed_at = killed_at
    assert stage.lora is not None
    add_lora(objective.module, stage.lora, seed=5)
    return Trainer(stage, objective, folder)


def test_killed_and_resumed_it_is_bit_for_bit_the_same_from_a_small_checkpoint(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    averaged = whole.run()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", killed_at=5).run()
    found = checkpoints.latest(tmp_path / "killed", World())
    assert found is not None and found.step == 3
    names = {f"{path}.lora_{part}.default.weight" for path in lora_of(averaged) for part in "AB"}
    assert set(found.names("model")) == set(found.names("average")) == names | {"pos_embed.pos_embed"}  # a buffer
    resumed = trainer(tmp_path / "killed")
    resumed.run()
    for one, other in ((resumed.module, whole.module), (resumed.ema.module, averaged)):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    with pytest.raises(TrainingStateError, match=r"other settings: lora was \{'rank': 8, "):
        trainer(tmp_path / "killed", stage=replace(STAGE, lora=replace(LORA, rank=4))).run()


def test_the_average_is_of_the_adapter_alone(tmp_path: Path) -> None:
    run, plain = trainer(tmp_path), Objective().module
    run.run()
    assert len(run.optimizer.state) == 2 * len(lora_of(run.module))
    for (name, ours), average in zip(run.module.named_parameters(), run.ema.module.parameters(), strict=True):
        assert (ours is average) == ("lora_" not in name)
        if ours is average:
            assert torch.equal(ours, plain.get_parameter(name.replace(".base_layer", "")))
        else:
            assert not torch.equal(ours, average)


def test_a_session_exports_the_adapter(tmp_path: Path) -> None:
    class Only(Session):
        index: ClassVar = {}

        def _prepare(self) -> None: ...

        def _objective(self, stage: Any, folder: Path) -> Any:
            return Objective()

        def _keep(self, *_: Any) -> None:
            raise AssertionError

    session = Only(load_recipe("kolors-tiny"), tmp_path, World())
    session.train(STAGE)
    assert json.loads((tmp_path / "style" / "done.json").read_text()) == {"steps": 8}
    model = Objective().module
    load_lora(model, tmp_path / "style" / "pytorch_lora_weights.safetensors")
    assert {lora.rank for lora in lora_of(model).values()} == {8}
    assert any(lora.up.any() for lora in lora_of(model).values())


def test_recipes(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "kolors_fast/training/recipes/kolors-tiny.toml").read_text(encoding="utf-8")
    file = tmp_path / "style.toml"
    head, stage = text.rsplit("[[stage]]", 1)

    def write(lora: str, stage: str = stage) -> Any:
        file.write_text(f"{head}[[stage]]{stage}\nlora = {lora}\n", encoding="utf-8")
        return load_recipe(file).stages[-1]

    assert write("{rank = 8, targets = ['to_q']}").lora == LoRAConfig(8, None, ("to_q",))
    assert write("{rank = 8, alpha = 4}").lora == LoRAConfig(8, 4.0)
    with pytest.raises(RecipeError, match="lora: rank: expected 1 or more, got 0"):
        write("{rank = 0}")
    with pytest.raises(RecipeError, match="lora: unknown key 'ranks'"):
        write("{ranks = 4}")
    with pytest.raises(RecipeError, match="lora: expected only where a denoiser is trained"):
        write("{rank = 4}", text.split("[[stage]]")[1])
