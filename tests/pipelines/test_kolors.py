"""KolorsPipeline against diffusers' pipeline on the same random weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import kolors_fast.schedulers as schedulers
from kolors_fast import without
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.ops import use_backend
from kolors_fast.pipelines.text import read_prompts

PROMPTS = ["a photo of a cat, high quality", "一张瓢虫的照片，微距"]
CALL = {"num_inference_steps": 4, "height": 64, "width": 48, "output_type": "np"}


def draw(pipeline: Any, prompt: Any, *, seed: int = 0, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(prompt, **{**CALL, "generator": generator, **arguments}).images
    return np.asarray(images)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert b.std() > 0.05  # not an empty picture
    return float(-10 * np.log10(np.square(a.astype(np.float64) - b).mean() + 1e-30))


@pytest.mark.parametrize("prompt", [*PROMPTS, "", PROMPTS], ids=["english", "chinese", "empty", "both"])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_same_picture_as_diffusers(ours: Any, theirs: Any, prompt: Any, per_prompt: int) -> None:
    expected = draw(theirs, prompt, num_images_per_prompt=per_prompt)
    got = draw(ours, prompt, num_images_per_prompt=per_prompt)
    assert len(got) == per_prompt * (len(prompt) if isinstance(prompt, list) else 1)
    assert got.dtype == np.float32
    assert psnr(got, expected) > 80


@pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
def test_arguments_are_those_of_diffusers(ours: Any, theirs: Any, method: str) -> None:
    """Names, order and defaults."""
    wanted, got = (inspect.signature(getattr(type(pipeline), method)).parameters for pipeline in (theirs, ours))
    assert list(got) == list(wanted)
    for name, parameter in wanted.items():
        default = list(got[name].default) if isinstance(parameter.default, list) else got[name].default
        assert default == parameter.default, name


def test_pictures_depend_on_prompt_and_seed(ours: Any) -> None:
    """Otherwise the comparisons above would prove little."""
    one = draw(ours, PROMPTS[0])
    assert psnr(draw(ours, PROMPTS[1]), one) < 40
    assert psnr(draw(ours, PROMPTS[0], seed=1), one) < 40


VARIANTS: dict[str, dict[str, Any]] = {
    "negative prompt": {"negative_prompt": "two red circles"},
    "empty negative prompt": {"negative_prompt": ""},
    "no guidance": {"guidance_scale": 1.0},
    "strong guidance": {"guidance_scale": 9.5},
    "denoising end": {"denoising_end": 0.6, "num_inference_steps": 10},
    "own timesteps": {"timesteps": [1000, 600, 200]},
    "own sigmas": {"sigmas": [20.0, 5.0, 1.0, 0.0]},
    "micro-conditioning": {
        "original_size": (100, 203),
        "crops_coords_top_left": (7, 9),
        "target_size": (1000, 1300),
    },
    "negative micro-conditioning": {
        "negative_original_size": (100, 203),
        "negative_crops_coords_top_left": (7, 9),
        "negative_target_size": (1000, 1300),
    },
    "odd size": {"height": 72, "width": 40},
    "default size": {"height": None, "width": None},
    "latents": {"latents": torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(4))},
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS.keys())
def test_arguments_mean_what_they_mean_in_diffusers(ours: Any, theirs: Any, arguments: dict[str, Any]) -> None:
    prompt = PROMPTS[0]
    expected, got = draw(theirs, prompt, **arguments), draw(ours, prompt, **arguments)
    assert psnr(got, expected) > 80
    if arguments.keys() & {"height"}:
        return
    plain = draw(ours, prompt)
    assert psnr(got, plain) < 70 or arguments.get("negative_prompt") == ""  # the argument has an effect


@pytest.mark.parametrize(
    ("name", "changes", "arguments"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("EulerAncestralDiscreteScheduler", {}, {}),
        ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
        ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 3.0}, {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {"eta": 0.7}),
    ],
)
def test_schedulers(
    ours: Any, theirs: Any, name: str, changes: dict[str, Any], arguments: dict[str, Any], monkeypatch: Any
) -> None:
    kind = getattr(diffusers, name)
    monkeypatch.setattr(theirs, "scheduler", kind.from_config(theirs.scheduler.config, **changes))
    ours.scheduler = getattr(schedulers, name).from_config(ours.scheduler.config, **changes)
    steps = {"num_inference_steps": 6, **arguments}
    assert psnr(draw(ours, PROMPTS, **steps), draw(theirs, PROMPTS, **steps)) > 70


def test_a_generator_per_picture(ours: Any, theirs: Any) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    expected = draw(theirs, PROMPTS, generator=generators())
    got = draw(ours, PROMPTS, generator=generators())
    assert psnr(got, expected) > 80
    alone = draw(ours, PROMPTS[1], generator=[torch.Generator().manual_seed(6)])
    assert psnr(alone[0], got[1]) > 80


def test_our_unet_inside_diffusers_pipeline(theirs: Any, folder: Path, monkeypatch: Any) -> None:
    expected = draw(theirs, PROMPTS)
    monkeypatch.setattr(theirs, "unet", KolorsUNet.from_pretrained(folder, subfolder="unet"))
    assert psnr(draw(theirs, PROMPTS), expected) > 80


def test_every_part_of_ours_inside_diffusers_pipeline(theirs: Any, folder: Path) -> None:
    pipeline = diffusers.KolorsPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        unet=KolorsUNet.from_pretrained(folder, subfolder="unet"),
        text_encoder=ChatGLM.from_pretrained(folder, subfolder="text_encoder"),
        tokenizer=ChatGLMTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        scheduler=schedulers.DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    reference = diffusers.KolorsPipeline(**{**theirs.components, "scheduler": None, "image_encoder": None})
    reference.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    assert psnr(draw(pipeline, PROMPTS), draw(reference, PROMPTS)) > 80


def test_encode_prompt(ours: Any, theirs: Any) -> None:
    for arguments in (
        {},
        {"num_images_per_prompt": 3},
        {"negative_prompt": ["two red", "circles on a blue background"]},
    ):
        expected = theirs.encode_prompt(PROMPTS, **arguments)
        for got, wanted in zip(ours.encode_prompt(PROMPTS, **arguments), expected, strict=True):
            assert got.shape == wanted.shape
            assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    unguided = ours.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert unguided[1] is None
    assert unguided[3] is None


def test_given_features_draw_the_same_picture_as_their_prompt(ours: Any) -> None:
    """The collapsed text of the prompt path against all 256 states of the other."""
    expected = draw(ours, PROMPTS, negative_prompt="two red circles", num_images_per_prompt=2)
    embeds, negative, pooled, negative_pooled = ours.encode_prompt(PROMPTS, negative_prompt="two red circles")
    assert embeds.shape == (2, 256, 32)
    got = draw(
        ours,
        None,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        num_images_per_prompt=2,  # diffusers repeats only the pooled ones, and fails
    )
    assert psnr(got, expected) > 80
    mixed = draw(
        ours,
        None,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt="two red circles",
        num_images_per_prompt=2,
    )
    assert psnr(mixed, expected) > 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_collapsed_text_is_what_the_unet_gets(ours: Any, dtype: torch.dtype) -> None:
    widths = []
    ours.unet.encoder_hid_proj.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    tokens = len(ours.tokenizer.encode(PROMPTS[0]))
    ours.to(dtype)
    draw(ours, PROMPTS[0])
    assert widths[0] == tokens + 1  # one key for all pads
    widths.clear()
    callback = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    draw(ours, PROMPTS[0], **callback)  # callbacks see the full form, which the UNet collapses again
    assert widths[0] == tokens + 1
    widths.clear()
    with without("pad_collapse"):
        draw(ours, PROMPTS[0])
    assert widths[0] == 256


def test_equal_prompts_are_read_once(ours: Any) -> None:
    sizes = []
    ours.text_encoder.embedding.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    features = read_prompts(ours.tokenizer, ours.text_encoder, ["a", "cat", "a"], 256)
    assert sizes == [2]
    assert torch.equal(features.embeds[0], features.embeds[2])
    assert not torch.equal(features.embeds[0], features.embeds[1])


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.filterwarnings("ignore:the text has 29 tokens, but the limit is 16")  # the point of the shorter one
def test_max_sequence_length_is_honoured(ours: Any, theirs: Any, length: int) -> None:
    """On purpose unlike diffusers, whose pipeline checks the argument and forgets it (its encode_prompt does not)."""
    expected = theirs.encode_prompt(PROMPTS[0], max_sequence_length=length)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), expected, strict=False))
    embeds |= dict(zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), expected[2:], strict=True))
    reference = draw(theirs, None, **embeds)
    assert psnr(draw(ours, PROMPTS[0], max_sequence_length=length), reference) > 80
    assert psnr(draw(theirs, PROMPTS[0], max_sequence_length=length), reference) < 70


def test_long_prompts_are_cut_with_a_warning(ours: Any, theirs: Any) -> None:
    long = " ".join(["fox"] * 400)
    with pytest.warns(UserWarning, match="the text has .* tokens, but the limit is 256"):
        got = draw(ours, long)
    assert psnr(got, draw(theirs, long)) > 80


def test_time_ids_keep_their_rows(ours: Any) -> None:
    """On purpose unlike diffusers, which repeats [negative, positive] and so interleaves them over the prompts."""
    seen: list[Tensor] = []
    draw(
        ours,
        PROMPTS,
        original_size=(100, 200),
        negative_original_size=(300, 400),
        negative_target_size=(500, 600),
        num_images_per_prompt=2,
        callback_on_step_end=lambda *args: seen.append(args[3]["add_time_ids"]),
        callback_on_step_end_tensor_inputs=["add_time_ids"],
    )
    negative, positive = [300, 400, 0, 0, 500, 600], [100, 200, 0, 0, 64, 48]
    assert seen[0].tolist() == [negative] * 4 + [positive] * 4
    one = draw(ours, PROMPTS[1], original_size=(100, 200), negative_original_size=(30, 40), negative_target_size=(5, 6))
    latents = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    both = draw(
        ours,
        PROMPTS,
        latents=latents,
        original_size=(100, 200),
        negative_original_size=(30, 40),
        negative_target_size=(5, 6),
    )
    assert psnr(both[1:], one) > 80


def test_time_ids_stay_exact_in_bfloat16(ours: Any) -> None:
    """On purpose unlike diffusers, which rounds 1003 to 1000 in bfloat16."""
    seen: list[Tensor] = []
    draw(
        ours.to(torch.bfloat16),
        PROMPTS[0],
        original_size=(1003, 1001),
        callback_on_step_end=lambda *args: seen.append(args[3]["add_time_ids"]),
        callback_on_step_end_tensor_inputs=["add_time_ids"],
    )
    assert seen[0][0].tolist() == [1003, 1001, 0, 0, 64, 48]


def test_forced_zeros(ours: Any, theirs: Any) -> None:
    """Zeros for both negative tensors; diffusers zeroes one and then fails on the other."""
    ours.config.force_zeros_for_empty_prompt = True
    zeros = torch.zeros(1, 256, 32), torch.zeros(1, 32)
    embeds, _, pooled, _ = theirs.encode_prompt(PROMPTS[0])
    expected = draw(
        theirs,
        None,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=zeros[0],
        negative_pooled_prompt_embeds=zeros[1],
    )
    assert psnr(draw(ours, PROMPTS[0]), expected) > 80
    assert psnr(draw(ours, PROMPTS[0], negative_prompt=""), draw(theirs, PROMPTS[0], negative_prompt="")) > 80
    encoded = ours.encode_prompt(PROMPTS[0], num_images_per_prompt=2)
    assert encoded[1].shape == (2, 256, 32)
    assert not encoded[1].any()
    assert encoded[3].shape == (2, 32)
    assert not encoded[3].any()


def test_one_negative_prompt_for_several_prompts(ours: Any) -> None:
    shared = draw(ours, PROMPTS, negative_prompt="two red circles")
    assert psnr(draw(ours, PROMPTS, negative_prompt=["two red circles"] * 2), shared) > 100


def test_callback_sees_and_replaces(ours: Any, theirs: Any) -> None:
    names = list(ours._callback_tensor_inputs)
    assert names == list(theirs._callback_tensor_inputs)
    shapes: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def callback(who: str) -> Any:
        def run(pipeline: Any, row: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            if row == 1:
                shapes[who] = [float(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}]
                return {
                    "latents": tensors["latents"] * 0.9,
                    "prompt_embeds": tensors["prompt_embeds"].flip(0),
                    "add_time_ids": tensors["add_time_ids"] + 3,
                }
            return {}

        return run

    expected, got = (
        draw(pipeline, PROMPTS[0], callback_on_step_end=callback(who), callback_on_step_end_tensor_inputs=names)
        for who, pipeline in (("theirs", theirs), ("ours", ours))
    )
    assert shapes["ours"] == shapes["theirs"]
    assert psnr(got, expected) > 80
    assert psnr(got, draw(ours, PROMPTS[0])) < 60


def test_diffusers_callback_that_drops_guidance_half_way(ours: Any, theirs: Any) -> None:
    """The official one for SDXL, which cuts the batch in half and sets the guidance scale to 0."""
    from diffusers.callbacks import SDXLCFGCutoffCallback

    strong = {"guidance_scale": 12.0, "num_inference_steps": 8}
    expected, got = (
        draw(pipeline, PROMPTS[0], **strong, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.25))
        for pipeline in (theirs, ours)
    )
    assert psnr(got, expected) > 80
    assert psnr(got, draw(ours, PROMPTS[0], **strong)) < 60


SCALES = [5.0, 0.5, 9.5]


def several(ours: Any, scale: Any, **arguments: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3 * arguments.get("num_images_per_prompt", 1))]
    return draw(ours, [*PROMPTS, "two red circles"], guidance_scale=scale, generator=generators, **arguments)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_guidance_of_each_prompt(ours: Any, scheduler: str) -> None:
    """A picture is that of its own guidance, also without any, whatever its neighbours'."""
    ours.scheduler = getattr(schedulers, scheduler).from_config(ours.scheduler.config)
    with use_backend("reference"):
        mixed = several(ours, SCALES, num_images_per_prompt=2, output_type="latent")
        for prompt, scale in enumerate(SCALES):
            of = slice(2 * prompt, 2 * prompt + 2)
            same = several(ours, scale, num_images_per_prompt=2, output_type="latent")
            # without guidance the others' batch is half as large, in which products may round otherwise
            atol = 0 if scale > 1 else 1e-5 * np.abs(same[of]).max()
            np.testing.assert_allclose(mixed[of], same[of], rtol=0, atol=atol)
    assert psnr(several(ours, SCALES)[2:], several(ours, 5.0)[2:]) < 70


