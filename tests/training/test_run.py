"""A whole recipe on miniature models: every stage, resuming, the pipeline folder and its export."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kolors_fast.cli import main
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.pipelines.kolors import KolorsPipeline
from kolors_fast.training import export, run
from kolors_fast.training.config import load_recipe
from kolors_fast.training.encoded import ABSENT, EncodedCaptions, encode_captions, encode_texts, pad_left
from kolors_fast.training.kolors import KolorsSession
from kolors_fast.training.monitor import validation_prompts
from kolors_fast.training.objectives import (
    AutoencoderObjective,
    EpsilonObjective,
    LanguageModelObjective,
    validation_loss,
)
from kolors_fast.training.parallel import World
from kolors_fast.training.pool import build_pool
from kolors_fast.training.streams import Streams
from kolors_fast.training.trainer import computing_in

RECIPE = """
name = "miniature"
seed = 3
[tokenizer]
pieces = 560
captions = 600
[vae]
latent_channels = 4
block_out_channels = [4, 4, 8, 8]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
layers_per_block = 1
norm_num_groups = 2
[text_encoder]
num_layers = 2
padded_vocab_size = 576
hidden_size = 16
ffn_hidden_size = 16
kv_channels = 8
num_attention_heads = 2
multi_query_attention = true
add_qkv_bias = true
[unet]
sample_size = 8
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]
up_block_types = ["CrossAttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
transformer_layers_per_block = 1
attention_head_dim = 2
cross_attention_dim = 8
encoder_hid_dim = 16
addition_time_embed_dim = 4
projection_class_embeddings_input_dim = 40
norm_num_groups = 4
[scheduler]
num_train_timesteps = 1100
beta_start = 0.00085
beta_end = 0.014
beta_schedule = "scaled_linear"
timestep_spacing = "leading"
steps_offset = 1
[[stage]]
name = "autoencoder"
objective = "autoencoder"
steps = 2
batch = 2
learning_rate = 1e-3
warmup = 1
decay = 1
sizes = [[64, 64]]
[[stage]]
name = "language model"
objective = "language_model"
steps = 2
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
[[stage]]
name = "concepts"
objective = "epsilon"
steps = 2
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
scenes = 8
area = 64
shortest = 64
longest = 64
square_share = 1.0
train_steps = 1000
beta_end = 0.012
[[stage]]
name = "quality"
objective = "epsilon"
steps = 3
batch = 2
learning_rate = 1e-3
warmup = 1
decay = 1
scenes = 12
captions = 2
area = 128
shortest = 64
longest = 192
square_share = 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe's file and what a run of it left; nothing is drawn, which takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "miniature.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (AutoencoderObjective, LanguageModelObjective, EpsilonObjective):
            patch.setattr(kind, "monitor", lambda self, averaged, folder, step: {"monitored": 1.0})
        run(folder / "miniature.toml", folder / "out", stages=["autoencoder", "language model"])
        run(folder / "miniature.toml", folder / "out")
    return folder


def test_the_result_is_a_pipeline(folder):
    pipeline = KolorsPipeline.from_pretrained(folder / "out" / "pipeline")
    images = pipeline("红色圆形", height=64, width=64, num_inference_steps=2, guidance_scale=2.0).images
    assert images[0].size == (64, 64)
    assert pipeline.vae.config.scaling_factor != 0.18215  # measured
    assert pipeline.scheduler.config.num_train_timesteps == 1100
    assert pipeline.text_encoder.output_layer is None


def test_export_is_the_same_in_half_precision(folder, tmp_path):
    export(folder / "out", tmp_path / "assets")
    full = KolorsUNet.from_pretrained(folder / "out" / "pipeline", subfolder="unet")
    half = KolorsUNet.from_pretrained(tmp_path / "assets", subfolder="unet", torch_dtype=torch.float16)
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.half(), b)
    KolorsPipeline.from_pretrained(tmp_path / "assets")
    index = json.loads((tmp_path / "assets" / "model_index.json").read_text())
    assert {"vae", "text_encoder", "tokenizer", "unet", "scheduler"} < set(index)


def test_a_finished_run_is_left_alone(folder):
    weights = folder / "out" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    run(folder / "miniature.toml", folder / "out")
    assert weights.stat().st_mtime_ns == before


