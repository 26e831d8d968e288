"""The epsilon objective's mathematics against diffusers, and the changes of weights that alter nothing."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.training.initial import fix_posterior, scale_residual_stream, zero_residual_branches
from kolors_fast.training.objectives import (
    add_noise,
    alpha_bar,
    draw_timesteps,
    moments_from_normal,
    snr_weights,
    whitening,
)

PHASES = [(1000, 0.012), (1100, 0.014)]


@pytest.mark.parametrize(("steps", "end"), PHASES)
def test_noising_is_that_of_the_schedule(steps, end):
    scheduler = DDPMScheduler(
        num_train_timesteps=steps, beta_start=0.00085, beta_end=end, beta_schedule="scaled_linear"
    )
    table = alpha_bar(steps, end)
    assert table.shape == (steps,)
    assert torch.allclose(table, scheduler.alphas_cumprod, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator).unbind()
    timesteps = torch.tensor([0, 1, 250, 500, 999, steps - 1])
    ours = add_noise(latents, noise, table[timesteps])
    assert torch.allclose(ours, scheduler.add_noise(latents, noise, timesteps), rtol=1e-5, atol=1e-6)


def test_kolors_schedule_reference_values():
    table = alpha_bar(1100, 0.014)
    for t, value in {0: 0.9991500, 250: 0.6725936, 500: 0.2737555, 999: 0.0044084, 1099: 0.00118266}.items():
        assert float(table[t]) == pytest.approx(value, rel=2e-5)


def test_snr_weights_are_those_of_the_v_loss():
    # an error of e in the noise is one of e / sqrt(A) in v
    signal = alpha_bar(1100, 0.014).double()
    weights = snr_weights(signal, 5.0)
    ratio = signal / (1 - signal)
    assert torch.allclose(weights[ratio < 5], 1 / signal[ratio < 5])
    assert (weights[ratio > 5] < 1 / signal[ratio > 5]).all()
    assert (snr_weights(signal, 0.0) == 1).all()


@pytest.mark.parametrize(("power", "falloff"), [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (1.0, 2.0), (1.5, 2.0)])
def test_timesteps_have_their_distribution(power, falloff):
    drawn = draw_timesteps(20000, 1000, power, falloff, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
    bounds = torch.arange(0, 1001, 50)
    share = (drawn[:, None] < bounds).double().mean(0)
    wanted = 1 - (1 - (bounds / 1000) ** power) ** falloff
    assert float((share - wanted).abs().max()) < 1.63 / 20000**0.5  # Kolmogorov-Smirnov at 1 %


def test_a_draw_that_rounds_up_is_a_timestep(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.full((1,), 1 - 2**-24))
    assert draw_timesteps(1, 1100, 2.0, 1.0, torch.Generator()).item() == 1099


def test_moments_from_normal_are_zero_for_white_samples_only():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(500, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    white = (samples - samples.mean(0)) @ whitening(torch.cov(samples.T))
    assert torch.allclose(torch.cov(white.T), torch.eye(4, dtype=torch.float64), atol=1e-8)
    assert float(moments_from_normal(white)) == pytest.approx(0, abs=1e-8)
    # a mean of 3 in one of four channels, a variance of 4 in all: KL of normals in closed form
    assert float(moments_from_normal(white + torch.tensor([3.0, 0, 0, 0]))) == pytest.approx(9 / 8)
    assert float(moments_from_normal(2 * white)) == pytest.approx((4 - 1 - math.log(4)) / 2)


@torch.no_grad()
def test_fixed_posterior():
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pictures = torch.randn(2, 3, 16, 16)
    mean = vae.encode(pictures)[0].mean
    fix_posterior(vae, 0.1)
    posterior = vae.encode(pictures)[0]
    assert torch.equal(posterior.mean, mean)
    assert torch.allclose(posterior.std, torch.full_like(mean, 0.1))


def tiny_chatglm():
    torch.manual_seed(0)
    return ChatGLM(
        num_layers=3, padded_vocab_size=50, hidden_size=32, ffn_hidden_size=48, kv_channels=16,
        num_attention_heads=2, multi_query_attention=True, add_qkv_bias=True, add_bias_linear=True, add_lm_head=True,
    ).double()  # fmt: skip


@torch.no_grad()
def test_scaling_the_residual_stream_keeps_the_predictions():
    model, ids = tiny_chatglm(), torch.arange(20)[None]
    logits, states = model.logits(ids), model(ids).hidden_states
    scale_residual_stream(model, 0.25)
    for before, after in zip(states, model(ids).hidden_states, strict=True):
        assert torch.allclose(after, before / 4, rtol=1e-5, atol=1e-7)
    assert torch.allclose(model.logits(ids), logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_scaled_model_survives_a_folder(tmp_path):
    model, ids = tiny_chatglm().float(), torch.arange(20)[None]
    logits = model.logits(ids)
    scale_residual_stream(model, 0.25)
    model.save_pretrained(tmp_path)
    assert torch.allclose(ChatGLM.from_pretrained(tmp_path).logits(ids), logits, atol=1e-5)


@torch.no_grad()
def test_fresh_unet_predicts_zero():
    torch.manual_seed(0)
    unet = KolorsUNet(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, transformer_layers_per_block=1,
        attention_head_dim=2, cross_attention_dim=8, encoder_hid_dim=8, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32, norm_num_groups=4,
    )  # fmt: skip
    zero_residual_branches(unet)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.full((2, 6), 64.0)}
    output = unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 8), added_cond_kwargs=added).sample
    assert (output == 0).all()
    # blocks pass their input on: the first one is an identity between equal widths
    block = unet.mid_block.resnets[0]
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 16)), x)