def test_a_picture_is_the_one_drawn_alone(ours: Any) -> None:
    """In float64, for a batch of another size rounds otherwise, and guidance enlarges that."""
    ours.to(torch.float64)
    negatives = ["a cat", "", "a fox"]
    with use_backend("reference"):
        mixed = several(ours, SCALES, negative_prompt=negatives, output_type="latent")
        for item, prompt in enumerate([*PROMPTS, "two red circles"]):
            given = {"guidance_scale": SCALES[item], "negative_prompt": negatives[item], "seed": item}
            alone = draw(ours, prompt, **given, output_type="latent")
            np.testing.assert_allclose(mixed[item : item + 1], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_callbacks_read_the_guidance_of_each_prompt(ours: Any) -> None:
    seen: list[Any] = []

    def callback(pipeline: Any, row: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipeline.guidance_scale, pipeline.do_classifier_free_guidance))
        if row == 1:
            pipeline._guidance_scale = [2.0, 3.0, 4.0]
        return {}

    changed = several(ours, SCALES, callback_on_step_end=callback)
    assert seen == [(tuple(SCALES), True)] * 2 + [([2.0, 3.0, 4.0], True)] * 2
    assert psnr(changed, several(ours, SCALES)) < 80
    seen.clear()
    several(ours, [3.0] * 3, callback_on_step_end=lambda *args: seen.append(args[0].guidance_scale) or {})
    assert seen == [3.0] * 4  # a number where it is one
    several(ours, [1.0, 0.5, 0.0], callback_on_step_end=lambda *args: seen.append(args[0].do_classifier_free_guidance))
    assert seen[4:] == [False] * 4


