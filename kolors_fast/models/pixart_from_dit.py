"""PixArt's start from a class-conditional DiT: the same function at one timestep, whatever the caption.

DiT computes each block's modulation with a network of its own, PixArt with one for all blocks and a table a block. At
t = 500, with no class, the tables make up for what the networks differ in (Chen et al., arXiv 2310.00426, section 2.3:
the paper has the idea, the formulae are ours).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import CheckpointError, _some
from .dit_layers import sinusoid
from .pixart_original import heads_of

TIMESTEP = 500
LABELS, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"  # which PixArt has no use for
COPIED = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear")
COPIED_OF_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def config_of(dit: Mapping[str, Tensor], heads: int, source: str) -> dict[str, Any]:
    """Config values that a DiT tells: keys as in github.com/facebookresearch/DiT.

    Raises:
        CheckpointError: the state dict is another model's.
    """
    depth = 1 + max((int(found[1]) for key in dit if (found := re.match(r"blocks\.(\d+)\.", key))), default=0)
    copied, networks = _modules(depth)
    wanted = [f"{module}.{kind}" for module in (*copied, *networks) for kind in ("weight", "bias")]
    missing = [key for key in wanted if key not in dit]
    unknown = [key for key in dit if key not in wanted and key not in (LABELS, POSITIONS)]
    if missing or unknown:
        fault = f"lacks {_some(missing)}" if missing else f"holds {_some(unknown)}"
        raise CheckpointError(f"{source} is no class-conditional DiT: it {fault}")
    dim, channels, patch_size, _ = dit["x_embedder.proj.weight"].shape
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": len(dit["final_layer.linear.weight"]) // patch_size**2,
        "num_layers": depth,
        "cross_attention_dim": dim,
        "patch_size": patch_size,
        "use_additional_conditions": False,
        **heads_of(dim, heads),
    }
    if POSITIONS in dit:  # [1, N, D], of a square
        config["sample_size"] = patch_size * round(dit[POSITIONS].shape[1] ** 0.5)
    return config


def reparameterised(dit: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """What a DiT determines of a PixArt, with PixArt's own keys.

        t_block = W_0, b_0                                         the first block's network serves all
        E_i     = (W_i silu(tau) + b_i) - (W_0 silu(tau) + b_0)    [6, D], so E_0 = 0
        E_f     = (W_f silu(tau) + b_f) - tau                      [2, D]

    with tau the DiT's embedding of t = 500 and W_i, b_i the network of block i. Computed in float64.
    """
    tau = _linear(dit, "t_embedder.mlp.0", sinusoid(torch.tensor([TIMESTEP]), torch.float64)[0])
    tau = _linear(dit, "t_embedder.mlp.2", F.silu(tau))  # [D]
    copied, networks = _modules(depth)
    modulations = [_linear(dit, network, F.silu(tau)).view(-1, len(tau)) for network in networks]
    found = {f"{module}.{kind}": dit[f"{module}.{kind}"] for module in copied for kind in ("weight", "bias")}
    found |= {f"t_block.1.{kind}": dit[f"{networks[0]}.{kind}"] for kind in ("weight", "bias")}
    for i, modulation in enumerate(modulations[:-1]):
        found[f"blocks.{i}.scale_shift_table"] = modulation - modulations[0]
    found["final_layer.scale_shift_table"] = modulations[-1] - tau
    return found


def _modules(depth: int) -> tuple[list[str], list[str]]:
    """Layers that are copied, and the modulation networks of the blocks and of the final layer."""
    blocks = [f"blocks.{i}" for i in range(depth)]
    copied = [*COPIED, *(f"{block}.{name}" for block in blocks for name in COPIED_OF_BLOCK)]
    return copied, [f"{part}.adaLN_modulation.1" for part in (*blocks, "final_layer")]


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"].to(x), state[f"{name}.bias"].to(x))
