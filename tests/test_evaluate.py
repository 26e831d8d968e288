"""The command `evaluate`: losses against diffusers' models and formulas in float64, and several workers against one."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from kolors_fast.assets import bundled
from kolors_fast.cli import main
from kolors_fast.ops import use_backend
from kolors_fast.training.validation import pipeline_validation_loss

MODELS = ("kolors-tiny", "sd3-tiny", "pixart-tiny")
TIMES = [(2 * i + 1) / 16 for i in range(8)]
MODULE = """
def colours(pictures):
    return pictures.double().mean((2, 3)) / 255
"""


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    use_backend(None)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of seven pictures in three sizes, by each bundled model."""
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for n in range(7):
        noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize([(100, 100), (180, 60), (60, 180)][n % 3]).save(data / f"{n}.png")
        (data / f"{n}.txt").write_text(f"picture {n} of " + "noise " * n, encoding="utf-8")
    folders = {}
    for model in MODELS:
        folders[model] = tmp_path_factory.mktemp(model) / "features"
        sizes = ["--area", "128", "--min", "64", "--limit", "256", "--batch", "2"]
        assert main(["precompute", str(data), "-o", str(folders[model]), "--model", model, *sizes]) == 0
    return folders


def edited(folder: Path, model: str, scheduler: dict[str, Any]) -> Path:
    """A copy of a bundled model with another scheduler."""
    copy = Path(shutil.copytree(bundled(model), folder / model))
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text()) | scheduler
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    if "_class_name" in scheduler:
        index = json.loads((copy / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        (copy / "model_index.json").write_text(json.dumps(index))
    return copy


def told(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    """What the command writes of a validation."""
    report = tmp_path / "report.json"
    assert main(["evaluate", "--device", "cpu", "-o", str(report), *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(report.read_text())["validation"]
    return found


# ---- the losses again, sample by sample, with diffusers' models and in float64


def samples(folder: Path) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Each sample's shard and its row there, in the order of their numbers: by size, then as they were written."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    for shard in sorted(shards, key=lambda one: one["size"]):
        tensors = load_file(folder / shard["file"])
        yield from ((tensors, row) for row in range(shard["count"]))


def noise_of(seed: int, item: int, shape: torch.Size) -> Tensor:
    """[8, C, h, w], of each time its own."""
    words = [np.random.SeedSequence([seed, item, time]).generate_state(1, np.uint64)[0] for time in range(8)]
    generators = [torch.Generator().manual_seed(int(word) & (2**63 - 1)) for word in words]
    return torch.stack([torch.randn(shape, generator=one) for one in generators]).double()


def alpha_bar(scheduler: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """betas and the products of 1 - beta, [T] each."""
    start, end, steps = scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
    if scheduler["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return betas, torch.cumprod(1 - betas, 0)


def captions(shard: dict[str, Tensor], row: int) -> tuple[Tensor, int]:
    """States [n, D] of the first caption's tokens, and its row."""
    first = int(shard["rows"][row, 0])
    start, end = shard["captions.starts"][first : first + 2].tolist()
    return shard["captions.states"][start:end].double(), first


def kolors(unet: Any, shard: dict[str, Tensor], row: int, x: Tensor, n: Tensor, scheduler: dict[str, Any]) -> Tensor:
    _, bar = alpha_bar(scheduler)
    times = (torch.tensor(TIMES, dtype=torch.float64) * len(bar)).long()
    signal = bar[times].view(8, 1, 1, 1)
    states, first = captions(shard, row)
    pads = states[:1].expand(257 - len(states), -1)  # which the features hold once
    added = {
        "text_embeds": shard["captions.pooled"][first].double().expand(8, -1),
        "time_ids": shard["sizes"][row].double().expand(8, -1),
    }
    text = torch.cat([pads, states[1:]]).expand(8, 256, -1)
    noisy = signal.sqrt() * x + (1 - signal).sqrt() * n
    predicted = unet(noisy, times, encoder_hidden_states=text, added_cond_kwargs=added).sample
    target = signal.sqrt() * n - (1 - signal).sqrt() * x if scheduler["prediction_type"] == "v_prediction" else n
    return (predicted - target).square().mean((1, 2, 3))


def sd3(mmdit: Any, shard: dict[str, Tensor], row: int, x: Tensor, n: Tensor, scheduler: dict[str, Any]) -> Tensor:
    first = int(shard["rows"][row, 0])
    part = {name: shard[f"captions.{name}"][first].double() for name in ("clip_l", "clip_g", "t5")}
    clip = torch.cat([part["clip_l"], part["clip_g"]], 1)
    clip = torch.cat([clip, torch.zeros(len(clip), part["t5"].shape[1] - clip.shape[1], dtype=torch.float64)], 1)
    text = torch.cat([clip, part["t5"]]).expand(8, -1, -1)
    pooled = torch.cat([shard[f"captions.clip_{k}_pooled"][first].double() for k in "lg"]).expand(8, -1)
    times = torch.tensor(TIMES, dtype=torch.float64)
    noisy = (1 - times.view(8, 1, 1, 1)) * x + times.view(8, 1, 1, 1) * n
    predicted = mmdit(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * times).sample
    return (predicted - (n - x)).square().mean((1, 2, 3))


def pixart(model: Any, shard: dict[str, Tensor], row: int, x: Tensor, n: Tensor, scheduler: dict[str, Any]) -> Tensor:
    betas, bar = alpha_bar(scheduler)
    times = (torch.tensor(TIMES, dtype=torch.float64) * len(bar)).long()
    beta, signal, before = (table.view(8, 1, 1, 1) for table in (betas[times], bar[times], bar[times - 1]))
    states, _ = captions(shard, row)
    noisy = signal.sqrt() * x + (1 - signal).sqrt() * n
    nothing = {"resolution": None, "aspect_ratio": None}
    output = model(noisy, states.expand(8, -1, -1), times, added_cond_kwargs=nothing).sample
    predicted, v = output.chunk(2, 1)

    def step_back(start: Tensor) -> Tensor:
        """The mean of q(x_t-1 | x_t, x_0)."""
        return (before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - signal)

    smallest = beta * (1 - before) / (1 - signal)
    share = (v + 1) / 2
    deviation = (share * beta.log() + (1 - share) * smallest.log()).exp().sqrt()
    start = (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    true, own = Normal(step_back(x), smallest.sqrt()), Normal(step_back(start), deviation)
    bound = kl_divergence(true, own) / math.log(2)
    return (predicted - n).square().mean((1, 2, 3)) + bound.mean((1, 2, 3))


THEIRS = {
    "kolors-tiny": (diffusers.UNet2DConditionModel, "unet", kolors),
    "sd3-tiny": (diffusers.SD3Transformer2DModel, "transformer", sd3),
    "pixart-tiny": (diffusers.PixArtTransformer2DModel, "transformer", pixart),
}


@torch.no_grad()
def recomputed(model: str, source: Path, folder: Path, seed: int) -> np.ndarray:
    """Losses [items, times]."""
    kind, part, losses = THEIRS[model]
    theirs = kind.from_pretrained(source / part, torch_dtype=torch.float64).eval()
    scheduler = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    rows = []
    for item, (shard, row) in enumerate(samples(folder)):
        x = shard["mean"][row].double()
        rows.append(losses(theirs, shard, row, x, noise_of(seed, item, x.shape), scheduler))
    return torch.stack(rows).numpy()


VELOCITY = {
    "prediction_type": "v_prediction", "num_train_timesteps": 500, "beta_schedule": "linear", "beta_start": 0.001,
    "beta_end": 0.03,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "scheduler"),
    [
        ("kolors-tiny", {}),
        ("kolors-tiny", VELOCITY),
        ("sd3-tiny", {"shift": 3.0}),
        ("pixart-tiny", {}),
        ("pixart-tiny", {"beta_end": 0.012, "num_train_timesteps": 800}),
    ],
    ids=["kolors", "kolors-velocity", "sd3", "pixart", "pixart-other-betas"],
)
def test_losses_are_those_of_diffusers_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], features: dict[str, Path], model: str, scheduler: dict[str, Any]
) -> None:
    source = edited(tmp_path, model, scheduler) if scheduler else bundled(model)
    asked = model if not scheduler else source
    found = told(tmp_path, "--model", asked, "--validation", features[model], "--seed", 5, "--batch", 2)
    wanted = recomputed(model, source, features[model], 5)
    assert found["times"] == TIMES and found["items"] == len(wanted) == 7
    np.testing.assert_allclose(found["losses"], wanted.mean(0), rtol=2e-4)
    np.testing.assert_allclose(found["errors"], wanted.std(0, ddof=1) / 7**0.5, rtol=2e-3)
    assert found["total"] == pytest.approx(wanted.mean(), rel=1e-4)
    assert found["total_error"] == pytest.approx(wanted.mean(1).std(ddof=1) / 7**0.5, rel=2e-3)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"validation loss: {found['total']:.6g} ± {found['total_error']:.2g} (7 samples)"
    assert printed[1] == f"  at time 0.0625: {found['losses'][0]:.6g} ± {found['errors'][0]:.2g}"
    assert len(printed) == 9


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_is_near(tmp_path: Path, features: dict[str, Path], model: str) -> None:
    exact, half = (
        told(tmp_path, "--model", model, "--validation", features[model], "--dtype", dtype)["losses"]
        for dtype in ("float32", "bfloat16")
    )
    assert half != exact
    np.testing.assert_allclose(half, exact, rtol=0.02, atol=2**-14)  # of predictions off by two roundings, 2^-7


def test_a_model_of_the_hub(tmp_path: Path, features: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched are the configs of all parts, and of no other part than the denoiser the weights."""
    source, cache = bundled("kolors-tiny"), tmp_path / "cache"

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        for file in source.rglob("*.*"):
            name = file.relative_to(source)
            if any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        "kolors_fast.schedulers.config.hf_hub_download", lambda repo, name, subfolder: source / subfolder / name
    )
    found = pipeline_validation_loss("owner/name", features["kolors-tiny"])
    assert found.losses == pipeline_validation_loss("kolors-tiny", features["kolors-tiny"]).losses
    assert {file.parent.name for file in cache.rglob("*.safetensors")} == {"unet"}


def test_what_cannot_be_validated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], features: dict[str, Path]
) -> None:
    velocity = edited(tmp_path / "v", "pixart-tiny", {"prediction_type": "v_prediction"})
    diffusion = edited(tmp_path / "d", "sd3-tiny", {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"})
    start = edited(tmp_path / "s", "kolors-tiny", {"prediction_type": "sample"})
    longer = edited(tmp_path / "l", "sd3-tiny", {"num_train_timesteps": 900})
    sd3, pixart, own = features["sd3-tiny"], features["pixart-tiny"], features["kolors-tiny"]
    for arguments, message in (
        (["--validation", sd3], "expected features of models with the hash "),
        (["--validation", tmp_path], "index.json is missing: expected a folder that 'kolors-fast precompute' has"),
        (["--model", velocity, "--validation", pixart], "predictions of epsilon, got one of v_prediction"),
        (["--model", diffusion, "--validation", sd3], "predictions of flow, got one of epsilon"),
        (["--model", start, "--validation", own], "predictions of epsilon or v_prediction, got one of sample"),
        (["--model", longer, "--validation", sd3], "num_train_timesteps: expected 1000 of a flow, got 900"),
        (["--validation", own, "--clip", tmp_path], "--clip: expected none with --validation, which draws nothing"),
        (["--validation", own, "--save-statistics", tmp_path / "s"], "--save-statistics: expected none with --valid"),
        (["--validation", own, "-o", "/no/such/folder/a.json"], "--output: expected a name in an existing folder"),
        (["--validation", own, "--batch", 0], "--batch: expected at least 1, got 0"),
    ):
        assert main(["evaluate", "--device", "cpu", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


# ---- workers


def by_workers(count: int, folder: Path, *arguments: Any) -> list[str]:
    """What each of several processes prints, that torchrun's environment makes workers of one command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([str(folder), root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "kolors_fast.cli", "evaluate", "--device", "cpu", *map(str, arguments)]
    workers = []
    for rank in range(count):
        own = {name: str(value) for name, value in {**meeting, "RANK": rank, "LOCAL_RANK": rank}.items()}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **own}
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        printed = [worker.communicate(timeout=200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count
    return printed


def test_two_workers_report_what_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pictures in batches of two: the first draws three of them."""
    (tmp_path / "colours_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["-n", 5, "--batch", 2, "--steps", 2, "--features", "colours_of_a_user:colours", "--save-statistics"]
    one, two = (tmp_path / f"{count}.json" for count in ("one", "two"))
    reference = tmp_path / "reference.safetensors"
    assert main(["evaluate", "--device", "cpu", *map(str, [*asked, reference])]) == 0
    capsys.readouterr()
    asked += [tmp_path / "statistics.safetensors", "--fid", reference, "-o"]
    assert main(["evaluate", "--device", "cpu", *map(str, [*asked, one])]) == 0
    alone = capsys.readouterr().out
    first, second = by_workers(2, tmp_path, *asked, two)
    assert second == ""
    table, distance = first.rsplit("frechet distance: ", 1)
    assert table == alone.rsplit("frechet distance: ", 1)[0] and "pictures: 5\n" in distance
    whole, shared = json.loads(one.read_text()), json.loads(two.read_text())
    assert shared.pop("measures") == pytest.approx(whole.pop("measures"), rel=1e-9, abs=1e-12)
    assert json.dumps(shared) == json.dumps(whole)
    assert whole["all"]["prompts"] == 5


def test_two_workers_find_the_loss_of_one(tmp_path: Path, features: dict[str, Path]) -> None:
    report, asked = tmp_path / "two.json", ["--validation", features["kolors-tiny"], "--batch", 2]
    printed = by_workers(2, tmp_path, *asked, "-o", report)
    alone, together = told(tmp_path, *asked), json.loads(report.read_text())["validation"]
    assert printed[0].startswith("validation loss: ") and printed[1] == ""
    assert together.keys() == alone.keys() and together["items"] == 7
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-6)
