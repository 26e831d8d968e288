"""A class-conditional diffusion transformer, as PixArt's training begins with one.

Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. State-dict keys are those of
github.com/facebookresearch/DiT, so that `PixArtTransformer.from_dit` reads this model as it does the released ones.
B is the batch, N the tokens of a picture, D the width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_fast.models.dit_layers import TIME_DIM, add_and_modulate, modulated, sinusoid, unpatchify
from kolors_fast.models.layers import Linear, use_channels_last
from kolors_fast.models.pixart_blocks import PatchEmbedding
from kolors_fast.ops.qk_norm_attention import qk_norm_attention


class DiT(nn.Module):
    """Predicts noise and variance [B, 2C, h, w] in latents [B, C, h, w] from the timestep and a class.

    Every block modulates by a network of its own (adaLN-zero). All weights are drawn as in the paper's code: blocks
    pass their input on, and the prediction is zero.

    Args:
        classes: labels are 0 to classes - 1; the label `classes` stands for none.
        sample_size: side of the latents that positions are counted for; others are stretched to it.
    """

    def __init__(
        self, *, classes: int, heads: int, head_dim: int, depth: int, channels: int, patch_size: int, sample_size: int
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.x_embedder = PatchEmbedding(patch_size, channels, dim, base_size=sample_size // patch_size, scale=1.0)
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = LabelEmbedder(classes, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size**2 * 2 * channels)
        self._init_weights()
        use_channels_last(self)

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """noisy [B, C, h, w], timesteps [B], labels int64 [B] -> [B, 2C, h, w]."""
        condition = F.silu(self.t_embedder(timesteps) + self.y_embedder.embedding_table(labels))  # [B, D]
        x = self.x_embedder(noisy)
        for block in self.blocks:
            x = block(x, condition)
        return unpatchify(self.final_layer(x, condition), self.x_embedder.grid(noisy), self.x_embedder.patch_size)

    @torch.no_grad()
    def _init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
                assert layer.bias is not None
                layer.bias.zero_()
        for narrow in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(narrow.weight, std=0.02)  # type: ignore[arg-type]  # a sequence knows no types
        for part in (*self.blocks, self.final_layer):
            part.adaLN_modulation[1].weight.zero_()
        self.final_layer.linear.weight.zero_()


class TimeEmbedder(nn.Module):
    """Two linear layers with a SiLU between, on sinusoids: [B] -> [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_DIM, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(sinusoid(timesteps, torch.float32))


class LabelEmbedder(nn.Module):
    """The table of classes, and in its last row of none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, heads, d] each
        return self.proj(qk_norm_attention(q, k, v).flatten(2))  # type: ignore[union-attr]  # one stream, one tensor


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each gated behind a modulated LayerNorm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(dim, heads), FeedForward(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D]; condition [B, D], behind its SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation[1](condition).chunk(6, dim=-1)
        x, h = add_and_modulate(x, self.attn(modulated(x, scale1, shift1)), gate1, scale2, shift2)
        return torch.addcmul(x, gate2[:, None], self.mlp(h))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = Linear(dim, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](condition).chunk(2, dim=-1)
        return self.linear(modulated(x, scale, shift))
