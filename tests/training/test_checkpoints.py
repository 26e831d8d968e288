"""What is on disk: whole or not there, and what becomes of a run whose disk, settings or user are in its way."""

from __future__ import annotations

import json
import pickle
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_fast.training import checkpoints
from kolors_fast.training.checkpoint import TrainingStateError
from kolors_fast.training.config import RecipeError, Stage
from kolors_fast.training.parallel import World
from kolors_fast.training.trainer import Stopped, Trainer

from .tiny import make

STAGE = Stage("stage", "regression", 12, 4, 1e-2, warmup=2, decay=4, checkpoint_every=3, precision="fp32")


class Regression:
    """A small network fits x -> sin x; `event(step)` happens before a loss is computed."""

    def __init__(self, event: Any = None) -> None:
        torch.manual_seed(1)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.event = event

    def loss(self, step: int) -> Tensor:
        if self.event is not None:
            self.event(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (self.module(x) - x.sin()).square().mean()

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        return {}


def trainer(folder: Path, stage: Stage = STAGE, event: Any = None, **options: Any) -> Trainer:
    return Trainer(stage, Regression(event), folder, **options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / checkpoints.FOLDER).iterdir())


def stop_at(step: int) -> Any:
    def event(now: int) -> None:
        if now == step:
            raise RuntimeError("killed")

    return event


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that died in step 8, behind the checkpoints of 3 and 6."""
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, event=stop_at(8)).run()
    assert kept(tmp_path) == ["00000003", "00000006"]
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    one = trainer(tmp_path_factory.mktemp("whole"))
    one.run()
    return one


def assert_same(one: Trainer, other: Trainer) -> None:
    assert torch.equal(weights(one.module), weights(other.module))
    assert torch.equal(weights(one.ema.module), weights(other.ema.module))
    for mine, its in zip(one.module.parameters(), other.module.parameters(), strict=True):
        for key, value in one.optimizer.state[mine].items():
            assert torch.equal(value, other.optimizer.state[its][key]), key


def test_the_last_two_are_kept_and_the_end_is_bit_for_bit_the_same(killed: Path, whole: Trainer) -> None:
    resumed = trainer(killed)
    resumed.run()
    assert kept(killed) == ["00000009", "00000012"]
    assert_same(resumed, whole)


@pytest.mark.parametrize("damage", ["truncated", "changed", "manifest", "file gone", "half a manifest"])
def test_a_broken_checkpoint_is_told_and_the_one_before_is_taken(killed: Path, whole: Trainer, damage: str) -> None:
    newest = killed / checkpoints.FOLDER / "00000006"
    data = next(newest.glob("__*"))
    content = data.read_bytes()
    if damage == "truncated":
        data.write_bytes(content[:-100])
    elif damage == "changed":
        data.write_bytes(content[:-100] + bytes(100))
    elif damage == "file gone":
        data.unlink()
    elif damage == "manifest":
        (newest / checkpoints.MANIFEST).unlink()
    else:
        text = (newest / checkpoints.MANIFEST).read_text()
        (newest / checkpoints.MANIFEST).write_text(text[: len(text) // 2])
    resumed = trainer(killed)
    with pytest.warns(UserWarning, match=r"00000006 is .*; taking the checkpoint before it"):
        resumed._resume()
    assert resumed.step == 3
    resumed.run()
    assert_same(resumed, whole)


def test_if_all_are_broken_nothing_is_trained_anew(killed: Path) -> None:
    for data in killed.glob(f"{checkpoints.FOLDER}/*/__*"):
        data.write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(TrainingStateError, match=r"00000006 is broken: __0_0\.distcp has 0 bytes, expected"),
    ):
        trainer(killed).run()


def test_what_a_killed_write_left_is_no_checkpoint(killed: Path, whole: Trainer) -> None:
    half = killed / checkpoints.FOLDER / ".00000009.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    resumed = trainer(killed)
    resumed.run()
    assert_same(resumed, whole)
    assert kept(killed) == ["00000009", "00000012"]


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.dcp, "save", fails)


def test_a_full_disk_stops_the_run_and_leaves_what_was_there(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"00000009 was not written: \[Errno 28\] No space left on device"):
        trainer(killed).run()
    assert kept(killed) == ["00000003", "00000006"]


def test_a_full_disk_is_told_and_training_goes_on_if_so_wanted(
    killed: Path, whole: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    resumed = trainer(killed, replace(STAGE, stop_on_failed_checkpoint=False))
    with pytest.warns(UserWarning, match=r"00000009 was not written: .*; training goes on"):
        resumed.run()
    assert_same(resumed, whole)
    assert kept(killed) == ["00000003", "00000006"]


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, whole: Trainer) -> None:
    def interrupt(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"step 8 of 'stage' is in .*00000008; the same command continues"):
        trainer(tmp_path, event=interrupt).run()
    assert signal.getsignal(signal.SIGINT) is before
    resumed = trainer(tmp_path)
    resumed.run()
    assert_same(resumed, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer(tmp_path, event=interrupt).run()
    assert not isinstance(stopped.value, Stopped)
    assert kept(tmp_path) == ["00000003", "00000006"]


def test_other_settings_are_listed_and_refused(killed: Path) -> None:
    with pytest.raises(
        TrainingStateError, match=r"other settings: learning_rate was 0\.01 and is 0\.02, seed was 0 and"
    ):
        trainer(killed, replace(STAGE, learning_rate=2e-2), seed=5).run()
    one = trainer(killed, replace(STAGE, learning_rate=2e-2), seed=5, accept_changes=True)
    one._resume()
    assert one.step == 6


def test_settings_that_have_changed_nothing_so_far_are_free(killed: Path) -> None:
    one = trainer(killed, replace(STAGE, steps=40, decay=10, checkpoint_every=5, monitor_every=7))
    one._resume()
    assert one.step == 6
    with pytest.raises(TrainingStateError, match="decay was 4 and is 8, steps was 12 and is 13"):
        trainer(killed, replace(STAGE, steps=13, decay=8)).run()  # which would have begun to fall at 5


def test_a_checkpoint_of_another_model_is_refused(killed: Path) -> None:
    one = trainer(killed)
    one.module[0] = nn.Linear(3, 9)
    with pytest.raises(TrainingStateError, match=r"00000006 does not fit"):
        one._resume()


def test_nothing_but_torchs_descriptions_is_unpickled(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    path = tmp_path / checkpoints.FOLDER / "00000012"
    (path / ".metadata").write_bytes(pickle.dumps(print))
    manifest = json.loads((path / checkpoints.MANIFEST).read_text())
    manifest["files"] = checkpoints._sums([p for p in path.iterdir() if p.name != checkpoints.MANIFEST])
    (path / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TrainingStateError, match=r"builtins\.print has no place in a checkpoint"):
        trainer(tmp_path)._resume()


def test_an_update_of_nonfinite_gradients_changes_nothing(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    for _ in range(3):
        one.train_step()
    before = weights(one.module).clone()
    moments = [value.clone() for state in one.optimizer.state.values() for value in state.values()]
    one.module[0].weight.register_hook(lambda grad: grad * float("inf"))
    one.train_step()
    assert float(one.skipped) == 1 and one.step == 4
    assert torch.equal(weights(one.module), before)
    after = [value for state in one.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_a_run_without_any_finite_update_ends(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.module[0].weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        TrainingStateError, match=r"expected finite losses and gradients, got .* and 12 updates in a row"
    ):
        one.run()


def test_clipping_is_that_of_torch(tmp_path: Path) -> None:
    """The norm and the clipping are folded into the optimizer: against torch's own, step by step."""
    one = trainer(tmp_path, replace(STAGE, clip_norm=0.05, warmup=0))
    other = Regression()
    other.module.load_state_dict(one.module.state_dict())
    optimizer = torch.optim.AdamW(one._parameter_groups(), lr=0.0, betas=STAGE.betas, weight_decay=0.01)
    optimizer.param_groups[0]["params"] = [p for p in other.module.parameters() if p.dim() > 1]
    optimizer.param_groups[1]["params"] = [p for p in other.module.parameters() if p.dim() <= 1]
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = one.learning_rate()
        one.train_step()
        optimizer.zero_grad()
        other.loss(step).backward()
        norm = nn.utils.clip_grad_norm_(other.module.parameters(), 0.05)
        assert float(norm) > 0.05
        optimizer.step()
    torch.testing.assert_close(weights(one.module), weights(other.module), rtol=1e-6, atol=1e-7)


