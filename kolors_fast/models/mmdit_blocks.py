"""Blocks of the MM-DiT: two streams of tokens, each with weights of its own, that meet in one attention.

Module names follow diffusers' state-dict keys. B is the batch, N the tokens of the picture, L those of the text, D the
width of both streams.

Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import savings
from ..ops._backends import forced
from ..ops._streams import AddedStream
from ..ops.qk_norm import qk_norm
from ..ops.qk_norm_attention import qk_norm_attention
from .attention import Joined, may_join
from .conditioning import Conditioning
from .dit_layers import NORM_EPS, FeedForward, add_and_modulate, modulated
from .layers import Linear, is_wrapped


class Stream(NamedTuple):
    """Tokens whose last addition is left to the norm that follows, which makes it in passing: x + gate * y."""

    x: Tensor  # [B, N, D]
    y: Tensor | None = None  # [B, N, D]
    gate: Tensor | None = None  # [B, D]

    def modulated(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and LayerNorm(sum) * (1 + scale) + shift."""
        if self.y is None:
            return self.x, modulated(self.x, scale, shift)
        return add_and_modulate(self.x, self.y, self.gate, scale, shift)

    def sum(self) -> Tensor:
        if self.y is None:
            return self.x
        assert self.gate is not None
        return torch.addcmul(self.x, self.gate[:, None], self.y)


