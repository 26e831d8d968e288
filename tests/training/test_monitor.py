"""What a training looks at: figures of models whose answers are known, right by construction or wrong in one way."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_fast.data.shapes import held_out_prompts, render, sample_training
from kolors_fast.data.shapes.scene import REQUEST_PARTS, request_parts
from kolors_fast.data.shapes.split import CATEGORIES
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.training.config import LanguageModelStage, TokenizerRecipe
from kolors_fast.training.monitor import decode, judge_reconstructions, validation_prompts
from kolors_fast.training.objectives import CaptionReader, LanguageModelObjective
from kolors_fast.training.pool import encode_scenes
from kolors_fast.training.streams import Streams
from kolors_fast.training.tokenizer import train_tokenizer


class Exact:
    """An autoencoder whose latents are the pixels; `decode` may be replaced by something that loses them."""

    device = torch.device("cpu")

    def encode(self, pixels):
        self.seen = pixels.shape
        return (SimpleNamespace(mode=lambda: pixels),)

    def decode(self, latents):
        return (latents,)


def test_reconstructions_are_judged_at_the_asked_size(tmp_path):
    vae = Exact()
    figures = judge_reconstructions(vae, tmp_path / "grid.png", (96, 160), count=20)
    assert figures["error"] == 0 and figures["read right"] == 1
    assert vae.seen[2:] == (96, 160)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 * 160, 2 * 96)


def test_what_a_pool_encodes_the_monitor_decodes():
    """With the autoencoder's shift, which SD3's has."""
    vae, scene = Exact(), sample_training(np.random.default_rng(0))[0]
    vae.config = SimpleNamespace(scaling_factor=1.5, shift_factor=0.25)
    pixels = torch.from_numpy(render(scene, 64, 96)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = encode_scenes(vae, [scene], 64, 96)
    torch.testing.assert_close(latents, 1.5 * (pixels - 0.25))
    assert (decode(vae, latents) == render(scene, 64, 96)).all()


def test_lost_objects_are_not_read_right(tmp_path):
    vae = Exact()
    vae.decode = lambda latents: (latents.mean((2, 3), keepdim=True).expand_as(latents),)
    figures = judge_reconstructions(vae, tmp_path / "grid.png", (128, 128), count=20)
    assert figures["error"] > 0.01 and figures["read right"] == 0


def test_validation_prompts_are_none_of_the_evaluation():
    ours = validation_prompts(200)
    assert not {one.prompt for one in ours} & {one.prompt for one in held_out_prompts()}
    assert {one.category for one in ours} == set(CATEGORIES)


class Reads(CaptionReader):
    """Reads every caption right, but takes a star that is green for a circle."""

    def __init__(self, objective):
        super().__init__(objective.module.model)
        encode = objective.tokenizer.encode
        self.vocabulary = objective.tokenizer.vocab_size
        self.known = {tuple(encode(one.prompt)): request_parts(one.request) for one in validation_prompts(200)}

    def forward(self, ids, lengths):
        rows = [tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]
        parts = torch.tensor([self.known.get(row, (0,) * len(REQUEST_PARTS)) for row in rows])
        for k in (3, 6, 9):  # size, colour, shape of each object
            green = parts[:, k + 1] == REQUEST_PARTS[k + 1].index("green")
            star = parts[:, k + 2] == REQUEST_PARTS[k + 2].index("star")
            parts[green & star, k + 2] = REQUEST_PARTS[k + 2].index("circle")
        logits = torch.zeros(*ids.shape, self.vocabulary)
        return logits, tuple(torch.eye(len(part))[parts[:, k]] for k, part in enumerate(REQUEST_PARTS))


def test_held_out_captions_are_counted_by_category(tmp_path):
    tokenizer = train_tokenizer(TokenizerRecipe(pieces=400, captions=500), 0, tmp_path)
    model = ChatGLM(
        num_layers=1, padded_vocab_size=tokenizer.vocab_size, hidden_size=8, ffn_hidden_size=8, kv_channels=8,
        num_attention_heads=1, add_lm_head=True,
    )  # fmt: skip
    stage = LanguageModelStage("lm", "language_model", steps=1, batch=4, learning_rate=1e-3, warmup=0, decay=0)
    objective = LanguageModelObjective(model, tokenizer, stage, Streams(0, "lm"))
    figures = objective.monitor(Reads(objective), tmp_path, 1)
    assert figures["validation loss"] == pytest.approx(np.log(tokenizer.vocab_size), rel=1e-5)
    for category in CATEGORIES[:3]:
        assert figures[f"{category} read right"] == 1
    stars = [
        any((thing.shape, thing.colour) == ("star", "green") for thing in one.request.objects)
        for one in validation_prompts(200)
        if one.category == "new pair"
    ]
    assert 0 < np.mean(stars) < 1
    assert figures["new pair read right"] == pytest.approx(1 - np.mean(stars))
