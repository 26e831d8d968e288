"""PixArt's prompts against diffusers' own pipeline, the cleaning of captions, and the files of text encoders."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5EncoderModel, T5Tokenizer

from kolors_fast.pipelines.clean_caption import clean_caption
from kolors_fast.pipelines.pixart_text import SIGMA_TOKENS, read_pixart_prompts
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer

from .text_models import JOINT_DIM, write_pixart_text

PROMPTS = [
    "A <b>Red</b> circle -- see https://example.com/a.png",
    "",
    "a cat",
    "  A cat ",
    "&#65; star",  # cleaned once A, twice a
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixart_text(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    vae, transformer, scheduler = None, None, None
    return diffusers.PixArtAlphaPipeline(tokenizer, encoder, vae, transformer, scheduler)


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(folder, "tokenizer", "T5Tokenizer")
    return tokenizer, load_text_encoder(folder, "text_encoder", "T5EncoderModel")


def their_features(pipeline: Any, prompts: list[str], **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu", **arguments)
    return embeds, mask


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("length", [120, SIGMA_TOKENS])
def test_features_are_those_of_diffusers(theirs: Any, ours: tuple[Any, Any], length: int, clean: bool) -> None:
    embeds, mask = their_features(theirs, PROMPTS, max_sequence_length=length, clean_caption=clean)
    got = read_pixart_prompts(*ours, PROMPTS, length, clean)
    assert got.prompt_embeds.shape == (len(got), length, JOINT_DIM)
    assert torch.equal(got.prompt_attention_mask, mask) and got.prompt_attention_mask.dtype == mask.dtype
    torch.testing.assert_close(got.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)
    assert mask[1].sum() == 1 and mask[0].sum() > 8  # the end alone, and words
    assert (embeds[0] - embeds[2]).abs().mean() > 0.1


def test_cut_prompts_are_those_of_diffusers_and_shown(theirs: Any, ours: tuple[Any, Any]) -> None:
    prompts = ["a cat", "a photo of a cat, " * 3 + "at last a star"]
    embeds, mask = their_features(theirs, prompts, max_sequence_length=20)
    with pytest.warns(UserWarning, match="text_encoder: the prompt has .* limit is 20; .*at last a star'$") as caught:
        got = read_pixart_prompts(*ours, prompts, 20)
    assert len(caught) == 1
    assert torch.equal(got.prompt_attention_mask, mask) and mask[1].all()
    torch.testing.assert_close(got.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)


def test_equal_prompts_are_read_once(ours: tuple[Any, Any]) -> None:
    rows: list[int] = []
    hook = ours[1].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    got = read_pixart_prompts(*ours, ["a cat", "A Cat", "", "a cat  "])
    hook.remove()
    assert rows == [2] and len(got) == 4
    assert torch.equal(got.prompt_embeds[0], got.prompt_embeds[3])
    other = got.select(slice(2, 3)).to(dtype=torch.bfloat16)
    assert other.prompt_embeds.dtype == torch.bfloat16 and not got.prompt_embeds.requires_grad
    assert other.prompt_attention_mask.tolist() == [[1] + [0] * 119]


def test_refusals_of_the_reader(ours: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one, got 0"):
        read_pixart_prompts(*ours, [])
    for length in (0, 2.5):
        with pytest.raises(ValueError, match="max_sequence_length: expected a whole number from 1"):
            read_pixart_prompts(*ours, ["a"], length)  # type: ignore[arg-type]


# every rule has its piece
PIECES = """
a photo of¦cat¦A¦.¦,¦" "¦<person>¦https://example.com/a_b.html¦https://example.de/a¦http:x¦www:y¦www.foo.org/x-y/
me@foo.com¦@handle9¦<b>¦</b>¦<br/>¦<a href="x">¦</a>¦<script>¦</script>¦<rt>¦</rt>¦<!-- c -->
12:34 漢字¦&amp;quot;¦<script>x</script>¦<style>x</style>¦<template>x</template>¦<rp>x</rp>¦＆amp;lt;¦＆eacute;
<!doctype html>¦<![CDATA[x]]>¦<!x>¦&amp;¦&amp¦&quot;¦&lt;¦&copy;¦&foo;¦AT&T¦&#65;¦&#x42;¦&#150;¦&eacute;¦&notit;¦;
漢字¦〇㈱㍿¦–—―¦«quoted»¦“curly”¦\u201elow\u201f¦\u201asingle\u201b¦‘it’s’¦12:34 ¦192.168.0.1¦\\n¦#12¦#1234¦#12345
1234567¦img.png¦an.archive.pdf¦png image¦jpg images¦""¦'''¦...¦#©®¦(x)¦[y]¦{z}¦a|b¦ . ¦this-is-my-cute-cat
under_score_name¦jc6640¦jc6640vc¦6640vc231¦j2d1a2a¦worldwide free shipping¦free download free¦click for more¦page 12
1024x768¦5.5\u04456×7¦ : ¦:¦-¦_¦+¦'¦%20¦%41¦\ufb01ne \ufb02y¦ＡＢＣ１２¦e\u0301¦İ¦ß¦\u00a0¦\u3000¦\t¦x < y > z¦a<b¦<¦>¦&
½¦x²¦русский¦😀¦\u02bcn
"""
PIECE = st.sampled_from(re.split("[¦\n]", PIECES.strip("\n")))


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(PIECE, st.sampled_from(["", " "])), min_size=1, max_size=8))
def test_captions_are_cleaned_as_by_diffusers(pieces: list[tuple[str, str]]) -> None:
    caption = "".join(piece + space for piece, space in pieces)
    cleaned = reference(caption)
    assert clean_caption(caption) == cleaned
    assert clean_caption(cleaned) == reference(cleaned)


def reference(caption: str) -> str:
    pipeline = diffusers.PixArtAlphaPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BeautifulSoup on captions that look like a link or a file
        return pipeline._clean_caption(pipeline.__new__(pipeline), caption)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A <b>Cat</b> &amp; a dog, see https://example.com/cats", "a cat a dog, see"),
        ("@someone: this-is-my-cute-cat 漢字 jc6640vc, free shipping", "this is my cute cat ,"),
        ("img_0123.png  1024x768  “quoted”", '"quoted"'),
        ("schÃ¶n", "schã¶n"),  # ftfy would mend it
    ],
)
def test_captions_cleaned_once(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_a_prompt_of_which_cleaning_leaves_nothing_warns(ours: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match="prompt: cleaning leaves nothing of '红色圆形'; clean_caption=False"):
        read_pixart_prompts(*ours, ["红色圆形"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pixart_prompts(*ours, ["", "a cat"])
        read_pixart_prompts(*ours, ["红色圆形"], clean_caption=False)
