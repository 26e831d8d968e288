"""What happens to a model's weights before its training, and after it without altering what the model computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM, RMSNorm
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.models.mmdit_blocks import Modulation
from kolors_fast.models.unet import KolorsUNet


@torch.no_grad()
def zero_residual_branches(unet: KolorsUNet) -> None:
    """Let a fresh UNet predict zero and each residual branch add nothing (Dhariwal & Nichol 2021)."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def draw_mmdit(mmdit: MMDiT) -> None:
    """Weights as a diffusion transformer begins with (Peebles & Xie 2022): blocks do nothing, and it predicts zero."""
    for layer in mmdit.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
            assert layer.bias is not None
            layer.bias.zero_()
    for layer in mmdit.time_text_embed.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    for layer in mmdit.modules():
        if isinstance(layer, Modulation):
            layer.linear.weight.zero_()
    mmdit.proj_out.weight.zero_()


@torch.no_grad()
def fix_posterior(vae: AutoencoderKL, std: float = 0.1) -> None:
    """Let every latent's posterior have this standard deviation; training does not use the predicted one."""
    channels, last = vae.config.latent_channels, vae.quant_conv or vae.encoder.conv_out
    assert last.bias is not None
    last.weight[channels:] = 0
    last.bias[channels:] = 2 * math.log(std)


@torch.no_grad()
def scale_residual_stream(model: ChatGLM, factor: float) -> None:
    """Multiply all hidden states of a language model by `factor` and leave its predictions as they are.

    Every reader of the stream is behind an RMSNorm, which does not see the scale once its eps has it too; so only
    what writes to the stream is multiplied. Training lets the states grow to a size that the UNet's projections would
    have to undo.
    """
    model.register_config(layernorm_epsilon=model.config.layernorm_epsilon * factor**2)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps *= factor**2
    writers = ("word_embeddings", "dense", "dense_4h_to_h")
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in writers:
            for parameter in module.parameters():
                parameter.mul_(factor)


@torch.no_grad()
def scale_clip(model: Any, stream: float, pooled: float) -> None:
    """Multiply the hidden states of a CLIP text encoder by `stream`, and what it pools by `pooled`; no more changes.

    As for a language model. The denoiser reads CLIP's states as the stream has them, without a norm between.
    """
    model.config.layer_norm_eps *= stream**2
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps *= stream**2
    for name, module in model.named_modules():
        if name.endswith(("token_embedding", "position_embedding", "out_proj", "fc2")):
            for parameter in module.parameters():
                parameter.mul_(stream)
    model.text_projection.weight.mul_(pooled)


def drop_head(model: ChatGLM) -> None:
    """Leave the part of a language model that encodes text."""
    model.output_layer = None
    model.config.pop("add_lm_head", None)
