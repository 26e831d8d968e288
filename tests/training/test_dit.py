"""The DiT that PixArt starts from, against diffusers' class, and as `PixArtTransformer.from_dit` reads it."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from kolors_fast.models.pixart import PixArtTransformer
from kolors_fast.training.dit import DiT

CLASSES, HEADS, HEAD_DIM, DEPTH = 5, 2, 8, 3
DIM = HEADS * HEAD_DIM


def fresh():
    torch.manual_seed(0)
    return DiT(
        classes=CLASSES, heads=HEADS, head_dim=HEAD_DIM, depth=DEPTH, channels=4, patch_size=2, sample_size=8
    ).eval()  # fmt: skip


@pytest.fixture
def dit():
    """With weights everywhere."""
    model = fresh()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def theirs_of(dit):
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=DEPTH, sample_size=8,
        num_embeds_ada_norm=CLASSES, norm_eps=1e-6, out_channels=8,
    ).eval()  # fmt: skip
    state = dit.state_dict()
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    found = {}
    for i in range(DEPTH):
        new, old = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{new}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{new}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{new}.norm1.linear": f"{old}.adaLN_modulation.1",
            f"{new}.attn1.to_out.0": f"{old}.attn.proj",
            f"{new}.ff.net.0.proj": f"{old}.mlp.fc1",
            f"{new}.ff.net.2": f"{old}.mlp.fc2",
        }
        table = state["y_embedder.embedding_table.weight"]
        found[f"{new}.norm1.emb.class_embedder.embedding_table.weight"] = table
        for kind in ("weight", "bias"):
            for letter, rows in zip("qkv", state[f"{old}.attn.qkv.{kind}"].split(DIM), strict=True):
                found[f"{new}.attn1.to_{letter}.{kind}"] = rows
    found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in names.items() for kind in ("weight", "bias")}
    model.load_state_dict(found)
    for block in model.transformer_blocks:  # diffusers has 1 here; facebookresearch/DiT divides by half the width
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@torch.no_grad()
def test_dit_is_that_of_diffusers(dit):
    noisy, timesteps, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, CLASSES])
    wanted = theirs_of(dit)(noisy, timesteps, labels).sample
    torch.testing.assert_close(dit(noisy, timesteps, labels), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 4, 6])  # smaller latents are stretched alike
def test_pixart_starts_from_it(dit, side):
    pixart = PixArtTransformer.from_dit(dit.state_dict(), caption_channels=6, sample_size=8, num_attention_heads=HEADS)
    dit.y_embedder.embedding_table.weight.zero_()
    noisy, timesteps = torch.randn(2, 4, side, side), torch.tensor([500, 500])
    got = pixart(noisy, torch.randn(2, 3, 6), timesteps).sample
    torch.testing.assert_close(got, dit(noisy, timesteps, torch.tensor([0, CLASSES])), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fresh_dit_predicts_zero_and_its_blocks_do_nothing():
    model = fresh()
    assert (model(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])) == 0).all()
    x = torch.randn(2, 16, DIM)
    assert torch.equal(model.blocks[0](x, torch.randn(2, DIM)), x)
