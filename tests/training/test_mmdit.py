"""The MM-DiT's objectives against formulas: models that know the answer, a linear one's expected loss, what is told."""

import math

import pytest
import torch

from kolors_fast.models.mmdit import MMDiT
from kolors_fast.schedulers.rectified_flow import parse_density
from kolors_fast.training.config import EpsilonLinearStage, RectifiedFlowStage
from kolors_fast.training.initial import draw_mmdit
from kolors_fast.training.mmdit import EpsilonLinearObjective, RectifiedFlowObjective, SD3Captions
from kolors_fast.training.objectives import alpha_bar
from kolors_fast.training.pool import Bucket, LatentPool
from kolors_fast.training.streams import Streams

LATENT = 1.5  # all of them
COMMON = {"steps": 9, "learning_rate": 1e-3, "warmup": 0, "decay": 0, "captions": 2}
KINDS = {
    "rectified_flow": (RectifiedFlowStage, RectifiedFlowObjective),
    "epsilon_linear": (EpsilonLinearStage, EpsilonLinearObjective),
}


class Recorded(torch.nn.Module):
    """A model that answers by a function of the sample and the timestep, and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, sample, states, pooled, timesteps, return_dict):
        self.seen = states, pooled, timesteps
        return (self.answer(sample, timesteps.view(-1, 1, 1, 1)),)


def captions(count):
    """Whose values tell which one it is, none of them zero."""
    value = 1.0 + torch.arange(count)
    shapes = ((3, 2), (2,), (3, 4), (4,), (5, 6))
    return SD3Captions(*(value.view(-1, *[1] * len(s)).expand(-1, *s).half() for s in shapes))


class InOrder(LatentPool):
    """Draws the first items."""

    def batch(self, step, size):
        return self.buckets[0], torch.arange(size)


def objective(name, answer, batch=64, **settings):
    kind, made = KINDS[name]
    stage = kind(name="stage", objective=name, batch=batch, **COMMON, **settings)
    latents = torch.full((batch, 4, 8, 8), LATENT, dtype=torch.float16)
    bucket = Bucket((64, 64), latents, captions(2 * batch + 1))
    streams = Streams(0, "stage")
    return made(Recorded(answer), None, None, InOrder([bucket], streams), stage, streams)


def test_who_knows_the_velocity_has_no_loss():
    one = objective("rectified_flow", lambda z, told: (z - LATENT) / (told / 1000))
    assert float(one.loss(3)) == pytest.approx(0, abs=1e-8)


def test_who_knows_the_noise_has_no_loss():
    table = alpha_bar(1000, 0.012)

    def answer(z, told):
        signal = table[told.long()]
        return (z - signal.sqrt() * LATENT) / (1 - signal).sqrt()

    assert float(objective("epsilon_linear", answer).loss(3)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("density", ["uniform", "logit_normal(0.5, 0.6)", "mode(1.29)", "cosmap"])
def test_expected_loss_of_a_linear_model(density):
    """v = c z of z = (1 - t) x + t n errs by x (c (1 - t) + 1) + n (c t - 1); its mean square is a quadrature in t."""
    c = -0.4
    one = objective("rectified_flow", lambda z, told: c * z, batch=4096, density=density)
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    error = LATENT**2 * (c * (1 - t) + 1) ** 2 + (c * t - 1) ** 2
    expected = float((error * parse_density(density).density(t)).mean())
    assert float(one.loss(0)) == pytest.approx(expected, rel=0.02)


def test_expected_loss_of_a_linear_model_of_the_noise():
    c = 0.7
    one = objective("epsilon_linear", lambda z, told: c * z, batch=4096)
    signal = alpha_bar(1000, 0.012).double()
    error = c**2 * signal * LATENT**2 + (c * (1 - signal).sqrt() - 1) ** 2
    assert float(one.loss(0)) == pytest.approx(float(error.mean()), rel=0.02)


def test_told_timesteps_are_those_of_the_shifted_density():
    plain = objective("rectified_flow", lambda z, told: z, density="uniform")
    shifted = objective("rectified_flow", lambda z, told: z, density="uniform", shift=3.0)
    times = []
    for one in (plain, shifted):
        one.loss(5)
        times.append(one.module.seen[2] / 1000)
    t = times[0]
    assert t.shape == (64,) and 0 < t.min() < t.max() < 1
    assert torch.allclose(times[1], 3 * t / (1 + 2 * t))
    assert shifted.sampler().shift == 3.0


def test_noise_is_told_whole_timesteps():
    one = objective("epsilon_linear", lambda z, told: z)
    one.loss(5)
    told = one.module.seen[2]
    assert told.dtype == torch.int64 and told.min() >= 0 and told.max() <= 999


def test_samplers_start_from_pure_noise_and_end_at_the_picture():
    flow, epsilon = (objective(name, lambda z, told: z).sampler() for name in KINDS)
    flow.set_timesteps(5)
    assert float(flow.timesteps[0]) == 1000 and float(flow.sigmas[-1]) == 0
    epsilon.set_timesteps(5)
    assert epsilon.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert float(epsilon.final_alpha_cumprod) == 1


def test_captions_are_those_of_the_items():
    one = objective("rectified_flow", lambda z, told: z, caption_dropout=0.0, encoder_dropout=0.0)
    one.loss(0)
    states, pooled, _ = one.module.seen
    assert states.shape == (64, 3 + 5, 6) and pooled.shape == (64, 6)
    which = pooled[:, 0] - 1  # the first caption of item i is number 2 i
    assert set((which - 2 * torch.arange(64)).tolist()) == {0.0, 1.0}
    assert torch.equal(states[:, :, 0], pooled[:, :1].expand(-1, 8))


def test_dropped_captions_are_the_empty_one():
    one = objective("rectified_flow", lambda z, told: z, batch=1000, caption_dropout=0.3, encoder_dropout=0.0)
    one.loss(0)
    empty = one.module.seen[1][:, 0] == 2 * 1000 + 1
    assert float(empty.float().mean()) == pytest.approx(0.3, abs=0.05)


def test_encoders_are_dropped_apart():
    one = objective("rectified_flow", lambda z, told: z, batch=4000, encoder_dropout=0.463)
    one.loss(0)
    states, pooled, _ = one.module.seen
    parts = torch.stack([pooled[:, 0] == 0, pooled[:, -1] == 0, states[:, -1, 0] == 0])  # CLIP-L, CLIP-G, T5
    assert parts.float().mean(1).tolist() == pytest.approx([0.463] * 3, abs=0.03)
    assert float(parts.all(0).float().mean()) == pytest.approx(0.463**3, abs=0.02)
    assert torch.equal(states[:, 0, 0] == 0, parts[0])  # rows and pooled vector of one encoder go together


@torch.no_grad()
def test_fresh_mmdit_predicts_zero_and_does_nothing():
    torch.manual_seed(0)
    mmdit = MMDiT(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    draw_mmdit(mmdit)
    arguments = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6), torch.randn(2, 6), 500.0
    assert (mmdit(*arguments).sample == 0).all()
    passed = []
    mmdit.proj_out.register_forward_hook(lambda module, inputs, output: passed.append(inputs[0]))
    for skipped in ([], [0, 1]):
        mmdit(*arguments, skip_layers=skipped)
    assert torch.equal(*passed) and passed[0].abs().max() > 0.1
    bound = math.sqrt(6 / (16 + 64))  # Glorot & Bengio's, of a layer from 16 to 64
    assert 0.95 * bound < float(mmdit.transformer_blocks[0].ff.net[0].proj.weight.abs().max()) <= bound
