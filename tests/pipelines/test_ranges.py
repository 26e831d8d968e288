"""NVTX ranges: which, how nested, closed whatever happens; and nothing of them while they are off."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvtx
import pytest
import torch
from torch import Tensor

from kolors_fast import (
    AutoencoderKL,
    KolorsPipeline,
    KolorsUNet,
    MMDiT,
    PixArtPipeline,
    PixArtTransformer,
    SD3Pipeline,
    nvtx_ranges,
    use_backend,
)
from kolors_fast import ranges as installed
from kolors_fast.cli import main
from kolors_fast.models.layers import ResnetBlock
from kolors_fast.models.mmdit_blocks import JointBlock
from kolors_fast.models.pixart_blocks import TransformerBlock
from kolors_fast.models.unet_blocks import UpBlock
from kolors_fast.ops import SPECS, _backends
from kolors_fast.ops._operator import Operator
from kolors_fast.ops._spec import cast
from kolors_fast.pipelines import pipeline as shared
from kolors_fast.pipelines import pixart as pixart_pipeline
from kolors_fast.pipelines import sd3_text
from kolors_fast.pipelines.load import load_pipeline

from . import test_pixart, test_sd3
from .conftest import UNET, VAE


class Recorder:
    """What would be in a profile: each range as the names from the outermost to itself."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def push(self, name: str, *, domain: str) -> None:
        assert domain == "kolors_fast"
        self.open.append(name)
        self.seen.append(tuple(self.open))

    def pop(self, *, domain: str) -> None:
        assert domain == "kolors_fast"
        self.open.pop()  # raises where more ranges end than began

    @property
    def outermost(self) -> list[str]:
        return [path[0] for path in self.seen if len(path) == 1]

    def inside(self, *outer: str) -> list[str]:
        return [path[-1] for path in self.seen if path[:-1] == outer]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(nvtx, "push_range", recorder.push)
    monkeypatch.setattr(nvtx, "pop_range", recorder.pop)
    return recorder


