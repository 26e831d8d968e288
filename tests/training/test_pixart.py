"""PixArt's recipe on miniature models: three stages, resuming, what the denoiser reads, and the folder."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch

from kolors_fast.data.shapes import parse, sample_training
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.pixart import PixArtTransformer
from kolors_fast.models.pixart_blocks import CaptionProjection
from kolors_fast.pipelines.pixart_text import read_pixart_prompts
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer
from kolors_fast.training import run
from kolors_fast.training.config import RecipeError, load_recipe, parse_recipe, tomllib
from kolors_fast.training.learned_variance import LearnedVarianceObjective
from kolors_fast.training.monitor import validation_prompts
from kolors_fast.training.parallel import World
from kolors_fast.training.pixart import KINDS, PixArtSession, encode_captions, encode_kinds, make_linear
from kolors_fast.training.pool import _draw_scenes
from kolors_fast.training.trainer import Trainer

from ..pipelines.text_models import JOINT_DIM, write_pixart_text

RECIPE = """
name = "miniature"
system = "pixart"
seed = 3
[tokenizer]
pretrained = "{folder}/tokenizer"
[text_encoder]
pretrained = "{folder}/text_encoder"
[vae]
pretrained = "{folder}/vae"
[transformer]
num_attention_heads = 2
attention_head_dim = 8
num_layers = 2
cross_attention_dim = 16
caption_channels = {captions}
sample_size = 16
[[stage]]
name = "pixels"
objective = "class_conditional"
steps = 3
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
scenes = 8
captions = 1
area = 32
shortest = 32
longest = 32
divisor = 32
[[stage]]
name = "alignment"
objective = "learned_variance"
steps = 3
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
checkpoint_every = 1
scenes = 8
captions = 2
area = 32
shortest = 32
longest = 32
divisor = 32
[[stage]]
name = "resolution"
objective = "learned_variance"
steps = 2
batch = 2
learning_rate = 1e-3
warmup = 1
decay = 1
scenes = 8
captions = 1
area = 64
shortest = 32
longest = 96
divisor = 32
square_share = 0.5
linear_captions = true
"""


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A recipe's file beside the components that it takes."""
    folder = write_pixart_text(tmp_path_factory.mktemp("given"))
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    (folder / "miniature.toml").write_text(RECIPE.format(folder=folder, captions=JOINT_DIM))
    return folder


