"""Layers shared by the diffusion transformers. Module names follow diffusers' state-dict keys.

B is the batch, N the tokens of a picture (row by row), D the width of the transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import savings
from ..ops._products import gelu_linear, linear
from ..ops.ada_layer_norm import ada_layer_norm
from ..ops.gated_residual_ada_layer_norm import gated_residual_ada_layer_norm
from .layers import Conv2d, Linear, is_wrapped, sinusoidal_embedding, to_tokens

NORM_EPS = 1e-6
TIME_DIM = 256  # of the sinusoids behind every timestep embedding
Size = tuple[int, int]


def sinusoid(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[cos(v f_i) | sin(v f_i)] with f_i = 10000^(-i / 128), built in fp32: values [M] -> [M, 256]."""
    return sinusoidal_embedding(values, TIME_DIM, flip_sin_to_cos=True, freq_shift=0).to(dtype)


def as_timesteps(timestep: Tensor | float | int, device: torch.device) -> Tensor:
    """A number, or a tensor of 1 or B, as [1] or [B] on the device."""
    if isinstance(timestep, Tensor):
        return timestep.to(device).reshape(-1)
    return torch.full((1,), float(timestep), device=device)  # filled there: a copy from the host would wait for it


def position_table(dim: int, grid: Size, *, base_size: int, scale: float) -> Tensor:
    """Sines and cosines of every patch's place: fp32 [rows * columns, dim].

        [sin(c w_k) | cos(c w_k) | sin(r w_k) | cos(r w_k)],  w_k = 10000^(-4k / dim)

    for column c and row r, each counted in units in which the grid is base_size / scale long: a larger grid is finer,
    not longer. Computed in float64 from coordinates rounded to fp32, as checkpoints of this family were trained with.

    Source: Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float32, device="cpu") / (n / base_size) / scale for n in grid)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim / 4))

    def waves(places: Tensor) -> Tensor:  # [n] -> [n, dim / 2]
        angles = torch.outer(places.double(), omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = waves(columns).expand(grid[0], -1, -1)  # [rows, columns, dim / 2]
    down = waves(rows)[:, None].expand(-1, grid[1], -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1).float()


class PatchProjection(nn.Module):
    """A linear layer of every patch: [B, C, H, W] -> [B, N, D]; base of the models' `pos_embed`."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def tokens(self, sample: Tensor) -> Tensor:
        """The convolution as the product that it is, for as one it takes as long as an attention of few tokens."""
        if is_wrapped(self.proj):
            return to_tokens(self.proj(sample))
        (rows, columns), side = self.grid(sample), self.patch_size
        patches = sample.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # [B, C, h, p, w, p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C * p * p]
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def grid(self, sample: Tensor) -> Size:
        """Patches (down, across). Raises ValueError where the sample is not a whole number of patches."""
        height, width = sample.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"hidden_states: expected sides in multiples of {self.patch_size}, got {height}x{width}")
        return height // self.patch_size, width // self.patch_size


def unpatchify(tokens: Tensor, grid: Size, patch_size: int) -> Tensor:
    """[B, N, p * p * C], a patch's values ordered (row, column, channel) -> [B, C, H, W]."""
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, h, w, p, p, C]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class GELU(nn.Module):
    """gelu(proj(x)) in its tanh form, [..., D] -> [..., inner]."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        if is_wrapped(self.proj) or not savings.on("gelu"):
            return F.gelu(self.proj(x), approximate="tanh")
        return gelu_linear(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """[B, N, D] -> [B, N, 4D] -> [B, N, D] with a GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: x [B, N, D], scale and shift [B, D]."""
    if savings.on("residual_norm"):
        return ada_layer_norm(x, scale, shift, NORM_EPS)
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


def add_and_modulate(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """r = x + gate * y (or x + y), and modulated(r), in one pass over both: x and y [B, N, D], the others [B, D]."""
    if savings.on("residual_norm"):
        return gated_residual_ada_layer_norm(x, y, gate, scale, shift, NORM_EPS)
    r = x + (y if gate is None else gate[:, None] * y)
    return r, modulated(r, scale, shift)