def draw(pipeline: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = pipeline(
        "一张瓢虫的照片", num_inference_steps=2, generator=generator, output_type="pt", **arguments
    ).images
    return drawn


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(test_sd3, tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(test_pixart, tmp_path_factory.mktemp("pixart"))


def written(system: Any, folder: Path) -> Any:
    system.write_pipeline(folder)
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_ranges_of_a_picture(ours: KolorsPipeline, recorder: Recorder) -> None:
    with nvtx_ranges():
        draw(ours)
    assert recorder.open == []
    assert recorder.outermost == ["text encoding", "step 0", "step 1", "decode"]
    assert recorder.inside("text encoding", "text_encoder") == [f"encoder.layers.{i}" for i in range(3)]
    assert recorder.inside("step 0") == ["unet.plan_steps", "unet", "guided_step"]
    assert recorder.inside("step 1") == ["unet", "guided_step"]
    blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert recorder.inside("step 1", "unet") == [*blocks, "group_norm_silu"]
    # 2 residual blocks and 2 transformers, in turns, then an upsampler
    up = recorder.inside("step 1", "unet", "up_blocks.0")
    assert up == [f"up_blocks.0.{kind}.{i}" for i in range(2) for kind in ("resnets", "attentions")] + [
        "up_blocks.0.upsamplers.0"
    ]
    transformer = "up_blocks.0.attentions.1"
    block = f"{transformer}.transformer_blocks.1"
    within = ("step 1", "unet", "up_blocks.0", transformer, block)
    layers = [name.removeprefix(f"{block}.") for name in recorder.inside(*within)]
    assert layers == ["residual_layer_norm", "attn1", "residual_layer_norm", "attn2", "residual_layer_norm", "ff"]
    assert "qk_norm_attention" in recorder.inside(*within, f"{block}.attn1")
    assert recorder.inside(*within, f"{block}.ff") == ["geglu_linear"]
    decoder = recorder.inside("decode", "vae.decode")
    assert decoder == ["decoder.mid_block", *(f"decoder.up_blocks.{i}" for i in range(3)), "group_norm_silu"]
    first = ("decode", "vae.decode", "decoder.up_blocks.0")
    assert recorder.inside(*first) == [
        *(f"decoder.up_blocks.0.resnets.{i}" for i in range(2)),
        "decoder.up_blocks.0.upsamplers.0",
    ]
    assert recorder.inside(*first, "decoder.up_blocks.0.resnets.0") == ["group_norm_silu"] * 2


def test_the_ranges_of_a_picture_by_sd3(sd3: Any, recorder: Recorder) -> None:
    with nvtx_ranges():
        draw(sd3)
    assert recorder.open == []
    assert recorder.outermost == ["text encoding", "step 0", "step 1", "decode"]
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert recorder.inside("text encoding") == 2 * encoders  # the prompt, and the empty one
    assert recorder.inside("step 0") == ["transformer.plan_steps", "transformer", "guided_step"]
    assert recorder.inside("step 1") == ["transformer", "guided_step"]
    blocks = [f"transformer_blocks.{i}" for i in range(4)]
    assert recorder.inside("step 1", "transformer") == [*blocks, "gated_residual_ada_layer_norm"]
    # the first has an attention of the picture by itself, too; the last ends the text
    for block, layers in (
        (blocks[0], ["attn", "ff_context", "attn2", "ff"]),
        (blocks[1], ["attn", "ff_context", "ff"]),
        (blocks[3], ["attn", "ff"]),
    ):
        inside = recorder.inside("step 1", "transformer", block)
        assert [name.removeprefix(f"{block}.") for name in inside if name.startswith(block)] == layers
        assert "gated_residual_ada_layer_norm" in inside
        assert recorder.inside("step 1", "transformer", block, f"{block}.attn") == ["qk_norm", "qk_norm_attention"]
    assert recorder.inside("decode") == ["vae.decode"]


def test_the_ranges_of_a_picture_by_pixart(pixart: Any, recorder: Recorder) -> None:
    with nvtx_ranges():
        draw(pixart)
    assert recorder.open == []
    assert recorder.outermost == ["text encoding", "step 0", "step 1", "decode"]
    assert recorder.inside("text encoding") == ["text_encoder"] * 2
    assert recorder.inside("step 0") == ["transformer.plan_steps", "transformer", "guided_step"]
    assert recorder.inside("step 1") == ["transformer", "guided_step"]
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    assert recorder.inside("step 1", "transformer") == [*blocks, "gated_residual_ada_layer_norm"]
    inside = [name.removeprefix(f"{blocks[1]}.") for name in recorder.inside("step 1", "transformer", blocks[1])]
    norm = "gated_residual_ada_layer_norm"
    assert inside == [norm, "attn1", "attn2", norm, "ff"]
    assert "qk_norm_attention" in recorder.inside("step 1", "transformer", blocks[1], f"{blocks[1]}.attn1")
    assert recorder.inside("decode") == ["vae.decode"]


@pytest.mark.parametrize("system", ["sd3", "pixart"])
def test_transformers_draw_the_same_bits(system: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(system)
    plain = draw(pipeline)
    with nvtx_ranges():
        assert torch.equal(draw(pipeline), plain)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_blocks_of_every_decoder(tiled: bool, dtype: torch.dtype, recorder: Recorder) -> None:
    """In float16 they run on a scaled stream, in code of their own, and so do tiles."""
    vae = AutoencoderKL(**VAE).eval().to(dtype)
    vae.enable_tiling(tiled)
    with nvtx_ranges(), torch.no_grad():
        vae.decode(torch.zeros(1, 4, 4, 4, dtype=dtype))
    mid = [f"decoder.mid_block.{kind}" for kind in ("resnets.0", "attentions.0", "resnets.1")]
    assert recorder.open == [] and recorder.inside("vae.decode", "decoder.mid_block") == mid


def test_a_captured_step_is_a_range(ours: KolorsPipeline, recorder: Recorder) -> None:
    ours._graphs = shared.StepGraphs(ours.unet, record=lambda program: program.run)  # in the place of a CUDA graph
    with nvtx_ranges():
        draw(ours)
    assert recorder.outermost == ["text encoding", "step 0", "step 1", "decode"] and recorder.open == []


def test_same_bits_on_the_same_path(ours: KolorsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path: which op runs where, in order."""
    path: list[Any] = []
    choose = _backends.choose

    def recorded(name: str, columns: Any, call: Any) -> str:
        backend = choose(name, columns, call)
        path.append((name, backend, [tuple(field.shape) for field in call if isinstance(field, Tensor)]))
        return backend

    monkeypatch.setattr(_backends, "choose", recorded)
    plain, taken = draw(ours), path[:]
    path.clear()
    with nvtx_ranges():
        ranged = draw(ours)
    assert torch.equal(plain, ranged)
    assert path == taken and len(path) > 50


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_no_range_open(
    ours: KolorsPipeline, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ours.unet.up_blocks[0].resnets[1], "shortcut", fail)
        with pytest.raises(error), nvtx_ranges():
            draw(ours)
    assert recorder.open == [] and recorder.seen[-1][:3] == ("step 0", "unet", "up_blocks.0")
    assert not installed._originals
    recorder.seen.clear()
    with nvtx_ranges():
        draw(ours)
    assert recorder.open == [] and recorder.outermost == ["text encoding", "step 0", "step 1", "decode"]


def test_an_interrupted_run_leaves_no_range_open(ours: KolorsPipeline, recorder: Recorder) -> None:
    def interrupt(pipeline: Any, *_: Any) -> dict[str, Any]:
        pipeline._interrupt = True
        return {}

    with nvtx_ranges():
        draw(ours, callback_on_step_end=interrupt)
    assert recorder.open == [] and recorder.outermost == ["text encoding", "step 0", "decode"]


def test_nothing_is_there_while_off(ours: KolorsPipeline, recorder: Recorder) -> None:
    owners = (
        Operator, ResnetBlock, UpBlock, JointBlock, TransformerBlock, KolorsUNet, MMDiT, PixArtTransformer,
        AutoencoderKL, KolorsPipeline, SD3Pipeline, PixArtPipeline, shared.Pipeline, shared, sd3_text, pixart_pipeline,
    )  # fmt: skip
    before = [dict(vars(owner)) for owner in owners]
    assert not installed._originals and UpBlock.__call__ is torch.nn.Module.__call__
    with nvtx_ranges():
        assert all(dict(vars(owner)) != held for owner, held in zip(owners, before, strict=True))
        with nvtx_ranges():
            pass
        draw(ours)
    assert recorder.seen and len(installed._names) == 0
    assert [dict(vars(owner)) for owner in owners] == before
    recorder.seen.clear()
    draw(ours)
    assert recorder.seen == []


@pytest.mark.parametrize(
    ("op", "grad"), [(op, grad) for op, spec in SPECS.items() for grad in (False, True)[: 1 + bool(spec.gradients)]]
)
def test_every_op_is_one_range(op: str, grad: bool, recorder: Recorder) -> None:
    """Whether it is composed of others or not; what it is composed of is inside."""
    spec = SPECS[op]
    case = next(case for case in spec.cases if case.name == "plain")
    inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32)
    if grad:
        inputs[spec.gradients[0]].requires_grad_()
    for backend in ("reference", "cpu", "triton"):
        recorder.seen.clear()
        with nvtx_ranges(), use_backend(backend):
            spec.function(**copy.deepcopy(inputs))
        assert recorder.outermost == [op] and recorder.open == []
        assert not [path for path in recorder.seen[1:] if op in path[1:]]


def test_a_block_by_itself_has_its_class_name(recorder: Recorder) -> None:
    block = KolorsUNet(**UNET).eval().down_blocks[0].resnets[0]
    with nvtx_ranges(), torch.no_grad():
        block(torch.zeros(1, 8, 4, 4))
    assert recorder.seen[0] == ("ResnetBlock",)


def test_compiled_code_is_the_same(recorder: Recorder) -> None:
    torch.compiler.reset()
    unet = KolorsUNet(**UNET).eval()
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}
    inputs = torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 32)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(*inputs, added_cond_kwargs=added).sample
        with nvtx_ranges():
            torch.compiler.reset()
            ranged = compiled(*inputs, added_cond_kwargs=added).sample
    assert torch.equal(plain, ranged)
    assert recorder.open == [] and set(recorder.outermost) <= set(SPECS)  # ops that compiled code calls; no blocks


def test_switched_on_by_the_environment() -> None:
    code = "from kolors_fast.ops._operator import Operator; print(hasattr(Operator.__call__, '__wrapped__'))"
    for value, said in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "KOLORS_FAST_NVTX": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_the_command(folder: Path, tmp_path: Path, recorder: Recorder) -> None:
    common = ["--model", str(folder), "--steps", "2", "--device", "cpu", "--nvtx"]
    (tmp_path / "prompts.txt").write_text("a cat\n")
    prompts = ["--prompts-file", str(tmp_path / "prompts.txt")]
    for asked in (["a cat", "-o", str(tmp_path / "out.png")], [*prompts, "-o", str(tmp_path / "pictures")]):
        recorder.seen.clear()
        assert main(["generate", *asked, *common]) == 0
        assert recorder.outermost == ["text encoding", "step 0", "step 1", "decode"]
    assert not installed._originals
