"""The epsilon objective's mathematics against diffusers, and the changes of weights that alter nothing."""

import pytest
import torch
from diffusers import DDPMScheduler

from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.training.initial import scale_residual_stream, zero_residual_branches
from kolors_fast.training.objectives import add_noise, alpha_bar, snr_weights

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
    plain = (ratio < 5) & (ratio > 0.0205)
    assert plain.sum() > 500
    assert torch.allclose(weights[plain], 1 / signal[plain])
    assert (weights[ratio > 5] < 1 / signal[ratio > 5]).all()
    assert float(weights.max()) == 50 and (weights[ratio < 0.02] == 50).all()
    assert (snr_weights(signal, 0.0) == 1).all()


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
    assert torch.equal(block(x, torch.randn(1, 32)), x)
