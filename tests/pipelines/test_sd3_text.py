"""SD3's prompts against diffusers' own pipeline, with any of the three encoders missing, and dropped for training."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from kolors_fast.models.checkpoint import Config
from kolors_fast.pipelines.sd3_text import (
    SD3TextEncoders,
    SD3TextParts,
    drop_sd3_features,
    per_encoder,
    read_sd3_parts,
    read_sd3_prompts,
)
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer

from .text_models import CLIP_TOKENS, JOINT_DIM, POOLED_DIM, write_sd3_text

CLASSES = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer_2": CLIPTokenizer,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer_3": T5TokenizerFast,
    "text_encoder_3": T5EncoderModel,
}
PROMPTS = (
    ["a photo of a cat", "", "a photo of a cat", "TWO red circles!"],
    ["a green square", "the quick brown fox", "", "the fox"],
    ["two red circles on a blue background", "a cat", "a cat", ""],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3_text(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    parts = {name: kind.from_pretrained(folder / name) for name, kind in CLASSES.items()}
    pipeline = StableDiffusion3Pipeline(**parts, transformer=None, vae=None, scheduler=None)
    pipeline.transformer = type("Transformer", (), {"config": Config(joint_attention_dim=JOINT_DIM)})()
    return pipeline


def load(folder: Path, *missing: str) -> SD3TextEncoders:
    parts = {}
    for name in CLASSES.keys() - missing:
        read = load_tokenizer if name.startswith("tokenizer") else load_text_encoder
        parts[name] = read(folder, name, CLASSES[name].__name__)
    return SD3TextEncoders(JOINT_DIM, POOLED_DIM, **parts)


@pytest.fixture(scope="module")
def ours(folder: Path) -> SD3TextEncoders:
    return load(folder)


def their_features(pipeline: Any, prompts: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            *prompts, device="cpu", do_classifier_free_guidance=False, **arguments
        )
    return embeds, pooled


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
@pytest.mark.parametrize("length", [256, 77])
def test_features_are_those_of_diffusers(
    theirs: Any, ours: SD3TextEncoders, length: int, clip_skip: int | None
) -> None:
    embeds, pooled = their_features(theirs, PROMPTS, max_sequence_length=length, clip_skip=clip_skip)
    got = read_sd3_prompts(ours, PROMPTS, length, clip_skip)
    assert got.prompt_embeds.shape == (len(got), CLIP_TOKENS + length, JOINT_DIM)
    torch.testing.assert_close(got.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-6)
    # the checkpoint is no trivial one: every text, encoder and layer shows
    assert (embeds[0] - embeds[1]).abs().mean() > 0.1
    assert all(block.std() > 0.1 for block in (embeds[:, :77, :8], embeds[:, :77, 8:24], embeds[:, 77:]))
    assert torch.equal(embeds[:, :77, 24:], torch.zeros_like(embeds[:, :77, 24:]))


def test_cut_prompts_are_those_of_diffusers_and_named(theirs: Any, ours: SD3TextEncoders) -> None:
    long = ["a photo of a cat and of a dog, " * 12 + "at last a star"]
    embeds, pooled = their_features(theirs, [long] * 3, max_sequence_length=20)
    with pytest.warns(UserWarning, match="lost at its end") as caught:
        got = read_sd3_prompts(ours, [long] * 3, 20)
    torch.testing.assert_close(got.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-6)
    messages = [str(warning.message) for warning in caught]
    assert [message.split(":")[0] for message in messages] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert all(re.search("limit is (77|20); .*at last a star'$", message) for message in messages)


def test_nothing_is_said_of_prompts_that_fit(ours: SD3TextEncoders) -> None:
    ids = ours.tokenizer_3("a photo of a cat")["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_sd3_parts(ours, [["a photo of a cat"]] * 3, max_sequence_length=len(ids))
    with pytest.warns(UserWarning, match=f"text_encoder_3: the prompt has {len(ids)} tokens"):
        read_sd3_parts(ours, [["a photo of a cat"]] * 3, max_sequence_length=len(ids) - 1)


def test_without_t5_as_diffusers(theirs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "text_encoder_3", None)
    embeds, pooled = their_features(theirs, PROMPTS, max_sequence_length=100)
    got = read_sd3_prompts(load(folder, "text_encoder_3", "tokenizer_3"), PROMPTS, 100)
    torch.testing.assert_close(got.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=3)))
def test_zeros_stand_for_any_missing_encoder(ours: SD3TextEncoders, present: tuple[bool, ...]) -> None:
    """A missing one reads as one whose output was dropped."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    found = {name: getattr(ours, name) for name, there in zip(names, present, strict=True) if there}
    found |= {name: getattr(ours, name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    expected = read_sd3_prompts(ours, PROMPTS, 30)
    embeds, pooled = expected.prompt_embeds.clone(), expected.pooled_prompt_embeds.clone()
    places = ((slice(77), slice(8)), (slice(77), slice(8, 24)), (slice(77, None), slice(None)))
    for there, (rows, channels) in zip(present, places, strict=True):
        if not there:
            embeds[:, rows, channels] = 0
            if rows == slice(77):
                pooled[:, channels] = 0
    got = read_sd3_prompts(SD3TextEncoders(JOINT_DIM, POOLED_DIM, **found), PROMPTS, 30)
    assert torch.equal(got.prompt_embeds, embeds) and torch.equal(got.pooled_prompt_embeds, pooled)


def test_without_any_encoder_of_the_released_widths() -> None:
    parts = read_sd3_parts(SD3TextEncoders(4096, 2048), [["a cat"]] * 3)
    assert parts.clip_l.shape == (1, 77, 768) and parts.clip_g_pooled.shape == (1, 1280)
    assert parts.t5.shape == (1, 256, 4096) and parts.t5.dtype == torch.float32
    assert not parts.join().prompt_embeds.any() and parts.join().pooled_prompt_embeds.shape == (1, 2048)


def test_zeros_have_the_dtype_of_the_first_encoder_present(folder: Path) -> None:
    encoder = load_text_encoder(folder, "text_encoder_2", "CLIPTextModelWithProjection", torch.bfloat16)
    tokenizer = load_tokenizer(folder, "tokenizer_2", "CLIPTokenizer")
    encoders = SD3TextEncoders(JOINT_DIM, POOLED_DIM, tokenizer_2=tokenizer, text_encoder_2=encoder)
    got = read_sd3_prompts(encoders, PROMPTS, 20)
    assert got.prompt_embeds.dtype == got.pooled_prompt_embeds.dtype == torch.bfloat16


def test_each_encoder_reads_equal_prompts_once(ours: SD3TextEncoders) -> None:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    rows: list[int] = []
    hooks = [
        getattr(ours, name).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
        for name in names
    ]
    got = read_sd3_prompts(ours, [["a", "b", "a"], ["c"] * 3, ["a", "b", "c"]], 20)
    for hook in hooks:
        hook.remove()
    assert rows == [2, 1, 3]
    assert not got.prompt_embeds.requires_grad
    other = got.select(torch.tensor([2, 0]))
    assert len(other) == 2 and torch.equal(other.prompt_embeds[1], got.prompt_embeds[0])
    assert other.to(torch.float64).pooled_prompt_embeds.dtype == torch.float64


def parts_of_ones(count: int) -> SD3TextParts:
    shapes = {"clip_l": (7, 2), "clip_l_pooled": (2,), "clip_g": (7, 3), "clip_g_pooled": (3,), "t5": (9, 6)}
    return SD3TextParts(**{name: torch.ones(count, *shape) for name, shape in shapes.items()})


def test_drops_are_independent_and_as_frequent_as_asked() -> None:
    count = 20_000
    parts = drop_sd3_features(parts_of_ones(count), generator=torch.Generator().manual_seed(3))
    kept = torch.stack([parts.clip_l[:, 0, 0], parts.clip_g[:, 0, 0], parts.t5[:, 0, 0]])
    patterns = torch.tensor([4.0, 2.0, 1.0]) @ kept
    for pattern in range(8):
        share = 1.0
        for bit in range(3):
            share *= 0.537 if pattern >> bit & 1 else 0.463
        sigma = (share * (1 - share) / count) ** 0.5
        assert (patterns == pattern).float().mean().item() == pytest.approx(share, abs=4 * sigma)
    # all of an output goes, with its pooled vector
    for value, whole in ((parts.clip_l, kept[0]), (parts.clip_l_pooled, kept[0]), (parts.clip_g_pooled, kept[1])):
        assert torch.equal(value, whole.view(-1, *(1,) * (value.dim() - 1)).expand_as(value))
    assert torch.equal(parts.t5, kept[2].view(-1, 1, 1).expand_as(parts.t5))


def test_drops_repeat_with_the_generator_and_leave_the_parts_alone() -> None:
    parts = parts_of_ones(64)
    first, second = (drop_sd3_features(parts, generator=torch.Generator().manual_seed(3)).join() for _ in range(2))
    other = drop_sd3_features(parts, generator=torch.Generator().manual_seed(4)).join()
    assert torch.equal(first.prompt_embeds, second.prompt_embeds)
    assert not torch.equal(first.prompt_embeds, other.prompt_embeds)
    assert parts.t5.all() and parts.clip_l.all()
    nothing = drop_sd3_features(parts_of_ones(3), 1.0).join()
    assert not nothing.prompt_embeds.any() and not nothing.pooled_prompt_embeds.any()
    assert drop_sd3_features(parts_of_ones(3), 0.0).t5.all()
    unusable = parts_of_ones(1).t5.fill_(float("nan"))
    broken = SD3TextParts(*(unusable if name == "t5" else part for name, part in vars(parts_of_ones(1)).items()))
    assert not drop_sd3_features(broken, 1.0).t5.any()  # zeros, not a product with zero
    with pytest.raises(ValueError, match=r"probability: expected 0 to 1, got 1.5"):
        drop_sd3_features(parts, 1.5)


def test_prompts_for_each_encoder() -> None:
    assert per_encoder("a", None, "") == per_encoder("a", "", None) == (["a"], ["a"], ["a"])
    assert per_encoder(["a", "b"], "c", ["d", "e"]) == (["a", "b"], ["c", "c"], ["d", "e"])
    assert per_encoder("", None, "bad", count=2, prefix="negative_") == (["", ""], ["", ""], ["bad", "bad"])
    with pytest.raises(ValueError, match="negative_prompt_2: expected one string or 2, got 3"):
        per_encoder("a", ["b"] * 3, None, count=2, prefix="negative_")


def test_refusals_of_the_reader(ours: SD3TextEncoders) -> None:
    for prompts in ([["a"], ["b"]], [[], [], []], [["a"], ["b"], ["c", "d"]]):
        with pytest.raises(ValueError, match="prompts: expected three lists of one length"):
            read_sd3_parts(ours, prompts)
    for length in (0, 513, 1.5):
        with pytest.raises(ValueError, match="max_sequence_length: expected 1 to 512"):
            read_sd3_parts(ours, [["a"]] * 3, length)  # type: ignore[arg-type]
    for skip in (-1, 3):
        with pytest.raises(ValueError, match="clip_skip: expected None or 0 to 2, got"):
            read_sd3_parts(ours, [["a"]] * 3, clip_skip=skip)


def test_refusals_of_encoders_that_do_not_fit(ours: SD3TextEncoders) -> None:
    t5 = {"tokenizer_3": ours.tokenizer_3, "text_encoder_3": ours.text_encoder_3}
    clips = {name: getattr(ours, name) for name in CLASSES if not name.endswith("_3")}
    with pytest.raises(ValueError, match="tokenizer_3: expected the tokenizer of text_encoder_3, got None"):
        SD3TextEncoders(JOINT_DIM, POOLED_DIM, text_encoder_3=ours.text_encoder_3)
    with pytest.raises(ValueError, match=r"text_encoder_3: expected a width of 64, .* got 32"):
        SD3TextEncoders(64, POOLED_DIM, **t5)
    with pytest.raises(ValueError, match=r"text_encoder and text_encoder_2: expected projections that fill .* 20, got"):
        SD3TextEncoders(JOINT_DIM, 20, **clips)
    with pytest.raises(ValueError, match="text_encoder and text_encoder_2: expected at most 20 features"):
        SD3TextEncoders(20, POOLED_DIM, **clips)
    plain = CLIPTextModel(ours.text_encoder.config)
    with pytest.raises(ValueError, match="text_encoder: expected None or a CLIPTextModelWithProjection"):
        SD3TextEncoders(JOINT_DIM, POOLED_DIM, ours.tokenizer, plain)
