"""A worker of torchrun's is killed: all are started again, go on, and end with the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kolors_fast.training import checkpoints
from kolors_fast.training.config import load_recipe
from kolors_fast.training.kolors import KolorsSession
from kolors_fast.training.parallel import World, _of_this_start

from .test_killed import everything

RECIPE = """
name = "tiny"
seed = 3
[tokenizer]
pieces = 400
captions = 300
[vae]
latent_channels = 4
block_out_channels = [4, 8]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
layers_per_block = 1
norm_num_groups = 2
[text_encoder]
[unet]
[scheduler]
[[stage]]
name = "autoencoder"
objective = "autoencoder"
steps = 48
batch = 4
learning_rate = 1e-3
warmup = 2
decay = 4
precision = "fp32"
checkpoint_every = 24
sizes = [[64, 64]]
"""


def torchrun(folder: Path, output: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nproc-per-node", "2"]
    command += ["--master-port", port, "-m", "kolors_fast.cli", "train", "tiny.toml", "-o", output, "--threads", "1"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (folder / f"{output}.err").open("w") as file:
        return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stderr=file, text=True)


def worker(launcher: int, rank: int) -> int:
    """The process id of a child of torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and gloo on Linux")
def test_a_killed_worker_changes_no_bit(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    whole, killed = torchrun(tmp_path, "whole"), torchrun(tmp_path, "killed")
    try:
        half = tmp_path / "killed" / "autoencoder" / checkpoints.FOLDER / "00000024" / checkpoints.MANIFEST
        while not half.exists():
            assert killed.poll() is None, (tmp_path / "killed.err").read_text()
            time.sleep(1e-3)
        os.kill(worker(killed.pid, rank=0), signal.SIGKILL)
        written = half.stat().st_mtime_ns
        for one, output in ((whole, "whole"), (killed, "killed")):
            assert one.wait(timeout=200) == 0, (tmp_path / f"{output}.err").read_text()
    finally:
        for one in (whole, killed):
            one.terminate()
            one.wait()
    assert "exitcode: -9" in (tmp_path / "killed.err").read_text()
    assert half.stat().st_mtime_ns == written  # it went on from there
    ours, theirs = (everything(tmp_path / output / "autoencoder", 48) for output in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    for output in ("whole", "killed"):
        lines = (tmp_path / output / "autoencoder" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40, 48, 48]  # the loss, the monitor
        assert json.loads((tmp_path / output / "autoencoder" / "done.json").read_text()) == {"steps": 48}


def test_workers_meet_without_the_addresses_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        assert not _of_this_start(store).check(["rank 0"])
        _of_this_start(store).set("rank 0", "127.0.0.1")
        assert _of_this_start(store).check(["rank 0"])
    monkeypatch.setenv("WORLD_SIZE", "4")  # another torchrun may have counted otherwise
    assert _of_this_start(store) is store


def test_a_half_made_tokenizer_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    half = tmp_path / "out" / "pipeline" / ".tokenizer.tmp"
    half.mkdir(parents=True)
    (half / "rest").write_text("of a killed run")
    session = KolorsSession(load_recipe(tmp_path / "tiny.toml"), tmp_path / "out", World())
    assert session.tokenizer.encode("a red circle")
    assert not half.exists() and not (session.folder / "tokenizer" / "rest").exists()

    def dies(folder: Path) -> None:
        folder.mkdir()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        session._once("part", dies)
    assert not (session.folder / "part").exists()
