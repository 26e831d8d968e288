"""Memory plans against the memory that is really taken, and pipelines under a limit against those without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kolors_fast.models.activations import activation_bytes
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.checkpoint import PretrainedModel
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.pipelines.kolors import KolorsPipeline
from kolors_fast.pipelines.memory import Plan, parse_bytes, plan_memory, plans

from .conftest import TEXT, UNET, VAE

CONFIGS = {"text_encoder": TEXT, "unet": UNET, "vae": VAE}
SIZE = {"height": 64, "width": 96}
FIXED = 8 << 20  # bytes that the bound adds: 4 MiB whatever the shapes, and convolution weights stored twice


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that one call holds at a time, as the allocator tells the profiler."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def read(batch: int, length: int) -> Callable[[ChatGLM], Any]:
    def call(model: ChatGLM) -> Any:
        ids = torch.zeros(batch, length, dtype=torch.int64)
        return model.text_features(ids, torch.ones_like(ids))

    return call


def denoise(batch: int, height: int, width: int) -> Callable[[KolorsUNet], Any]:
    def call(model: KolorsUNet) -> Any:
        sizes = (batch, 4, height, width), (batch, 256, 32), (batch, 32)
        sample, text, pooled = (torch.zeros(size, dtype=model.dtype) for size in sizes)
        return model(sample, 5.0, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.zeros(batch, 6)})

    return call


def decode(batch: int, height: int, width: int) -> Callable[[AutoencoderKL], Any]:
    def call(model: AutoencoderKL) -> Any:
        return model.decode(torch.zeros(batch, 4, height, width, dtype=model.dtype))

    return call


WIDE = {**UNET, "block_out_channels": (32, 64), "norm_num_groups": 8}
CASES = {
    "text": (ChatGLM, {**TEXT, "ffn_hidden_size": 600}, read(8, 256)),
    "wide-text": (ChatGLM, {**TEXT, "hidden_size": 256, "ffn_hidden_size": 700, "kv_channels": 32}, read(8, 257)),
    "unet": (KolorsUNet, UNET, denoise(4, 96, 64)),
    "wide-unet": (KolorsUNet, WIDE, denoise(2, 64, 64)),
    "small-unet": (KolorsUNet, {**WIDE, "layers_per_block": 2}, denoise(2, 8, 8)),
    "vae": (AutoencoderKL, VAE, decode(1, 64, 64)),
    "vae-batch": (AutoencoderKL, {**VAE, "layers_per_block": 2}, decode(3, 24, 40)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "config", "call"), CASES.values(), ids=CASES.keys())
def test_activations_are_bounded_closely(
    kind: type[PretrainedModel], config: dict[str, Any], call: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    predicted = activation_bytes(kind.empty(config, dtype), call)
    model = kind.from_config(config).eval().to(dtype)
    real = peak_bytes(lambda: call(model))
    assert real <= predicted <= 1.5 * real + FIXED


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_activations_of_a_quantised_encoder(quantization: str) -> None:
    predicted = activation_bytes(ChatGLM.empty(TEXT).quantize_(quantization), read(2, 60))
    model = ChatGLM.from_config(TEXT).eval().quantize_(quantization)
    real = peak_bytes(lambda: read(2, 60)(model))
    assert real <= predicted <= 1.5 * real + FIXED


@cache
def all_plans(**changes: Any) -> list[Plan]:
    arguments = {"pictures": 1, "dtype": torch.float32, "device": "cpu", "quantization": None, **SIZE, **changes}
    return list(plans(CONFIGS, **arguments))


def test_weights_are_counted_exactly(folder: Path) -> None:
    for quantization in (None, "int8", "int4"):
        plan = next(p for p in all_plans(dtype=torch.float16) if p.quantization == quantization)
        pipeline = KolorsPipeline.from_pretrained(
            folder, torch_dtype=torch.float16, text_encoder_quantization=quantization
        )
        for model in plan.models:
            held = sum(value.nbytes for value in getattr(pipeline, model.name).state_dict().values())
            assert model.weights == held, model.name


def test_the_fastest_plan_that_fits() -> None:
    choices = all_plans()
    assert [(p.one_by_one, p.quantization) for p in choices if not p.tiled] == [
        (False, None),
        (True, None),
        (True, "int8"),
        (True, "int4"),
    ]
    for index, plan in enumerate(choices):
        faster = choices[:index]
        chosen = plan_memory(plan.most, CONFIGS, **SIZE)
        assert chosen == next(p for p in [*faster, plan] if p.most <= plan.most)
    assert plan_memory("1TiB", CONFIGS) == plan_memory("1TiB", CONFIGS, height=32, width=32)  # the UNet's own size


def test_peaks_of_a_plan() -> None:
    resident, one_by_one, *_ = (p for p in all_plans() if not p.tiled)
    total = sum(model.weights for model in resident.models)
    for model, other in zip(resident.models, one_by_one.models, strict=True):
        assert resident.peak(model) - one_by_one.peak(other) == total - model.weights
    bigger = next(iter(all_plans(pictures=3)))
    assert bigger.most > resident.most and bigger.features == 3 * resident.features
    assert resident.features == 2 * 2 * 256 * 32 * 4  # twice [2, 256, 32] in fp32
    assert {p.quantization for p in all_plans(quantization="int4")} == {"int4"}


def test_a_plan_prints_as_a_table() -> None:
    plan = next(p for p in all_plans(dtype=torch.float16) if p.quantization == "int8" and not p.tiled)
    first, head, *rows, last = str(plan).splitlines()
    assert first == "memory: one model after the other, text encoder in int8; 1 picture of 64x96 in float16"
    assert head.split() == ["model", "weights", "activations", "resident", "peak"]
    assert [row.split()[0] for row in rows] == ["text_encoder", "unet", "vae"]
    assert "int8, float16" in rows[0] and "while denoising" in rows[1] and "512 MiB of the process" in last


def test_sizes_in_words() -> None:
    assert parse_bytes("8GiB") == parse_bytes(" 8 gib") == parse_bytes(8 << 30) == 8 << 30
    assert (parse_bytes("1.5GB"), parse_bytes("700 MB"), parse_bytes("9B")) == (1_500_000_000, 700_000_000, 9)
    for wrong in ("8 gigs", "-1", "", "GiB", "0GiB", "8", "1e3GB", 0, -5, True, 2.5, None):
        with pytest.raises(ValueError, match="memory_limit: expected bytes or text such as '8GiB', got"):
            parse_bytes(wrong)


def test_refusals(folder: Path) -> None:
    smallest = min(all_plans(), key=lambda p: p.most)
    with pytest.raises(ValueError, match=r"for 1 picture of 64x96 in float32 \(.*\), got 9 MiB") as caught:
        plan_memory("9MiB", CONFIGS, **SIZE)
    need = str(caught.value).split("at least ")[1].split(" for")[0]  # which is enough
    assert smallest.most <= plan_memory(need, CONFIGS, **SIZE).most <= parse_bytes(need)
    with pytest.raises(ValueError, match="memory_limit: expected at least"):
        KolorsPipeline.from_pretrained(folder, memory_limit="9MiB")
    with pytest.raises(ValueError, match="height: expected a positive multiple of 8, got 100"):
        plan_memory("1GiB", CONFIGS, height=100)
    with pytest.raises(ValueError, match="pictures: expected a whole number from 1, got 0"):
        plan_memory("1GiB", CONFIGS, pictures=0)
    with pytest.raises(ValueError, match="device: expected cpu or cuda with a memory limit, got mps"):
        plan_memory("1GiB", CONFIGS, device="mps")
    with pytest.raises(ValueError, match="quantization: expected 'int8' or 'int4', got 'int3'"):
        KolorsPipeline.from_pretrained(folder, text_encoder_quantization="int3")


CALL = {"num_inference_steps": 2, "output_type": "np", **SIZE}


def draw(pipeline: KolorsPipeline, **changes: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        **{"prompt": "a photo", "generator": torch.Generator().manual_seed(0), **CALL, **changes}
    ).images
    return images


def taking_turns(folder: Path, quantization: str | None = None, **changes: Any) -> KolorsPipeline:
    found = all_plans(dtype=changes.get("torch_dtype", torch.float32))
    plan = next(p for p in found if p.one_by_one and p.quantization == quantization and not p.tiled)
    return KolorsPipeline.from_pretrained(folder, memory_limit=plan, **changes)


def resident(pipeline: KolorsPipeline) -> list[str]:
    names = ("text_encoder", "unet", "vae")
    return [name for name in names if any(not p.is_meta for p in getattr(pipeline, name).state_dict().values())]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_pictures_are_the_same_one_model_after_the_other(folder: Path, quantization: str | None) -> None:
    pipeline = taking_turns(folder, quantization)
    assert resident(pipeline) == [] and pipeline.device.type == "cpu"
    seen = []

    def look(pipeline: KolorsPipeline, *_: Any) -> dict[str, Any]:
        seen.append(resident(pipeline))
        return {}

    expected = draw(KolorsPipeline.from_pretrained(folder, text_encoder_quantization=quantization))
    for _ in range(2):
        np.testing.assert_array_equal(draw(pipeline, callback_on_step_end=look), expected)
        assert resident(pipeline) == []
    assert seen == [["unet"]] * 4


def test_every_plan_in_full_precision_draws_the_same(folder: Path) -> None:
    """Up to the rounding of tiled decoding, if there is any."""
    expected = draw(KolorsPipeline.from_pretrained(folder))
    for plan in all_plans():
        if plan.quantization is None:
            pipeline = KolorsPipeline.from_pretrained(folder, memory_limit=plan)
            assert np.abs(draw(pipeline) - expected).max() <= (1e-4 if plan.tiled else 0)


def test_embeddings_given_load_no_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = taking_turns(folder)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt("a photo")
    assert embeds.device.type == "cpu"
    given = {
        "prompt": None,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    expected = draw(KolorsPipeline.from_pretrained(folder), **given)
    monkeypatch.setattr(ChatGLM, "load_weights", None)
    np.testing.assert_array_equal(draw(pipeline, **given), expected)


def test_after_a_failed_call_the_next_one_works(folder: Path) -> None:
    pipeline = taking_turns(folder)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipeline, callback_on_step_end=fail)
    assert resident(pipeline) == ["unet"]
    np.testing.assert_array_equal(draw(pipeline), draw(KolorsPipeline.from_pretrained(folder)))


def test_each_turn_reads_the_files_anew(folder: Path, tmp_path: Path) -> None:
    """Weights that were replaced on disk are the ones that draw: nothing keeps an older copy."""
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    pipeline = taking_turns(mine)
    before = draw(pipeline)
    unet = KolorsUNet.from_pretrained(mine, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(2)
    unet.save_pretrained(mine / "unet")
    after = draw(pipeline)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, draw(KolorsPipeline.from_pretrained(mine)))


def test_the_peak_of_a_whole_call_stays_below_the_plan(folder: Path) -> None:
    """Weights included, for fp32 files are cast to the pipeline's bf16, which allocates them."""
    pipeline = taking_turns(folder, torch_dtype=torch.bfloat16)
    plan = pipeline.memory_plan
    assert plan is not None
    draw(pipeline)
    real = peak_bytes(lambda: draw(pipeline))
    assert real <= plan.most - plan.reserved <= 1.5 * real + 2 * FIXED


def test_what_needs_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    pipeline = taking_turns(folder)
    for call in (lambda: pipeline.to(torch.float16), lambda: pipeline.save_pretrained(tmp_path / "out")):
        with pytest.raises(ValueError, match="expected a pipeline whose models are resident, got one after the other"):
            call()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="enable_cuda_graphs: expected a pipeline without a memory limit"):
        pipeline.enable_cuda_graphs()


def test_a_limit_that_is_large_enough_changes_nothing(folder: Path) -> None:
    pipeline = KolorsPipeline.from_pretrained(folder, memory_limit="4GiB", device="cpu")
    assert pipeline.memory_plan is not None and not pipeline.memory_plan.one_by_one
    assert len(resident(pipeline)) == 3 and pipeline.to(torch.float64).dtype == torch.float64
