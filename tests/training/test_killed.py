"""A training killed by SIGKILL, again and again, at any moment, ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kolors_fast.training import checkpoints
from kolors_fast.training.parallel import World

from .tiny import make

STEPS, KILLS = 100, 20


def train(folder: Path, checkpoint_every: int = STEPS) -> None:
    from kolors_fast.training.trainer import Trainer

    torch.set_num_threads(1)
    stage, objective = make("epsilon", steps=STEPS, checkpoint_every=checkpoint_every)
    Trainer(stage, objective, folder).run()


def newest(folder: Path) -> int:
    return max((int(path.name) for path in (folder / checkpoints.FOLDER).glob("[0-9]*")), default=0)


def writing(folder: Path) -> bool:
    return any((folder / checkpoints.FOLDER).glob(".*.tmp"))


def kill_often(folder: Path) -> int:
    """Trains in children of this process, which has imported all they need; returns after how many kills an unfinished
    checkpoint lay there."""
    clock, halves = random.Random(3), 0
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            train(folder, checkpoint_every=1)  # so that many are killed in the middle of one
            os._exit(0)
        wanted = newest(folder) + clock.choice((0, 1))  # few steps each, so that none comes to the end
        while newest(folder) < wanted or (kill % 2 and not writing(folder)):
            assert newest(folder) < STEPS, "the run ended before it was killed"
            time.sleep(1e-3)
        time.sleep(clock.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended before it was killed"
        halves += writing(folder)
    train(folder)
    return halves


def everything(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, by name."""
    found = checkpoints.latest(folder, World())
    assert found is not None and found.step == step
    tensors = {}
    for part in ("model", "average", "optimizer", "trainer"):
        known = checkpoints._Reader(found.path).read_metadata().state_dict_metadata
        tensors[part] = {
            name: torch.empty(known[f"{part}.{name}"].size, dtype=known[f"{part}.{name}"].properties.dtype)
            for name in found.names(part)
        }
    found.load_into(tensors, World())
    return {f"{part}.{name}": value for part, named in tensors.items() for name, value in named.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    script = f"from {__name__} import kill_often, train; from pathlib import Path; import sys\n"
    script += "train(Path(sys.argv[1])); print(kill_often(Path(sys.argv[2])))"
    folder = Path(__file__).resolve().parents[2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # in a process of its own: one whose threads have computed must not fork
    done = subprocess.run(
        [sys.executable, "-c", script, str(whole), str(killed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0, "no run was killed while it wrote a checkpoint"
    ours, theirs = everything(killed), everything(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