class Modulation(nn.Module):
    """What adaLN reads: `parts` vectors [B, D] of the conditioning vector [B, D]."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(dim, parts * dim)

    def of(self, cond: Conditioning) -> Sequence[Tensor]:
        return cond.modulations[self].chunk(self.parts, dim=1)


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over each head's elements, which the attention applies."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v among the tokens of one stream, q and k normalised or not."""

    norms: tuple[str, ...] = ("norm_q", "norm_k")
    to_q: Linear
    to_k: Linear
    to_v: Linear

    def __init__(self, dim: int, heads: int, *, added: Sequence[str] = ()) -> None:
        super().__init__()
        self.heads = heads
        self.register_module("norm_q", None)
        self.register_module("norm_k", None)
        for name in ("to_q", "to_k", "to_v", *added):
            self.add_module(name, Linear(dim, dim))
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Dropout(0.0)])
        self._joined = Joined()

    def add_norms(self) -> None:
        """RMSNorms with weights of one, where the projections' weights are."""
        like = next(self.parameters())
        for name in self.norms:
            self.add_module(name, HeadNorm(like.shape[0] // self.heads).to(like.device, like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]"""
        q, k, v = self._split_heads(self._joined.project(x, self._layers()))
        h: Any = qk_norm_attention(q, k, v, q_weight=self._weight("q"), k_weight=self._weight("k"), eps=NORM_EPS)
        return self.to_out[0](h.flatten(2))

    def _layers(self) -> tuple[Linear, ...]:
        return self.to_q, self.to_k, self.to_v

    def _split_heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        return [one.unflatten(-1, (self.heads, -1)) for one in projected]  # [B, tokens, heads, d]

    def _weight(self, name: str) -> Tensor | None:
        norm: HeadNorm | None = getattr(self, f"norm_{name}")
        return None if norm is None else norm.weight

    def _apply(self, *args: Any, **kwargs: Any) -> Attention:
        self._joined = Joined()  # which would keep the storage alive that the weights are about to leave
        return super()._apply(*args, **kwargs)


# where the projections write in place. On a CPU neither way is faster: the median of ten shapes is 1.00 of the time
# without norms and 1.01 with them (bench/measure_joint_qkv.py, one thread of a shared Intel Xeon, from run to run
# 0.9 to 1.1 for a shape). A GPU, where copies weigh more beside products, has not been measured
JOINT_QKV_ON = ("cuda",)
# tokens from which a sample by itself fills a GPU: 8 x 12 tiles of 128 x 128 in the smallest product of 1536 columns
JOINT_QKV_FROM = 1024


class JointAttention(Attention):
    """The tokens of both streams attend to those of both.

    In the last block nothing reads what becomes of the text, so its queries are not computed.
    """

    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    add_q_proj: Linear
    add_k_proj: Linear
    add_v_proj: Linear

    def __init__(self, dim: int, heads: int, *, last: bool) -> None:
        super().__init__(dim, heads, added=("add_k_proj", "add_v_proj", "add_q_proj"))
        self.to_add_out = None if last else Linear(dim, dim)
        self.register_module("norm_added_q", None)
        self.register_module("norm_added_k", None)
        self._joined_added = Joined()

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """x [B, N, D], context [B, L, D] -> the same, or None for the text of the last block."""
        y: Tensor
        text: Any
        joins = savings.on("joint_qkv") and may_join(x, self._layers()) and may_join(context, self._text_layers())
        if joins:
            in_place = self._writes_in_place(x)
            h: Any = qk_norm_attention(*self._joint(x, context, in_place))
            picture, text = h[:, : x.shape[1]].flatten(2), h[:, x.shape[1] :]
            if in_place:
                y = torch.empty_like(x)
                _products_into(y, picture, *self.to_out[0].parameters())
            else:
                y = self.to_out[0](picture)
        else:
            q, k, v = self._split_heads(self._joined.project(x, self._layers()))
            h, text = qk_norm_attention(q, k, v, **self._norms(), added=self._text(context))
            y = self.to_out[0](h.flatten(2))
        return y, None if self.to_add_out is None else self.to_add_out(text.flatten(2))

    def _joint(self, x: Tensor, context: Tensor, in_place: bool) -> Sequence[Tensor]:
        """Queries, keys and values [B, N + L, heads, d], those of the picture first; in the last block its queries
        alone."""
        if self.norm_q is not None:  # the norms write them to one place
            q, k, v = self._split_heads(self._joined.project(x, self._layers()))
            return qk_norm(q, k, v, **self._norms(), added=self._text(context))  # type: ignore[return-value]
        (batch, tokens, dim), layers = x.shape, self._text_layers()
        text = self._joined_added.product(context, layers)
        if in_place:
            joint = x.new_empty(batch, tokens + text.shape[1], 3 * dim)
            _products_into(joint[:, :tokens], x, *self._joined.of(self._layers()))
            joint[:, tokens:, -text.shape[2] :] = text  # few rows: a copy
            q, k, v = self._split_heads(joint.split(dim, dim=-1))
            return (q if len(layers) == 3 else q[:, :tokens]), k, v
        own = self._joined.product(x, self._layers())
        if len(layers) == 3:
            return self._split_heads(torch.cat([own, text], dim=1).split(dim, dim=-1))
        both = torch.cat([own[..., dim:], text], dim=1)
        return self._split_heads([own[..., :dim], *both.split(dim, dim=-1)])

    def _writes_in_place(self, x: Tensor) -> bool:
        large = len(x) == 1 or x.shape[1] >= JOINT_QKV_FROM
        if not (large and x.device.type in JOINT_QKV_ON and forced() != "reference"):
            return False
        return not is_wrapped(self.to_out[0]) and not torch.is_autocast_enabled(x.device.type)

    def _text(self, context: Tensor) -> AddedStream:
        *q, k, v = self._split_heads(self._joined_added.project(context, self._text_layers()))
        return AddedStream(q[0] if q else None, k, v, self._weight("added_q"), self._weight("added_k"))

    def _text_layers(self) -> tuple[Linear, ...]:
        layers = self.add_q_proj, self.add_k_proj, self.add_v_proj
        return layers[1:] if self.to_add_out is None else layers

    def _norms(self) -> dict[str, Any]:
        return {"q_weight": self._weight("q"), "k_weight": self._weight("k"), "eps": NORM_EPS}

    def _apply(self, *args: Any, **kwargs: Any) -> JointAttention:
        self._joined_added = Joined()
        super()._apply(*args, **kwargs)
        return self


def _products_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """out = x @ weight^T + bias, sample by sample: those of either [B, N, *] may lie apart, and are not copied."""
    for y, rows in zip(out, x, strict=True):
        torch.addmm(bias, rows, weight.t(), out=y)


class JointBlock(nn.Module):
    """Joint attention, and in some blocks one of the picture by itself beside it, then a feed-forward layer.

        x = x + gate * attention(modulated(x));  x = x + gate' * ff(modulated'(x))      of either stream

    The last block ends the text stream: it gives keys and values, and no more.
    """

    def __init__(self, dim: int, heads: int, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, last=last)
        self.attn2 = Attention(dim, heads) if dual else None
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(self, image: Stream, text: Stream, cond: Conditioning) -> tuple[Stream, Stream | None]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = self.norm1.of(cond)
        x, h = image.modulated(scale, shift)
        if self.ff_context is None:
            y, _ = self.attn(h, text.modulated(*self.norm1_context.of(cond))[1])
            ended = None
        else:
            c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = self.norm1_context.of(cond)
            context, g = text.modulated(c_scale, c_shift)
            y, z = self.attn(h, g)
            context, g = add_and_modulate(context, z, c_gate, c_mlp_scale, c_mlp_shift)
            ended = Stream(context, self.ff_context(g), c_mlp_gate)
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            x, y, gate = Stream(x, y, gate).sum(), self.attn2(modulated(x, scale2, shift2)), gate2
        x, h = add_and_modulate(x, y, gate, mlp_scale, mlp_shift)
        return Stream(x, self.ff(h), mlp_gate), ended