def test_interrupting(ours: Any, theirs: Any) -> None:
    def stop(pipeline: Any, row: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = row == 1
        return tensors

    expected, got = (
        draw(pipeline, PROMPTS[0], callback_on_step_end=stop, output_type="latent") for pipeline in (theirs, ours)
    )
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert psnr(got, draw(ours, PROMPTS[0], output_type="latent")) < 60
    assert psnr(draw(ours, PROMPTS[0]), draw(theirs, PROMPTS[0])) > 80  # the next call runs through


def test_output_types(ours: Any, theirs: Any) -> None:
    array = draw(ours, PROMPTS)
    pictures = ours(PROMPTS, **{**CALL, "output_type": "pil", "generator": torch.Generator().manual_seed(0)}).images
    theirs_too = theirs(PROMPTS, **{**CALL, "output_type": "pil", "generator": torch.Generator().manual_seed(0)}).images
    assert [picture.size for picture in pictures] == [(48, 64)] * 2
    assert [picture.mode for picture in pictures] == ["RGB"] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), (array * 255).round().astype(np.uint8))
    difference = np.asarray(pictures[0]).astype(int) - np.asarray(theirs_too[0])
    assert np.abs(difference).max() <= 1
    tensor = ours(PROMPTS, **{**CALL, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}).images
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latents = draw(ours, PROMPTS, output_type="latent")
    expected = draw(theirs, PROMPTS, output_type="latent")
    np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())
    alone = ours(PROMPTS, **CALL, return_dict=False, generator=torch.Generator().manual_seed(0))
    assert isinstance(alone, tuple)
    np.testing.assert_array_equal(alone[0], array)


