"""The command, as a person types it: a picture or one sentence, never a traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kolors_fast.assets import bundled
from kolors_fast.cli import main
from kolors_fast.ops import use_backend

PROMPT = "红色圆形在蓝色方块左边"
QUICK = ["--steps", "2", "--height", "128", "--width", "128", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _automatic_backend():
    yield
    use_backend(None)


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; its one sentence."""
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kolors-fast: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(bundled("kolors-tiny"), tmp_path / "model"))


def test_one_prompt_is_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert main(["generate", PROMPT, "-o", str(out), *QUICK]) == 0
    assert Image.open(out).size == (128, 128)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert capsys.readouterr().out.strip() == str(out)


def test_a_memory_limit_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    limited = ["generate", PROMPT, "-o", str(out), *QUICK, "--seed", "1", "2", "--grid", "--memory-limit"]
    assert main([*limited, "2GiB", "--text-encoder-quantization", "int8"]) == 0
    first, head, *rows, _, name = capsys.readouterr().out.strip().splitlines()
    assert first == "memory: all models resident, text encoder in int8; 2 pictures of 128x128 in float32"
    assert "peak" in head and [row.split()[0] for row in rows] == ["text_encoder", "unet", "vae"]
    assert name == str(out) and out.is_file()


def test_bad_memory_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", PROMPT, "-o", str(tmp_path / "out.png"), *QUICK]
    for limit in ("8 gigs", "-1", ""):
        assert f"expected bytes or text such as '8GiB', got {limit!r}" in _fails(
            capsys, *arguments, f"--memory-limit={limit}"
        )
    message = _fails(capsys, *arguments, "--memory-limit", "1MiB")
    assert "memory_limit: expected at least 5" in message and message.endswith("got 1 MiB")
    message = _fails(capsys, *arguments, "--memory-limit", "2GiB", "--compare-reference")
    assert "--memory-limit: expected none with --compare-reference" in message
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_seeds_make_files_or_a_grid(tmp_path: Path) -> None:
    arguments = ["generate", PROMPT, "a red circle", "--seed", "1", "2", *QUICK, "-o", str(tmp_path / "out.png")]
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out-{i}.png" for i in range(1, 5)]
    assert main([*arguments, "--grid"]) == 0
    assert Image.open(tmp_path / "out.png").width >= 256  # two columns: the seeds


def test_a_seed_is_a_picture_whatever_its_neighbours(tmp_path: Path) -> None:
    import numpy as np

    main(["generate", PROMPT, "-o", str(tmp_path / "alone.png"), "--seed", "2", *QUICK])
    main(["generate", PROMPT, "-o", str(tmp_path / "both.png"), "--seed", "1", "2", *QUICK])
    alone, second = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("alone.png", "both-2.png"))
    assert np.abs(alone - second).max() <= 1  # batch 1 and 2 may round differently


def test_compare_reference_prints_time_and_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--compare-reference", "-o", str(tmp_path / "out.png"), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "pure PyTorch" in printed and "difference: largest" in printed


def test_info_says_why_a_backend_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for backend in ("cuda", "triton", "cpu", "reference"):
        line = next(line for line in printed.splitlines() if line.startswith(f"backend {backend}:"))
        assert "available" in line or len(line.partition("missing: ")[2]) > 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--height", "100"], "height: expected"),
        (["--steps", "0"], "num_inference_steps: expected"),
        (["-o", "out.xyz"], "--output: expected a picture's name"),
        (["-o", "/no/such/folder/out.png"], "--output: expected a name in an existing folder"),
        (["--device", "nonsense"], "nonsense"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs: expected a CUDA device, got 'cpu'"),
        pytest.param(
            ["--device", "cuda"],
            "--device: expected cpu, for torch sees no CUDA device, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", PROMPT, "-o", str(tmp_path / "out.png"), "--device", "cpu", *arguments]
    assert sentence in _fails(capsys, *given)
    assert not list(tmp_path.iterdir())


def _weights(model: Path, part: str) -> Path:
    return next((model / part).glob("*.safetensors"))


def test_missing_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _weights(model, "unet").unlink()
    assert "unet" in _fails(capsys, "generate", PROMPT, "--model", str(model))


def test_truncated_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = _weights(model, "vae")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert weights.name in _fails(capsys, "generate", PROMPT, "--model", str(model))


def test_config_of_another_class(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(model / "vae" / "config.json", model / "unet" / "config.json")
    assert "AutoencoderKL" in _fails(capsys, "generate", PROMPT, "--model", str(model))


def test_wrong_shape(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    config["encoder_hid_dim"] += 1
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert "encoder_hid_proj.weight" in _fails(capsys, "generate", PROMPT, "--model", str(model))


@pytest.mark.filterwarnings("default")
def test_a_long_prompt_is_cut_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red circle " * 200, "-o", str(tmp_path / "out.png"), *QUICK]) == 0
    assert "kolors-fast: warning: the text has 602 tokens, but the limit is 256" in capsys.readouterr().err


def test_evaluate_counts_what_the_oracle_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["evaluate", "-n", "4", "--steps", "2", "--device", "cpu", "-o", str(report)]) == 0
    assert json.loads(report.read_text())["all"]["prompts"] == 4
    assert "relation alone" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "share"), [("kolors-tiny", 0.9), ("sd3-tiny", 0.85), ("pixart-tiny", 0.85)])
def test_pictures_are_what_was_asked(name: str, share: float) -> None:
    """That share of held-out prompts, other ones than the README reports on, are drawn right by the oracle."""
    import numpy as np

    from kolors_fast.data.shapes import held_out_prompts, judge
    from kolors_fast.pipelines.load import load_pipeline

    asked = held_out_prompts(80, seed=1)
    pipeline: Any = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    drawing = {"num_inference_steps": 25, "guidance_scale": 5.0, **pipeline.typed}
    pictures = pipeline([one.prompt for one in asked], generator=generators, **drawing).images
    wrong = [
        one.prompt
        for one, picture in zip(asked, pictures, strict=True)
        if not judge(np.asarray(picture), one.request).correct
    ]
    assert len(wrong) <= (1 - share) * 80 + 1e-6, f"{len(wrong)} of 80 drawn wrong: {wrong}"


def test_pixart_reads_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n一个黄色五角星\n")
    sampling = ["--steps", "2", "--device", "cpu", "--model", "pixart-tiny"]
    assert main(["generate", PROMPT, "一个黄色五角星", "-o", str(tmp_path / "out.png"), *sampling]) == 0
    assert main(["generate", "--prompts-file", str(prompts), "-o", str(tmp_path / "file"), *sampling]) == 0
    assert "cleaning" not in capsys.readouterr().err
    for names in (["out-1.png", "out-2.png"], ["file/000001-0.png", "file/000002-0.png"]):
        one, other = (Image.open(tmp_path / name) for name in names)
        assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize(("name", "mebibytes"), [("kolors-tiny", 12), ("sd3-tiny", 8), ("pixart-tiny", 8)])
def test_bundled_model_is_small(name: str, mebibytes: int) -> None:
    size = sum(f.stat().st_size for f in bundled(name).rglob("*") if f.is_file())
    assert size <= mebibytes * 2**20
