"""One or two streams of queries, keys and values: what `qk_norm` and `qk_norm_attention` take, and its checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library

AddedFields = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class AddedStream(NamedTuple):
    """The second stream of a joint attention: the text of an MM-DiT. Its tokens come after those of the first.

    Attributes:
        q: [B, L2, H, D], or None where its queries are not wanted: the last block of an MM-DiT drops their result.
        k, v: [B, S2, H, D].
        q_weight, k_weight: [D], or None: not normalised.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor | None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    added: AddedStream | None,
    eps: float,
) -> None:
    """Raise a ValueError or TypeError in one sentence: argument, expected, got."""
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"{op}: q: expected [B, L, H, D], got {list(q.shape)}")
    if q.dtype not in _library.FLOATING:
        raise TypeError(f"{op}: q: expected a floating dtype of 16 to 64 bits, got {q.dtype}")
    batch, _, heads, head_dim = q.shape
    rows: dict[str, Tensor] = {"k": k} if added is None else {"k": k, "added.k": added.k}
    if added is not None and added.q is not None:
        rows["added.q"] = added.q
    for name, x in rows.items():
        if x.dim() != 4 or x.shape[0] != batch or x.shape[2:] != q.shape[2:]:
            length = {"k": "S", "added.q": "L2", "added.k": "S2"}[name]
            expected = f"[{batch}, {length}, {heads}, {head_dim}]"
            raise ValueError(f"{op}: {name}: expected {expected}, got {list(x.shape)}")
        check_like(op, name, x, q, q.dtype)
    if added is not None and (added.v is None) != (v is None):
        got = "None" if added.v is None else "a tensor"
        raise ValueError(f"{op}: added.v: expected a tensor if, and only if, v is one, got {got}")
    values = [("v", v, k)] if added is None else [("v", v, k), ("added.v", added.v, added.k)]
    for name, value, like in values:
        if value is not None:
            if value.shape != like.shape:
                raise ValueError(f"{op}: {name}: expected {list(like.shape)}, got {list(value.shape)}")
            check_like(op, name, value, q, q.dtype)
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    if added is not None:
        weights |= {"added.q_weight": added.q_weight, "added.k_weight": added.k_weight}
    given = [weight for weight in weights.values() if weight is not None]
    wanted = q.dtype if given and given[0].dtype == q.dtype else torch.float32
    for name, weight in weights.items():
        if weight is not None:
            if weight.shape != (head_dim,):
                raise ValueError(f"{op}: {name}: expected [{head_dim}], got {list(weight.shape)}")
            check_like(op, name, weight, q, wanted)
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number >= 0, got {eps}")


def check_like(op: str, name: str, x: Tensor, q: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name}: expected {dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {q.device}, got {x.device}")


def fields(added: AddedStream | None) -> AddedFields:
    """q, k, v and weights of the second stream, as the ops' calls hold them; without queries it needs no q_weight."""
    if added is None:
        return None, None, None, None, None
    return added.q, added.k, added.v, None if added.q is None else added.q_weight, added.k_weight


def dense(call: Any) -> Any:
    """The same call with contiguous rows and vectors; other strides of the rows are read in place."""
    if all(x is None or type(x) is float or (x.stride(-1) == 1 and x.dim() != 2) for x in call):
        return call  # nearly always: the loop below is the dearest part of a small call
    return type(call)(*(_dense(x) if isinstance(x, Tensor) else x for x in call))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous() if x.dim() != 4 else rows_in_place(x)


def rows_in_place(x: Tensor) -> Tensor:
    """x itself where each head's row is contiguous, as in a view of a fused projection; else a copy."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
