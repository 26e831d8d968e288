"""Attention with its projections, whose weights are one product's where nothing trains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .. import savings
from ..ops._backends import forced, unavailable
from ..ops._folded_attention import Folded, attend_folded, folded
from ..ops._library import tracing
from ..ops._products import linear
from ..ops.qk_norm_attention import qk_norm_attention
from .layers import GroupNorm, Linear, is_wrapped

KeysValues = tuple[Tensor, Tensor]  # [B, K, heads, d] each


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v over `heads` heads, with projections before and after."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        group_norm: GroupNorm | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = group_norm  # the caller's to apply; here for its place in the state dict
        inner_dim = heads * head_dim
        self.to_q = Linear(dim, inner_dim, bias=qkv_bias)
        self.to_k = Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_v = Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(inner_dim, dim), nn.Dropout(0.0)])
        self._joined = Joined()

    def forward(self, x: Tensor, context: KeysValues | Folded | None = None, bias: Tensor | None = None) -> Tensor:
        """x [B, N, dim] attends to a context, or to itself; bias [B, K] is added to every query's logits."""
        if isinstance(context, Folded):
            return attend_folded(x, context, self.heads, self._out.bias)
        if context is None:
            q, k, v = self._split_heads(self._joined.project(x, (self.to_q, self.to_k, self.to_v)))
        else:
            (q,), (k, v) = self._split_heads([self.to_q(x)]), context
        if bias is not None and bias.shape[-1] != k.shape[1]:
            raise ValueError(
                f"attention mask or bias: expected one value for each of {k.shape[1]} keys, "
                f"got shape {list(bias.shape)}"
            )
        bias = None if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32))
        h = qk_norm_attention(q, k, v, key_bias=bias)
        return self._out(h.flatten(2))  # type: ignore[union-attr]  # one stream gives one tensor

    def keys_values(self, context: Tensor) -> KeysValues:
        """What queries read of a sequence [B, K, context_dim]."""
        k, v = self._split_heads(self._joined.project(context, (self.to_k, self.to_v)))
        return k, v

    def fold(self, keys_values: KeysValues, bias: Tensor | None) -> Folded:
        """The sequence with to_q and to_out multiplied in, so that attending to it takes no projections.

        q k^T = x (to_q^T k^T) and (p v) to_out^T = p (v to_out^T): the same products in another order, and fewer where
        K < d. DeepSeek-V2 (arXiv 2405.04434) absorbs the projections of its latents alike.
        """
        k, v = keys_values  # [B, K, H, d]
        to_q = torch.unflatten(self.to_q.weight, 0, (self.heads, -1))  # [H, d, dim]
        to_out = torch.unflatten(self._out.weight, 1, (self.heads, -1))  # [dim, H, d]
        k = k * k.shape[-1] ** -0.5
        keys = torch.einsum("hdc,bkhd->bchk", to_q, k).flatten(2)
        values = torch.einsum("bkhd,chd->bhkc", v, to_out).flatten(1, 2)
        bias = keys.new_zeros(1, k.shape[1]) if bias is None else bias.to(keys.dtype)
        bias = bias.repeat(1, self.heads)
        if self.to_q.bias is not None:
            of_queries = torch.unflatten(self.to_q.bias, 0, (self.heads, -1))  # [H, d]
            bias = bias + torch.einsum("hd,bkhd->bhk", of_queries, k).flatten(1)
        return folded(keys, values, bias)

    def folds(self, keys: int) -> bool:
        """Whether `fold` takes fewer products. In 16 bit it would round the logits, and a GPU has not been measured."""
        to_q, out = self.to_q, self._out
        if is_wrapped(to_q) or is_wrapped(out) or out.bias is None:
            return False
        few = self.heads * keys <= to_q.weight.shape[0]
        ours = unavailable("cpu") is None
        measured = ours and to_q.weight.is_cpu and to_q.weight.dtype == out.weight.dtype == torch.float32
        wanted = savings.on("prompt_fold") and forced() != "reference" and not torch.is_autocast_enabled("cpu")
        return few and measured and wanted

    @property
    def _out(self) -> Linear:
        out: Linear = self.to_out[0]  # type: ignore[assignment]  # or what wraps it
        return out

    def _split_heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        return [one.unflatten(-1, (self.heads, -1)) for one in projected]  # [B, tokens, heads, d]

    def _apply(self, *args: Any, **kwargs: Any) -> Attention:
        self._joined = Joined()  # which would keep the storage alive that the weights are about to leave
        return super()._apply(*args, **kwargs)


