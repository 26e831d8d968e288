"""PixArt's own files: one .pth with the keys of github.com/PixArt-alpha/PixArt-alpha and PixArt-sigma.

Their linear layers for queries, keys and values are one (rows in this order), and the null caption, which training puts
in the place of dropped captions, is a buffer. Positions, which some files hold, are computed here.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_plain

NULL_CAPTION = "y_embedder.y_embedding"
POSITIONS = "pos_embed"

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_SIZES = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a PixArtTransformer; the tensors are views, and keys unknown here stay as they are."""
    layout = _layout(_depth(state, "blocks"), "csize_embedder.mlp.0.weight" in state)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in (NULL_CAPTION, POSITIONS):
            continue
        names = layout.get(key, (key,))
        found.update(zip(names, value.chunk(len(names)), strict=True))
    return found


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`, of a complete state dict."""
    sizes = "adaln_single.emb.resolution_embedder.linear_1.weight" in state
    layout = _layout(_depth(state, "transformer_blocks"), sizes)
    return {
        key: torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        for key, names in layout.items()
        if names[0] in state  # all but a caption projection that a model may lack
    }


def config_of(state: Mapping[str, Tensor], heads: int, file: str | os.PathLike[str]) -> dict[str, Any]:
    """Config values that shapes tell, beside the number of heads; sample size and scale of the positions they do not.

    Raises:
        CheckpointError: the state dict is another model's.
    """
    _check_family(state, file)
    patches, captions = state["x_embedder.proj.weight"], state.get("y_embedder.y_proj.fc1.weight")
    dim, channels, patch_size, _ = patches.shape
    return {
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.weight"]) // patch_size**2,
        "num_layers": _depth(state, "blocks"),
        "cross_attention_dim": state["blocks.0.cross_attn.kv_linear.weight"].shape[1],
        "patch_size": patch_size,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in state,
        "caption_channels": None if captions is None else captions.shape[1],
        **heads_of(dim, heads),
    }


def heads_of(dim: int, heads: int) -> dict[str, int]:
    """Config values for so many heads, of which a state dict shows only how wide they are together."""
    if heads < 1 or dim % heads:
        raise ValueError(f"num_attention_heads: expected a divisor of {dim}, got {heads}")
    return {"num_attention_heads": heads, "attention_head_dim": dim // heads}


def read_file(file: str | os.PathLike[str], *keys: str) -> dict[str, Tensor]:
    """The state dict of a .pth file: under the first of `keys` that it has, or else the whole file.

    Raises:
        CheckpointError: the file is missing, truncated, or holds more than plain tensors and numbers.
    """
    content = load_plain(Path(file))
    if isinstance(content, dict):
        content = next((content[key] for key in keys if key in content), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} must hold a dict of tensors, by itself or under one of {', '.join(keys)}")
    return dict(content)


def write_state(file: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write {"state_dict": state} beside and rename it, so that no reader sees half a file."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        torch.save({"state_dict": {key: value.detach().cpu().contiguous() for key, value in state.items()}}, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _layout(depth: int, has_sizes: bool) -> dict[str, tuple[str, ...]]:
    """For every original key the keys whose rows it holds one after the other."""
    modules: dict[str, tuple[str, ...]] = {
        old: (new,) for old, new in {**_OUTSIDE, **(_SIZES if has_sizes else {})}.items()
    }
    for i in range(depth):
        modules |= {
            f"blocks.{i}.{old}": tuple(f"transformer_blocks.{i}.{name}" for name in new) for old, new in _BLOCK.items()
        }
    keys = {
        f"{old}.{kind}": tuple(f"{name}.{kind}" for name in new)
        for old, new in modules.items()
        for kind in ("weight", "bias")
    }
    tables = {f"blocks.{i}.scale_shift_table": (f"transformer_blocks.{i}.scale_shift_table",) for i in range(depth)}
    return {**keys, **tables, "final_layer.scale_shift_table": ("scale_shift_table",)}


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    numbers = [int(found[1]) for key in state if (found := re.match(rf"{blocks}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _check_family(state: Mapping[str, Tensor], file: str | os.PathLike[str]) -> None:
    compressed = next((key for key in state if re.fullmatch(r"blocks\.\d+\.attn\.(sr|norm)\.\w+", key)), None)
    if compressed:
        raise CheckpointError(
            f"{file} is a PixArt-Sigma whose keys and values are compressed ('{compressed}'), "
            "which PixArtTransformer does not do"
        )
    needed = ("x_embedder.proj.weight", "blocks.0.cross_attn.kv_linear.weight", "final_layer.linear.weight")
    missing = next((key for key in needed if key not in state), None)
    if missing:
        some = ", ".join(f"'{key}'" for key in list(state)[:3])
        raise CheckpointError(
            f"{file} holds no PixArt in its own layout: it lacks '{missing}' and has {some or 'no key'}"
        )
