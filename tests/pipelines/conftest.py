"""A tiny Kolors checkpoint with random weights, written by diffusers once per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import sentencepiece
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from kolors_fast.pipelines.kolors import KolorsPipeline

SENTENCES = [
    "a photo of a cat, high quality",
    "two red circles on a blue background",
    "the quick brown fox jumps over the lazy dog, 1234567890",
    "一张瓢虫的照片，微距，高质量",
    "红色的圆在蓝色的正方形上",
]
TEXT = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 256,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "original_rope": True,
    "use_cache": False,
    "padded_vocab_size": 200,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "norm_num_groups": 2,
}
VAE = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}
SCHEDULER = {
    "num_train_timesteps": 1100,
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_tokenizer(folder: Path) -> ChatGLMTokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline, all of its parts diffusers' own."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**VAE).eval()
    unet = diffusers.UNet2DConditionModel(**UNET).eval()
    text_encoder = ChatGLMModel(ChatGLMConfig(**TEXT), empty_init=False).float().eval()
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.normal_(std=0.3)
        for name, parameter in unet.named_parameters():
            if "attn2" in name or "encoder_hid_proj" in name:  # so that the text shows in the picture
                parameter.mul_(4)
    pipeline = diffusers.KolorsPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=write_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(str(path))
    return path


@pytest.fixture
def ours(folder: Path) -> KolorsPipeline:
    pipeline = KolorsPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
