"""The savings over whole trajectories: against plain code, inside diffusers' own pipeline, under callbacks."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_fast import KolorsPipeline, KolorsUNet, savings, use_backend, without
from kolors_fast.assets import bundled
from kolors_fast.models.conditioning import Steps

PROMPT = "红色圆形在蓝色方块左边"
ALL = tuple(savings.SAVINGS)


pytestmark = pytest.mark.usefixtures("every_product_of_ours")


def latents(pipeline: Any, *, seed: int = 0, steps: int = 25, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensor = pipeline(
        PROMPT, num_inference_steps=steps, generator=generator, output_type="latent", **arguments
    ).images
    return drawn.double()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def tiny() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)


def test_fused_trajectory_is_the_reference_in_float32(tiny: KolorsPipeline) -> None:
    fused = latents(tiny)
    with use_backend("reference"), without(*ALL):
        reference = latents(tiny)
    assert (fused - reference).abs().max() < 1e-4 * reference.abs().max()
    assert not torch.equal(fused, reference)  # two ways of computing it


def test_fused_trajectory_in_bfloat16_is_as_near_the_truth_as_eager(tiny: KolorsPipeline) -> None:
    """The ops' contract, on whole trajectories: at most 1.5 times the error of plain PyTorch. The truth is the
    trajectory in float32; the median over seeds, for now and then rounding decides what a picture shows."""
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.bfloat16)
    eager, ours = [], []
    for seed in range(7):
        with use_backend("reference"), without(*ALL):
            truth = latents(tiny, seed=seed)
            eager.append(distance(latents(pipeline, seed=seed), truth))
        ours.append(distance(latents(pipeline, seed=seed), truth))
    assert statistics.median(ours) <= 1.5 * statistics.median(eager)


@pytest.mark.parametrize("name", [None, *ALL])
def test_each_saving_inside_diffusers_pipeline(theirs: Any, folder: Path, name: str | None) -> None:
    expected = latents(theirs, steps=3, height=64, width=48)
    pipeline = diffusers.KolorsPipeline(
        **{**theirs.components, "unet": KolorsUNet.from_pretrained(folder, subfolder="unet"), "image_encoder": None}
    )
    with without(*([name] if name else [])):
        got = latents(pipeline, steps=3, height=64, width=48)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def count(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> list[int]:
    """Grows by one with every call."""
    calls, original = [], getattr(kind, method)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, counted)
    return calls


def test_a_picture_reads_its_prompt_once(theirs: Any, ours: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count(monkeypatch, KolorsUNet, "embed_added")
    planned = count(monkeypatch, KolorsUNet, "plan_steps")
    latents(ours, steps=6, height=64, width=48)
    assert (len(read), len(planned)) == (1, 1)
    with without("prompt_cache", "step_table"):
        latents(ours, steps=6, height=64, width=48)
    assert (len(read), len(planned)) == (1 + 6, 1 + 6)
    read.clear()
    components = {**theirs.components, "unet": ours.unet, "image_encoder": None}
    latents(diffusers.KolorsPipeline(**components), steps=6, height=64, width=48)
    assert len(read) == 1


def test_callbacks_that_change_what_is_kept(ours: Any) -> None:
    """Text, sizes, weights of the text and of the time embedding, each in the middle of a run."""

    def changes(pipeline: Any, row: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if row == 0:
            tensors["prompt_embeds"].mul_(0.5)
        if row == 1:
            return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}
        if row == 2:
            pipeline.unet.mid_block.resnets[0].time_emb_proj.weight.mul_(2)
        if row == 3:
            pipeline.unet.time_embedding.linear_1.weight.data.neg_()
        if row == 4:
            pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)
        return {}

    before = {name: value.clone() for name, value in ours.unet.state_dict().items()}
    arguments = {"steps": 7, "height": 64, "width": 48, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    unchanged = latents(ours, **arguments)
    got = latents(ours, callback_on_step_end=changes, **arguments)
    ours.unet.load_state_dict(before)
    with without(*ALL):
        want = latents(ours, callback_on_step_end=changes, **arguments)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (got - unchanged).abs().max() > 1e-2 * want.abs().max()


def test_steps_of_a_device_row_are_those_of_the_host(ours: Any) -> None:
    text, pooled = torch.randn(2, 9, 32), torch.randn(2, 32)
    with torch.no_grad():
        prompt = ours.unet.read_prompt(text, {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}, torch.float32)
        steps: Steps = ours.unet.plan_steps(torch.tensor([900.0, 500.0, 1.0]), prompt)
        for row, timestep in enumerate((900.0, 500.0, 1.0)):
            on_host, on_device = steps.at(row), steps.at(torch.tensor([row]))
            alone = ours.unet.shifts(ours.unet.embed_time(timestep, text), prompt)
            for block, shift in alone.items():
                assert torch.equal(on_host.modulations[block], on_device.modulations[block])
                assert torch.allclose(on_host.modulations[block], shift, rtol=1e-5, atol=1e-5)