class Joined:
    """The weights, and the biases, of several layers as one, of which theirs are views: one product serves all."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.sizes: list[int] = []  # outputs of each layer
        self._state: list[tuple[int, int]] = []  # address and version of each layer's weight, then of each bias

    def project(self, x: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """Each layer's output for x."""
        if not may_join(x, layers):
            return [layer(x) for layer in layers]
        return self.product(x, layers).split(self.sizes, dim=-1)

    def product(self, x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
        """The outputs of layers that may be joined, side by side."""
        return linear(x, *self.of(layers))

    def of(self, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """The layers' weight [sum of outputs, inputs] and bias, of layers that may be joined.

        An edited weight is joined anew, for something may have been derived from the joined one; one that lies
        elsewhere has left it. No other can come to lie at its address while the joined one is there.
        """
        values = [v for name in ("weight", "bias") for layer in layers if (v := layer._parameters[name]) is not None]
        if self.weight is None or self._state != [(v.data_ptr(), v._version) for v in values]:
            weights, biases = values[: len(layers)], values[len(layers) :]
            self.weight, self.bias = _join(weights), _join(biases) if biases else None
            self.sizes = [len(weight) for weight in weights]
            self._state = [(v.data_ptr(), v._version) for v in values]
        return self.weight, self.bias

    def __deepcopy__(self, memo: Any) -> Joined:
        return Joined()  # the copied weights lie apart

    def __reduce__(self) -> tuple[type[Joined], tuple[()]]:
        return Joined, ()


def may_join(x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """Only where nothing trains: weights that an optimizer or a gradient knows stay where they are."""
    if torch.is_grad_enabled() or tracing(x) or not savings.on("fused_qkv"):
        return False
    like = None
    for layer in layers:  # asked at every call, so no generators and no `layer.weight`, which cost more
        if layer.training or is_wrapped(layer):
            return False
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if not (_is_plain(weight) and (bias is None or _is_plain(bias))):
            return False
        kind = weight.dtype, None if bias is None else bias.dtype  # type: ignore[union-attr]  # it is plain
        if like not in (None, kind):
            return False
        like = kind
    return True


def _is_plain(value: Tensor | None) -> bool:
    """Whether its memory is its own to lie in: no shard, no tensor of torch.func, none that counts no edits."""
    return type(value) is nn.Parameter and not value.is_inference()


@torch.inference_mode(False)  # whose tensors could not be trained later
def _join(values: Sequence[Tensor]) -> Tensor:
    """Weights [out, in] or biases [out] as one tensor; they become views of it, where they are not yet."""
    first, sizes = values[0].detach(), [len(value) for value in values]
    shape = (sum(sizes), *first.shape[1:])
    if all(v.is_contiguous() and v.data_ptr() == a for v, a in zip(values, _addresses(values), strict=True)):
        storage = first.untyped_storage().data_ptr()
        if all(v.untyped_storage().data_ptr() == storage for v in values):
            return first.as_strided(shape, (*first.shape[1:], 1))
    whole = torch.cat([value.detach() for value in values])
    for value, part in zip(values, whole.split(sizes), strict=True):
        value.data = part
    return whole


def _addresses(values: Sequence[Tensor]) -> list[int]:
    """Where the values begin if each follows the one before."""
    ends = accumulate([value.nbytes for value in values], initial=values[0].data_ptr())
    return list(ends)[:-1]
