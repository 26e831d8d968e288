"""A whole SD3 recipe on miniature models: every stage, resuming, and the folder as diffusers reads it."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.pipelines.sd3_text import read_sd3_prompts
from kolors_fast.pipelines.text_encoders import load_text_encoder
from kolors_fast.training import export, run
from kolors_fast.training.config import RecipeError, load_recipe
from kolors_fast.training.initial import scale_clip
from kolors_fast.training.mmdit import RectifiedFlowObjective, encode_captions
from kolors_fast.training.parallel import World
from kolors_fast.training.sd3 import CLIP, SD3Session
from kolors_fast.training.session import pretrained_folder
from kolors_fast.training.trainer import Trainer

STAGE = """
[[stage]]
name = "{name}"
objective = "{objective}"
steps = {steps}
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
checkpoint_every = 2
{more}
"""
POOL = "scenes = 12\ncaptions = 2\narea = 64\nshortest = 64\nlongest = 64\nsquare_share = 1.0\n"
RECIPE = """
name = "miniature"
system = "sd3"
seed = 3
[tokenizer]
captions = 100
length = 36
[tokenizer_3]
captions = 100
length = 29
[vae]
pretrained = "kolors-tiny/vae"
shift_factor = 0.0
[text_encoder]
hidden_size = 8
intermediate_size = 8
projection_dim = 8
num_hidden_layers = 2
num_attention_heads = 2
[text_encoder_2]
hidden_size = 12
intermediate_size = 12
projection_dim = 12
num_hidden_layers = 2
num_attention_heads = 2
[text_encoder_3]
d_model = 24
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2
[transformer]
sample_size = 8
in_channels = 4
out_channels = 4
num_layers = 2
num_attention_heads = 2
attention_head_dim = 8
joint_attention_dim = 24
caption_projection_dim = 16
pooled_projection_dim = 20
pos_embed_max_size = 8
qk_norm = "rms_norm"
[scheduler]
shift = 2.0
""" + "".join(
    STAGE.format(name=name, objective=objective, steps=steps, more=more)
    for name, objective, steps, more in (
        ("clip-l", "clip", 2, 'component = "text_encoder"'),
        ("clip-g", "clip", 2, 'component = "text_encoder_2"'),
        ("t5", "t5", 2, 'component = "text_encoder_3"'),
        ("flow", "rectified_flow", 5, POOL),
        ("epsilon", "epsilon_linear", 2, POOL),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe's file and what a run of it left; nobody is monitored, for drawing takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "miniature.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_monitor", lambda self: None)
        run(folder / "miniature.toml", folder / "out", stages=["clip-l", "clip-g", "t5", "flow"])
    return folder


def session(folder):
    return SD3Session(load_recipe(folder / "miniature.toml"), folder / "out", World())


@torch.no_grad()
def test_diffusers_draws_with_the_result(folder):
    theirs = StableDiffusion3Pipeline.from_pretrained(folder / "out" / "pipeline")
    theirs.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = theirs("红色圆形", latents=latents, output_type="np", max_sequence_length=29, **arguments).images
    assert images.shape == (1, 64, 64, 3)


@torch.no_grad()
def test_captions_are_read_as_diffusers_does(folder):
    theirs = StableDiffusion3Pipeline.from_pretrained(folder / "out" / "pipeline")
    ours, texts = session(folder).encoders, ["", "a red circle", "左边是红色圆形，右边是蓝色方块"]
    kept = encode_captions(ours, texts).gather(torch.tensor([2, 0, 1])).join()
    theirs.tokenizer_max_length = 36  # which it takes for its own, of 77, where encoders have none
    expected, _, pooled, _ = theirs.encode_prompt(
        [texts[2], texts[0], texts[1]], None, None, do_classifier_free_guidance=False, max_sequence_length=29
    )
    assert torch.allclose(kept.prompt_embeds, expected, rtol=2e-3, atol=2e-3)  # kept in half precision
    assert torch.allclose(kept.pooled_prompt_embeds, pooled, rtol=2e-3, atol=2e-3)
    live = read_sd3_prompts(ours, [texts] * 3, 29)
    assert torch.allclose(live.prompt_embeds[[2, 0, 1]], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
def test_clips_are_kept_with_states_of_unit_size(folder, place):
    stage = session(folder).recipe.stages[place]
    model = load_text_encoder(folder / "out" / "pipeline", stage.component, CLIP)
    objective = session(folder)._objective(stage, folder)
    ids = objective.tokens([text for text, _ in objective.captions(0)])[0]
    output = model(ids, output_hidden_states=True)
    for states in (output.hidden_states[-2], output.text_embeds):
        assert float(states.square().mean()) == pytest.approx(1, rel=1e-3)


@torch.no_grad()
def test_a_scaled_clip_is_the_same_to_its_readers(folder):
    model = load_text_encoder(folder / "out" / "pipeline", "text_encoder", CLIP).double()
    ids = torch.arange(20)[None]
    before = model(ids, output_hidden_states=True)
    scale_clip(model, 1e-4, 3.0)  # so small that a LayerNorm's eps would drown them
    after = model(ids, output_hidden_states=True)
    torch.testing.assert_close(after.hidden_states[-2], before.hidden_states[-2] * 1e-4)
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state)
    torch.testing.assert_close(after.text_embeds, before.text_embeds * 3)


def test_the_autoencoder_is_the_given_one(folder):
    given = AutoencoderKL.from_pretrained(pretrained_folder("kolors-tiny/vae"))
    taken = AutoencoderKL.from_pretrained(folder / "out" / "pipeline", subfolder="vae")
    assert taken.config.scaling_factor == given.config.scaling_factor and taken.config.shift_factor == 0.0
    for a, b in zip(given.parameters(), taken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_components_are_refused():
    with pytest.raises(
        RecipeError, match=r"pretrained: expected a component of a bundled model .*got 'kolors-tiny/tea'"
    ):
        pretrained_folder("kolors-tiny/tea")


def test_export_keeps_half_precision(folder, tmp_path):
    export(folder / "out", tmp_path / "assets")
    halved = StableDiffusion3Pipeline.from_pretrained(tmp_path / "assets", torch_dtype=torch.float16)
    whole = StableDiffusion3Pipeline.from_pretrained(folder / "out" / "pipeline", torch_dtype=torch.float16)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = getattr(halved, name).state_dict(), getattr(whole, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].half()) for key in ours), name


class Killed(Exception):
    pass


def test_killed_and_resumed_is_bit_for_bit_the_same(folder, tmp_path):
    """The stage of the flow once more, beside the fixture's; `checkpoint_every` is 2."""
    one = session(folder)
    stage = one.recipe.stages[3]

    def trainer(name, killed_at=None):
        torch.manual_seed(one.recipe.seed)
        objective = RectifiedFlowObjective(*parts(one, stage, tmp_path), stage, one._streams(stage))
        objective.monitor = lambda *_: {}
        loss = objective.loss

        def dying(step):
            if step == killed_at:
                raise Killed
            return loss(step)

        objective.loss = dying
        return Trainer(stage, objective, tmp_path / name)

    whole = trainer("whole").run()
    with pytest.raises(Killed):
        trainer("killed", killed_at=3).run()
    torch.randn(7)  # a resumed process has another generator state
    again = trainer("killed").run()
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("place", [3, 4])
def test_stages_over_a_pool_are_validated(folder, tmp_path, place):
    one = session(folder)
    stage = one.recipe.stages[place]
    objective = one._objective(stage, tmp_path)
    assert sum(map(len, objective.held_out.buckets)) == 64
    found = Trainer(stage, objective, tmp_path)._validate(objective.module.eval())
    assert len(found) == 10 and 0 < found["validation loss error"] < found["validation loss"]


def parts(one, stage, folder):
    """Model, autoencoder, encoders and pool of a stage."""
    made = one._objective(stage, folder)
    return made.module, made.vae, made.encoders, made.pool