def test_progress_bar(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    draw(ours, PROMPTS[0], denoising_end=0.5)
    assert capfd.readouterr().err == ""
    ours.set_progress_bar_config(desc="drawing", ascii=True)
    draw(ours, PROMPTS[0], num_inference_steps=4)
    shown = capfd.readouterr().err
    assert "drawing: 100%" in shown
    assert "4/4" in shown
    assert ours.num_timesteps == 4


@pytest.mark.parametrize("force_upcast", [True, False])
def test_float16_decodes_in_float16(ours: Any, force_upcast: bool) -> None:
    """The autoencoder keeps its dtype whatever `force_upcast` asks of diffusers' pipelines."""
    ours.to(torch.float16)
    ours.vae.register_config(force_upcast=force_upcast)
    dtypes = []
    ours.vae.decoder.register_forward_hook(lambda _, args, __: dtypes.append(args[0].dtype))
    image = draw(ours, PROMPTS[0], output_type="pt")
    assert dtypes == [torch.float16]
    assert np.isfinite(image).all()
    assert ours.vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(ours: Any, dtype: torch.dtype) -> None:
    full = draw(ours, PROMPTS[0])
    half = draw(ours.to(dtype), PROMPTS[0], latents=fixed_noise(dtype))
    assert psnr(half, draw(ours.to(torch.float32), PROMPTS[0], latents=fixed_noise(torch.float32))) > 25
    assert half.shape == full.shape


def fixed_noise(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(4)).to(dtype)


def test_autoencoder_of_another_dtype(ours: Any) -> None:
    """A float32 autoencoder beside a half-precision UNet, which diffusers refuses deep inside a convolution."""
    ours.to(torch.bfloat16)
    ours.vae.to(torch.float32)
    assert draw(ours, PROMPTS[0]).dtype == np.float32
