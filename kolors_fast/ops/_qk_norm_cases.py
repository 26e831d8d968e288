"""Inputs of `qk_norm` and `qk_norm_attention`: shapes of models, and small ones that break kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._spec import Case, Inputs


def stream_inputs(
    generator: torch.Generator,
    batch: int,
    queries: int,
    heads: int,
    head_dim: int,
    *,
    keys: int | None = None,
    values: bool = True,
    weights: str = "like",
    added: tuple[int, int] | None = None,
    added_weights: bool = True,
    fused: bool = False,
    offset: bool = False,
    magnitude: float = 1.0,
) -> Inputs:
    """q, k, v, weights and the added stream.

    weights: "like" q, "float32" whatever q is, or "none"; added: its queries (0: none wanted) and keys; fused: q, k, v
    are views of one projection's output; offset: q and k begin one element after their storages.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weight() -> Tensor | None:
        values = 1 + 0.2 * normal(head_dim)
        return None if weights == "none" else values.float() if weights == "float32" else values

    def rows(tokens: int) -> Tensor:
        return normal(batch, tokens, heads, head_dim) * magnitude

    q, k = rows(queries), rows(queries if keys is None else keys)
    v = rows(k.shape[1]) if values else None
    if fused:
        projected = torch.cat([q.flatten(2), k.flatten(2), normal(*k.flatten(2).shape)], dim=2)
        q, k, v = projected.view(batch, queries, 3, heads, head_dim).unbind(2)
    if offset:
        q, k = (torch.zeros(x.numel() + 1, dtype=torch.float64)[1:].view(x.shape).copy_(x) for x in (q, k))
    inputs: Inputs = {"q": q, "k": k, "v": v, "q_weight": weight(), "k_weight": weight()}
    if added is not None:
        own = [rows(added[0]) if added[0] else None, rows(added[1]), rows(added[1]) if values else None]
        own += [weight() if added[0] and added_weights else None, weight() if added_weights else None]
        inputs["added"] = tuple(own)
    return inputs


def _case(name: str, *args: Any, model: bool = False, **options: Any) -> Case:
    return Case(name, lambda generator: stream_inputs(generator, *args, **options), model=model)


def _holds_nan(generator: torch.Generator) -> Inputs:
    inputs = stream_inputs(generator, 1, 3, 2, 16)
    inputs["k"][0, 1, 1, 3] = float("nan")
    return inputs


CASES = (
    _case("plain", 2, 5, 2, 64, keys=7, values=False),
    _case("seam", 2, 5, 2, 64, added=(3, 3)),  # two streams, all weights
    _case("values_pass_through", 1, 3, 2, 16),
    _case("added_without_queries", 2, 3, 2, 16, keys=4, added=(0, 5)),
    _case("added_without_weights", 1, 3, 2, 16, added=(2, 2), added_weights=False),
    _case("nothing_normalised", 2, 3, 2, 16, added=(2, 2), weights="none"),
    _case("only_keys_written", 1, 3, 2, 16, added=(0, 2), weights="none"),
    _case("head_dim_72", 1, 5, 3, 72, added=(2, 2)),
    _case("head_dim_128", 1, 3, 2, 128, added=(2, 2)),
    _case("head_dim_odd", 2, 7, 3, 10, added=(3, 3)),
    _case("head_dim_1", 1, 3, 2, 1),
    _case("one_row", 1, 1, 1, 64),
    _case("prime", 1, 37, 3, 40, keys=41),  # 40 elements do not fill the threads of a row
    _case("batch_0", 0, 3, 2, 16, added=(2, 2)),
    _case("fused", 2, 5, 2, 64, fused=True, added=(3, 3)),
    _case("fp32_weights", 2, 5, 2, 64, weights="float32", added=(3, 3)),
    _case("huge", 1, 3, 2, 64, magnitude=1e3),
    _case("tiny", 1, 3, 2, 64, magnitude=1e-3),
    _case("offset_view", 2, 3, 2, 64, offset=True, values=False),
    Case("holds_nan", _holds_nan),
    _case("sd35_2x4096+333x24x64", 2, 4096, 24, 64, added=(333, 333), model=True),
    _case("sd35_2x1024+333x24x64", 2, 1024, 24, 64, added=(333, 333), model=True),
)