def figures(folder, stage):
    lines = (folder / "out" / stage / "log.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if "monitored" in line)


def test_stages_over_a_pool_are_validated_on_scenes_of_their_own(folder):
    """Beside what the monitor finds, by the averaged weights, on scenes that are not those trained on."""
    assert set(figures(folder, "autoencoder")) == {"step", "monitored"}
    session = KolorsSession(load_recipe(folder / "miniature.toml"), folder / "out", World())
    for stage in session.recipe.stages[2:]:
        logged = figures(folder, stage.name)
        assert sum(name.startswith("validation loss/t 0.") for name in logged) == 8
        assert 0 < logged["validation loss error"] < logged["validation loss"]
        pool, held_out = (load_file(folder / "out" / stage.name / f"{n}.safetensors") for n in ("pool", "validation"))
        latents = [value for name, value in held_out.items() if name.startswith("latents")]
        assert sum(map(len, latents)) == 64
        for size in {name for name in pool if name.startswith("latents")} & set(held_out):
            trained_on = {row.numpy().tobytes() for row in pool[size]}
            assert not trained_on & {row.numpy().tobytes() for row in held_out[size]}
    objective = session._objective(stage, folder / "out" / stage.name)  # with what the last stage left
    with computing_in(stage.precision):
        again = validation_loss(objective, objective.module.eval(), objective.held_out, batch=stage.batch)
    assert again.items == 64 and logged["validation loss"] == pytest.approx(again.total, rel=1e-6)


def test_features_are_validated_on_those_that_the_stage_names(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        Image.new("RGB", (64, 64), (90 * n, 0, 0)).save(tmp_path / "pictures" / f"{n}.png")
        (tmp_path / "pictures" / f"{n}.txt").write_text("red")
    made = ["--model", str(folder / "out" / "pipeline"), "--area", "64", "--min", "64", "--limit", "64"]
    assert main(["precompute", str(tmp_path / "pictures"), "-o", str(tmp_path / "features"), *made]) == 0
    session = KolorsSession(load_recipe(folder / "miniature.toml"), folder / "out", World())
    stage = replace(session.recipe.stages[3], features=str(tmp_path / "features"))
    assert session._objective(stage, tmp_path / "stage").held_out is None
    objective = session._objective(replace(stage, validation=str(tmp_path / "features")), tmp_path / "stage")
    assert validation_loss(objective, objective.module, objective.held_out, batch=2).items == 3


def test_unknown_stages_are_refused(folder):
    with pytest.raises(ValueError, match=r"stages: expected some of .*, got 'beauty'"):
        run(folder / "miniature.toml", folder / "out", stages=["beauty"])


def test_pool(folder, tmp_path):
    recipe = load_recipe(folder / "miniature.toml")
    session = KolorsSession(recipe, folder / "out", World())
    stage = replace(recipe.stages[3], scenes=30)
    pipeline = KolorsPipeline.from_pretrained(folder / "out" / "pipeline")
    encode = partial(encode_texts, pipeline.text_encoder, session.tokenizer)
    arguments = pipeline.vae, encode, EncodedCaptions, stage, Streams(0, "q"), 30, tmp_path / "pool.safetensors"
    pool = build_pool(*arguments)
    assert sum(len(bucket.latents) for bucket in pool.buckets) == 30
    for bucket in pool.buckets:
        height, width = bucket.size
        assert bucket.latents.shape[1:] == (4, height // 8, width // 8)
        assert len(bucket.captions.pooled) == 2 * len(bucket.latents) + 1
        texts = bucket.texts(torch.tensor([1, 0]), torch.tensor([1, 0]), torch.tensor([False, True]))
        expected = bucket.captions.gather(torch.tensor([3, 2 * len(bucket.latents)]))
        for got, wanted in zip(texts, expected, strict=True):
            assert torch.equal(got, wanted)
    seen = {}
    for step in range(14):
        bucket, items = pool.batch(step, 2)
        seen.setdefault(bucket.size, []).extend(items.tolist())
    again = build_pool(*arguments)
    bucket, items = again.batch(13, 2)
    assert (bucket.size, items.tolist()) == ((pool.batch(13, 2)[0].size), pool.batch(13, 2)[1].tolist())


TEXTS = ["a red circle", "", "左边是红色圆形，右边是蓝色方块", "a small green star in the top left corner"]


def stored(tokenizer):
    ids = torch.full((len(TEXTS), 64), ABSENT, dtype=torch.int16)
    for row, text in zip(ids, TEXTS, strict=True):
        encoded = tokenizer.encode(text)
        row[: len(encoded)] = torch.tensor(encoded)
    return ids


def test_the_largest_of_chatglm3s_tokens_are_kept():
    """65,024 is the size of its vocabulary."""

    class Tokenizer:
        def encode(self, text):
            return [64790, 64792, 65023]

    class Encoder:
        def __init__(self):
            self.config, self.device = SimpleNamespace(hidden_size=2), torch.device("cpu")

        def parameters(self):
            return iter(())

        def text_features_collapsed(self, ids, mask):
            assert ids[:, -3:].tolist() == [[64790, 64792, 65023]] and mask.sum() == 3
            return torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 2)

    assert encode_texts(Encoder(), Tokenizer(), ["any"]).starts.tolist() == [0, 4]


def test_captions_are_padded_as_the_tokenizer_does(folder):
    tokenizer = KolorsSession(load_recipe(folder / "miniature.toml"), folder / "out", World()).tokenizer
    ids, mask = pad_left(stored(tokenizer), tokenizer.pad_token_id)
    expected = tokenizer(TEXTS, padding="max_length", max_length=256)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


@torch.no_grad()
def test_stored_captions_are_what_the_text_encoder_says(folder):
    pipeline = KolorsPipeline.from_pretrained(folder / "out" / "pipeline")
    with computing_in("bf16"):  # as the trainer does around the autoencoder; captions keep their precision
        encoded = encode_captions(pipeline.text_encoder, stored(pipeline.tokenizer))
    which = torch.tensor([2, 0, 3, 1])
    batch = pipeline.tokenizer([TEXTS[i] for i in which], padding="max_length", max_length=256)
    expected = pipeline.text_encoder.text_features_collapsed(batch["input_ids"], batch["attention_mask"])
    embeds, key_bias, pooled = encoded.gather(which)
    assert torch.allclose(embeds, expected[0], rtol=1e-3, atol=1e-3)  # kept in half precision
    assert torch.allclose(key_bias, expected[1], rtol=1e-6)
    assert torch.allclose(pooled, expected[2], rtol=1e-3, atol=1e-3)


def test_validation_never_sees_the_evaluation_prompts():
    from kolors_fast.data.shapes import held_out_prompts

    tested = {one.prompt for one in held_out_prompts(200)}
    prompts = validation_prompts()
    assert len(prompts) >= 38 and not tested & {one.prompt for one in prompts}
    assert {one.category for one in prompts} == {one.category for one in held_out_prompts(200)}