@pytest.fixture(scope="module")
def output(given, tmp_path_factory):
    """What a run left that was killed in its second stage and resumed."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_monitor", lambda self: None)
        whole = LearnedVarianceObjective.loss

        def dies(self, step):
            if (self.stage.name, step) == ("alignment", 2):
                raise Killed
            return whole(self, step)

        patch.setattr(LearnedVarianceObjective, "loss", dies)
        with pytest.raises(Killed):
            run(given / "miniature.toml", output)
        patch.setattr(LearnedVarianceObjective, "loss", whole)
        run(given / "miniature.toml", output)
    return output


def test_a_killed_run_has_the_weights_of_another(given, output, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_monitor", lambda self: None)
    folder = run(given / "miniature.toml", tmp_path)
    ours, again = (
        PixArtTransformer.from_pretrained(one, subfolder="transformer") for one in (folder, output / "pipeline")
    )
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (ours.proj_out.weight != 0).all()  # trained


def test_the_folder_is_a_pipeline_of_diffusers(output):
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(output / "pipeline")
    assert type(pipeline.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert pipeline.transformer.config.sample_size == 16 and pipeline.vae.config.scaling_factor == 0.5
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red circle", height=64, width=96, num_inference_steps=2, use_resolution_binning=False, clean_caption=False
    ).images[0]
    assert picture.size == (96, 64)
    index = json.loads((output / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"


def test_text_begins_where_labels_ended(given, output):
    """The DiT's own weights are PixArt's before its first step, and cross-attention adds nothing."""
    session = PixArtSession(load_recipe(given / "miniature.toml"), output, World())
    dit, stage = session._dit(), session.recipe.stages[1]
    (output / "pipeline" / "transformer").rename(output / "elsewhere")
    pixart = session._transformer()
    (output / "elsewhere").rename(output / "pipeline" / "transformer")
    assert stage.objective == "learned_variance"
    for block, started in zip(dit.blocks, pixart.transformer_blocks, strict=True):
        assert torch.equal(block.attn.qkv.weight[:16], started.attn1.to_q.weight)
        assert (started.attn2.to_out[0].weight == 0).all()
    dit.y_embedder.embedding_table.weight.data.zero_()
    noisy, time = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        got = pixart(noisy, torch.randn(2, 3, JOINT_DIM), time).sample
        torch.testing.assert_close(got, dit(noisy, time, torch.tensor([0, 1])), rtol=1e-4, atol=1e-5)


def test_kinds_are_read_off_captions():
    rng = np.random.default_rng(0)
    scenes = [sample_training(rng, count=1) for _ in range(30)]
    assert {len(scene.items) for scene, _ in scenes} == {1}
    texts = [text for _, text in scenes]
    kinds = encode_kinds([*texts, ""])
    assert len(kinds) == 31 and kinds.labels[-1] == len(KINDS)
    for (scene, text), label in zip(scenes, kinds.gather(torch.arange(30)), strict=True):
        assert parse(text) is not None and KINDS[label] == (scene.items[0].shape, scene.items[0].colour)


def test_labels_come_with_lone_objects(given):
    first, second, _ = load_recipe(given / "miniature.toml").stages
    for stage, counts in ((first, {1}), (second, {1, 2, 3})):
        (scenes,) = _draw_scenes(stage, 60, np.random.default_rng(0)).values()
        assert {len(scene.items) for scene in scenes} == counts


def test_captions_are_what_the_pipeline_reads(given):
    tokenizer = load_tokenizer(given, "tokenizer", "T5Tokenizer")
    encoder = load_text_encoder(given, "text_encoder", "T5EncoderModel")
    texts = ["a red circle", "", "two Red circles on a blue background", "a cat"]
    encoded = encode_captions(encoder, tokenizer, texts)
    assert len(encoded) == 4
    states, mask = encoded.gather(torch.tensor([2, 1, 0]))
    wanted = read_pixart_prompts(tokenizer, encoder, [texts[i] for i in (2, 1, 0)], clean_caption=False)
    assert torch.equal(mask, wanted.prompt_attention_mask[:, : mask.shape[1]])
    assert (wanted.prompt_attention_mask[:, mask.shape[1] :] == 0).all()
    assert mask[1].sum() == 1  # the empty caption has its end
    kept = wanted.prompt_embeds[:, : mask.shape[1]] * mask[..., None]
    torch.testing.assert_close(states, kept, rtol=1e-3, atol=1e-3)  # kept in half precision
    with pytest.raises(ValueError, match="captions: expected at most 120 tokens, got 451"):
        encode_captions(encoder, tokenizer, ["cat " * 150])


def test_a_linear_projection_is_the_best_of_its_rank():
    torch.manual_seed(0)
    projection, states = CaptionProjection(12, 16), torch.randn(500, 12) @ torch.randn(12, 12) + 3
    with torch.no_grad():
        x, y = states.double().numpy(), projection.double()(states.double()).numpy()
    make_linear(projection.float(), states)
    with torch.no_grad():
        got = projection(states).double().numpy()
    ones = np.concatenate([x, np.ones((500, 1))], axis=1)
    fitted = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    left, sizes, right = np.linalg.svd(fitted - y.mean(0), full_matrices=False)
    assert sizes[8] > 1e-3 * sizes[0]  # something is lost
    wanted = y.mean(0) + (left[:, :8] * sizes[:8]) @ right[:8]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert not any(parameter.requires_grad for parameter in projection.parameters())


def test_a_linear_projection_stays_linear(given, output):
    """Training leaves it as it was, and goes on around it."""
    folder, states = output / "pipeline", torch.randn(2, 5, JOINT_DIM)
    trained = PixArtTransformer.from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        a, b, both, none = (trained.caption_projection(x) for x in (*states, states.sum(0), torch.zeros(5, JOINT_DIM)))
    torch.testing.assert_close(both - none, (a - none) + (b - none), rtol=0, atol=1e-5 * float(both.abs().max()))
    session = PixArtSession(load_recipe(given / "miniature.toml"), output, World())
    objective = session._objective(session.recipe.stages[2], output / "resolution")
    objective.loss(0).backward()
    assert {name for name, p in objective.module.named_parameters() if p.grad is None} == {
        f"caption_projection.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")
    }


def test_dropped_captions_are_empty_ones(given, output):
    session = PixArtSession(load_recipe(given / "miniature.toml"), output, World())
    objective = session._objective(session.recipe.stages[1], output / "alignment")
    seen = []
    objective.predict = lambda module, noisy, time, texts: seen.append(texts[1].sum(1)) or noisy.repeat(1, 2, 1, 1)
    for step in range(100):
        objective.loss(step)
    lengths = torch.cat(seen)
    assert 20 <= int((lengths == 1).sum()) <= 65  # a tenth of 400, four deviations wide
    assert lengths.max() > 5


@pytest.mark.parametrize("place", [0, 1])
def test_stages_are_validated(given, output, tmp_path, place):
    session = PixArtSession(load_recipe(given / "miniature.toml"), output, World())
    stage = session.recipe.stages[place]
    objective = session._objective(stage, tmp_path)
    assert sum(map(len, objective.held_out.buckets)) == 64
    found = Trainer(stage, objective, tmp_path)._validate(objective.module.eval())
    assert len(found) == 10 and 0 < found["validation loss error"] < found["validation loss"]


@pytest.mark.parametrize("place", [0, 1])
def test_monitor_draws_and_judges(given, output, tmp_path, place):
    session = PixArtSession(load_recipe(given / "miniature.toml"), output, World())
    stage = session.recipe.stages[place]
    objective = session._objective(stage, output / stage.name)
    whole, sizes = objective.predict, []

    def predict(module, noisy, timesteps, texts):
        sizes.append(tuple(noisy.shape))
        return whole(module, noisy, timesteps, texts)

    objective.predict = predict
    assert objective.prompts is None or len(objective.prompts) == 2 * (len(KINDS) - 2)  # without those never shown
    objective.prompts = validation_prompts(2) if objective.prompts is None else objective.prompts[:2]
    figures = objective.monitor(objective.module.eval(), tmp_path, 7)
    assert sizes == [(4, 4, 4, 4)] * 20  # two pictures of 32 x 32 pixels, unguided and guided
    assert 0 <= figures["right"] <= 1 and (tmp_path / "000007.png").exists()


@pytest.fixture
def table(given):
    return tomllib.loads((given / "miniature.toml").read_text())


def test_recipe_errors(table, tmp_path, given):
    for change, message in (
        (lambda t: t["stage"][0].update(objective="epsilon"), r"objective: expected one of \['class_conditional', 'l"),
        (lambda t: t["stage"][1].update(train_steps=500), "unknown key 'train_steps'"),
        (lambda t: t["stage"][0].update(linear_captions=True), "unknown key 'linear_captions'"),
        (lambda t: t.pop("transformer"), "missing key 'transformer'"),
        (lambda t: t["stage"][1].update(timestep_power=0), "timestep_power: expected more than 0"),
    ):
        broken = copy.deepcopy(table)
        change(broken)
        with pytest.raises(RecipeError, match=message):
            parse_recipe(broken, "recipe")
    for component in ("vae", "text_encoder", "tokenizer"):
        broken = copy.deepcopy(table)
        broken[component]["pretrained"] = "nowhere"
        with pytest.raises(RecipeError, match=r"pretrained: expected a component of a bundled model .*, got 'nowhere'"):
            PixArtSession(parse_recipe(broken, "recipe"), tmp_path / component, World())
    (tmp_path / "late.toml").write_text((given / "miniature.toml").read_text())
    with pytest.raises(RecipeError, match="expected one of objective 'class_conditional' before 'learned_variance'"):
        run(tmp_path / "late.toml", tmp_path / "out", stages=["alignment"])