def attention_inputs(
    generator: torch.Generator, *shape: int, bias: float | None = None, scale: float | None = None, **options: Any
) -> Inputs:
    """Streams, and with `bias` a key_bias: that value for some keys of each sample, zero for others (nan: random)."""
    inputs = stream_inputs(generator, *shape, **options)
    keys = inputs["k"].shape[1] + (inputs["added"][1].shape[1] if "added" in inputs else 0)
    if bias is not None:
        key_bias = torch.randn((shape[0], keys), generator=generator)
        if bias == bias:
            key_bias = torch.where(key_bias > 0, 0.0, bias)
            key_bias[:, -1] = 0.0  # never all of a sample
        inputs["key_bias"] = key_bias
    return {**inputs, "scale": scale}


def _attention_case(name: str, *shape: int, model: bool = False, **options: Any) -> Case:
    return Case(name, lambda generator: attention_inputs(generator, *shape, **options), model=model)


def _attention_holds_nan(generator: torch.Generator) -> Inputs:
    inputs = attention_inputs(generator, 2, 3, 2, 16, keys=5)
    inputs["k"][1, 2, 1, 3] = float("nan")
    return inputs


ATTENTION_CASES = (
    _attention_case("plain", 2, 5, 2, 16, keys=7),
    _attention_case("seam", 2, 5, 2, 16, added=(3, 3), bias=-10000.0),  # two streams, all weights
    _attention_case("no_weights", 1, 5, 2, 16, added=(3, 3), weights="none"),
    _attention_case("added_without_queries", 2, 3, 2, 16, keys=4, added=(0, 5)),
    _attention_case("key_bias", 2, 5, 2, 16, keys=7, bias=float("nan"), scale=0.7),
    _attention_case("key_bias_masks", 2, 5, 1, 16, keys=7, weights="none", bias=float("-inf")),
    _attention_case("added_key_bias_masks", 2, 3, 2, 16, keys=40, added=(2, 35), bias=float("-inf")),
    _attention_case("head_dim_72", 1, 5, 1, 72, added=(2, 2)),
    _attention_case("head_dim_128", 1, 5, 1, 128),
    _attention_case("head_dim_odd", 2, 7, 3, 10, added=(3, 3)),
    _attention_case("one_query", 1, 1, 2, 16, keys=33),
    _attention_case("one_key", 2, 5, 1, 16, keys=1),
    _attention_case("prime", 1, 37, 1, 16, keys=41),
    _attention_case("batch_0", 0, 3, 2, 16, added=(2, 2)),
    _attention_case("fused", 2, 5, 2, 16, fused=True, added=(3, 3)),
    _attention_case("fp32_weights", 2, 5, 2, 16, weights="float32"),
    _attention_case("huge", 1, 5, 2, 16, magnitude=1e3),
    _attention_case("tiny", 1, 5, 2, 16, magnitude=1e-3),
    _attention_case("offset_view", 2, 3, 2, 16, offset=True),
    Case("holds_nan", _attention_holds_nan),
    _attention_case("kolors_self_2x4096x10x64", 2, 4096, 10, 64, weights="none", model=True),
    _attention_case("kolors_self_2x1024x20x64", 2, 1024, 20, 64, weights="none", model=True),
    _attention_case("kolors_cross_2x1024x20x64", 2, 1024, 20, 64, keys=257, weights="none", bias=-10000.0, model=True),
    _attention_case("kolors_cross_2x1024x20x64_256", 2, 1024, 20, 64, keys=256, weights="none", bias=-1e4, model=True),
    _attention_case("kolors_cross_2x4096x10x64", 2, 4096, 10, 64, keys=77, weights="none", model=True),
    _attention_case("sd35_2x4096+333x24x64", 2, 4096, 24, 64, added=(333, 333), model=True),
    _attention_case("sd35_2x1024+333x24x64", 2, 1024, 24, 64, added=(333, 333), model=True),
    # the attention of the two before alone: what norm and packing add is the difference
    _attention_case("sd35_attention_alone_2x4429x24x64", 2, 4429, 24, 64, weights="none", model=True),
    _attention_case("sd35_attention_alone_2x1357x24x64", 2, 1357, 24, 64, weights="none", model=True),
    _attention_case("pixart_self_2x4096x16x72", 2, 4096, 16, 72, weights="none", model=True),
)