def test_one_process_writes_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path).run()
        trainer(tmp_path, world=World()).run()


def test_scales_of_residual_branches_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    """A run in float16 that is resumed, in the middle of its scales' rises and falls, is the run that was not."""

    def train(folder: Path, steps: int) -> Trainer:
        stage, objective = make("rectified_flow", precision="fp16")
        one = Trainer(stage, objective, folder)
        one._resume()
        while one.step < steps:
            if one.step == 3:  # one branch overflows
                one.module.transformer_blocks[0].ff.net[2].weight.register_hook(lambda grad: grad * float("inf"))
            one.train_step()
            if one.step == 3:
                one.save()
            if one.step == 4:
                assert float(one.skipped) == 1
                break
        return one

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "resumed", 3)
    resumed = train(tmp_path / "resumed", 4)
    assert whole.scaler is not None and resumed.scaler is not None
    assert len(set(whole.scaler.scales.tolist())) == 2  # the one that fell, and the others
    assert torch.equal(resumed.scaler.scales, whole.scaler.scales)
    assert torch.equal(weights(resumed.module), weights(whole.module))


def test_scales_of_branches_are_for_denoisers() -> None:
    with pytest.raises(RecipeError, match="precision: expected one of fp32, bf16, got 'fp16'"):
        replace(STAGE, precision="fp16")
