"""`kolors-fast bench`: every provider in the table, provenance in the JSON, and no time of wrong pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kolors_fast import benchmark, savings
from kolors_fast.benchmark_models import CONFIGS, random_pipeline, random_text
from kolors_fast.cli import main
from kolors_fast.models import unet_blocks
from kolors_fast.models.checkpoint import Config
from kolors_fast.ops._backends import forced

from . import test_pixart, test_sd3
from .conftest import UNET, VAE

QUICK = ["bench", "--device", "cpu", "--steps", "2", "--height", "64", "--width", "64"]
CPU = torch.device("cpu")


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--rounds", "2", "-o", str(tmp_path / "out.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["providers"]) == ["pytorch", "kolors_fast", "kolors_fast_graphs", "diffusers"]
    assert report["providers"].pop("kolors_fast_graphs") == {"missing": "CUDA graphs need a CUDA device"}
    for row in report["providers"].values():
        assert len(row["step_ms"]) == len(row["picture_s"]) == 2
        assert all(0 < step < 1e3 * whole for step, whole in zip(row["step_ms"], row["picture_s"], strict=True))
        assert row["times_as_fast"] > 0 and row["peak_mb"] > 24  # 6.2 million float32 weights
    assert report["providers"]["pytorch"]["times_as_fast"] == 1
    assert report["command"] and report["machine"]["cores"] and report["versions"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kolors-tiny, float32 on cpu: 1 of 64x64, 2 steps, guidance 5"
    assert [line.split()[0] for line in lines[3:7]] == ["pytorch", "kolors_fast", "kolors_fast_graphs", "diffusers"]


def test_without_diffusers_a_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises
    assert main([*QUICK, "--rounds", "1", "--providers", "diffusers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["pytorch", "diffusers"]
    assert lines[4].split(maxsplit=1)[1].startswith("cannot run: import of diffusers halted")


def test_wrong_pictures_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    geglu_linear = unet_blocks.geglu_linear
    monkeypatch.setattr(unet_blocks, "geglu_linear", lambda *args: 0.5 * geglu_linear(*args))
    assert main([*QUICK, "--providers", "kolors_fast", "-o", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert "kolors_fast: expected the pictures of pure PyTorch, got others" in printed.err
    assert printed.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--height", "100"], "height: expected a positive multiple of 8, got 100"),
        (["--height", "0"], "height: expected a positive multiple of 8, got 0"),
        (["--model", "kolors-tiny", "--config", "kolors"], "--config: expected none together with --model"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--device", "nonsense"], "nonsense"),
        (["-o", "/no/such/folder/out.json"], "--output: expected a name in an existing folder"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kolors-fast: ")]
    assert sentence in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--device", "cuda"]) == 1
    assert "--device: expected cpu, for torch sees no CUDA device, got 'cuda'" in capsys.readouterr().err


NARROW: dict[str, dict[str, Any]] = {  # instead of the sizes of a config
    "kolors": UNET,
    "sd3-medium": {**test_sd3.TRANSFORMER, "dual_attention_layers": (), "qk_norm": None},
    "sd3.5-medium": test_sd3.TRANSFORMER,
    "pixart-xl2-1024": {**test_pixart.TRANSFORMER, "use_additional_conditions": False},
    "sd3-small": {**test_sd3.TRANSFORMER, "dual_attention_layers": (), "qk_norm": None},
    "pixart-small": {**test_pixart.TRANSFORMER, "use_additional_conditions": False},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_random_weights_agree(config: str) -> None:
    system, denoiser, vae = CONFIGS[config]
    small = {name: value for name, value in VAE.items() if name not in ("latent_channels", "scaling_factor")}
    pipeline = random_pipeline(system, {**denoiser, **NARROW[config]}, {**vae, **small}, CPU, torch.float32)
    name = pipeline.denoiser_name
    asked = {**random_text(pipeline, 2), **system.asked, "height": 32, "width": 32, "num_inference_steps": 2}
    entered = {name: benchmark._enter(name, pipeline, False) for name in ("pytorch", "kolors_fast", "diffusers")}
    providers = {name: entry for name, entry in entered.items() if isinstance(entry, benchmark.Provider)}
    assert len(providers) == 3
    assert type(getattr(providers["diffusers"].pipeline, name)).__module__.startswith("diffusers.")
    benchmark._agree(providers, asked, torch.float32, False)
    models = [getattr(providers[provider].pipeline, name) for provider in ("pytorch", "kolors_fast")]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].data_ptr() != second[name].data_ptr() for name in first)
    if config == "kolors":
        assert models[0].conv_out.weight.is_contiguous()  # else laid out anew in its first picture
        assert not models[1].conv_out.weight.is_contiguous()


def test_random_prompts_are_short() -> None:
    kolors, sd3, pixart = (
        CONFIGS[name][0].text(Config(**config), 2)
        for name, config in (
            ("kolors", UNET), ("sd3-medium", test_sd3.TRANSFORMER), ("pixart-small", test_pixart.TRANSFORMER),
        )
    )  # fmt: skip
    states = kolors["prompt_embeds"]
    assert states is not None and states.shape == (2, 256, 32)
    assert len(states[0].unique(dim=0)) == 21  # 20 tokens and the pad
    states = sd3["prompt_embeds"]
    assert states is not None and states.shape == (2, 333, 32)
    masks = (pixart["prompt_attention_mask"], pixart["negative_prompt_attention_mask"])
    assert [mask.sum(1).tolist() for mask in masks if mask is not None] == [[20, 20], [1, 1]]


@pytest.mark.parametrize(
    ("config", "count"),
    [("sd3-medium", 2_028_328_000), ("sd3.5-medium", 2_243_171_520), ("pixart-xl2-1024", 611_349_152)],
)
def test_random_models_have_the_released_sizes(config: str, count: int) -> None:
    system, denoiser, _ = CONFIGS[config]
    model = system.pipeline.parts[system.pipeline.denoiser_name].ours.empty(denoiser)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_command_knows_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert f"--config {{{','.join(CONFIGS)}}}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("module", [test_sd3, test_pixart], ids=["sd3", "pixart"])
@pytest.mark.filterwarnings("ignore:text_encoder")
def test_folders_of_the_other_systems(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are recognised, and prompts are read; diffusers' PixArt tells the end of a step in its own way."""
    module.write_pipeline(tmp_path / "model")
    capsys.readouterr()
    asked = ["--device", "cpu", "--steps", "3", "--height", "32", "--width", "32", "--rounds", "1", "--batch", "2"]
    assert main(["bench", "--model", str(tmp_path / "model"), *asked, "-o", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    report["providers"].pop("kolors_fast_graphs")
    assert list(report["providers"]) == ["pytorch", "kolors_fast", "diffusers"]
    assert all(0 < row["step_ms"][0] < 1e3 * row["picture_s"][0] for row in report["providers"].values())
    assert report["pictures"] == "2 of 32x32, 3 steps, guidance 5"


@pytest.mark.parametrize("plain", [False, True])
def test_a_step_is_from_the_first_end_to_the_last(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what comes before the first step and after the last; switches are those of the provider."""
    now, seen = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def pipeline(num_inference_steps: int, callback_on_step_end: Any, **_: Any) -> Any:
        seen.append((forced(), savings.switched_off()))
        now[0] += 100  # text, and the first step
        for row in range(num_inference_steps):
            callback_on_step_end(None, row, 0, {})
            now[0] += 3 if row < num_inference_steps - 1 else 50
        return SimpleNamespace(images=np.zeros(1))

    pictures, step, whole = benchmark.Provider(pipeline, weights=0, plain=plain).draw({"num_inference_steps": 5})
    assert (step, whole) == (3, 162) and pictures.shape == (1,)
    assert seen == [("reference", frozenset(savings.SAVINGS)) if plain else (None, frozenset())]
    assert forced() is None and savings.switched_off() == frozenset()
