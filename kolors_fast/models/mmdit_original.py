"""Stability's own files: one of safetensors (or .pt, .ckpt) with the keys of github.com/Stability-AI/sd3.5.

There the linear layers for queries, keys and values are one (rows in this order), and what ends a stream (the last text
block, the final layer) is modulated by shift, then scale. A file may hold autoencoder and text encoders as well.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import CheckpointError, _read_safetensors, load_plain

PREFIX = "model.diffusion_model."
OTHERS = ("first_stage_model.", "text_encoders.")  # models that a file may hold beside this one
HEAD_DIM = 64  # of all that were released; only norms of heads tell it

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an MMDiT, of one without prefix; the tensors are views where no halves change places.

    Keys unknown here stay as they are.
    """
    depth = _depth(state, "joint_blocks")
    layout = _layout(depth)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        names = layout.get(key, (key,))
        found.update(zip(names, _swapped(key, value, depth).chunk(len(names)), strict=True))
    return found


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`, of a complete state dict."""
    depth = _depth(state, "transformer_blocks")
    return {
        key: _swapped(key, torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]], depth)
        for key, names in _layout(depth).items()
        if names[0] in state  # not every block has norms, a second attention or the end of a text stream
    }


def config_of(state: Mapping[str, Tensor], file: str | os.PathLike[str]) -> dict[str, Any]:
    """Config values that shapes tell, of a state dict without prefix; they do not tell the sample size.

    Raises:
        CheckpointError: the state dict is another model's.
    """
    needed = [f"{name}.weight" for name in (*_OUTSIDE, "joint_blocks.0.x_block.attn.qkv")]
    missing = next((key for key in ("pos_embed", *needed) if key not in state), None)
    if missing is not None:
        some = ", ".join(f"'{key}'" for key in list(state)[:3]) or "nothing"
        raise CheckpointError(f"{file} is no MM-DiT in Stability's layout: it lacks '{missing}' and holds {some}")
    dim, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    norm = state.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head_dim = HEAD_DIM if norm is None else len(norm)
    if dim % head_dim:
        raise CheckpointError(f"{file} is no MM-DiT of heads of {head_dim}, for its width is {dim}")
    depth = _depth(state, "joint_blocks")
    return {
        "patch_size": patch_size,
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.weight"]) // patch_size**2,
        "num_layers": depth,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": state["context_embedder.weight"].shape[1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": state["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(state["pos_embed"].shape[1]),
        "dual_attention_layers": tuple(
            i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state
        ),
        "qk_norm": None if norm is None else "rms_norm",
    }


def read(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The MM-DiT's tensors in a file, without prefix.

    Raises:
        CheckpointError: the file is missing, truncated, or holds more than plain tensors.
    """
    path = Path(file)
    if path.suffix == ".safetensors" and path.is_file():
        state = _read_safetensors(path)
    else:
        content = load_plain(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} must hold a dict of tensors, by itself or under state_dict")
    if any(key.startswith(PREFIX) for key in state):
        return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return {key: value for key, value in state.items() if not key.startswith(OTHERS)}


def write(file: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write safetensors with prefix, beside and renamed, so that no reader sees half a file."""
    path = Path(file)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        tensors = {f"{PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, scratch, metadata={"format": "pt"})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _layout(depth: int) -> dict[str, tuple[str, ...]]:
    """For every original key that a model may have the keys whose rows it holds one after the other."""
    modules: dict[str, tuple[str, ...]] = {old: (new,) for old, new in _OUTSIDE.items()}
    for i in range(depth):
        modules |= {
            f"joint_blocks.{i}.{old}": tuple(f"transformer_blocks.{i}.{name}" for name in new)
            for old, new in _BLOCK.items()
        }
    kinds = ("weight", "bias")
    keys = {f"{old}.{kind}": tuple(f"{name}.{kind}" for name in new) for old, new in modules.items() for kind in kinds}
    return {"pos_embed": ("pos_embed.pos_embed",), **keys}


def _swapped(key: str, value: Tensor, depth: int) -> Tensor:
    """Its halves in the other order, where they are shift and scale here, and scale and shift there."""
    ends = ("final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")
    return torch.cat(value.chunk(2)[::-1]) if key.rpartition(".")[0] in ends else value


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    numbers = [int(found[1]) for key in state if (found := re.match(rf"{blocks}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1
