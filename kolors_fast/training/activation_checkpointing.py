"""Which activations of a block training keeps for the backward pass, and which it computes anew there.

An activation is worth keeping for the work that it took over the bytes that it takes. Products of matrices,
convolutions and attention are nearly all of a block's work; what lies between them (norms, modulations, GEGLU, GELU,
the packing of queries and keys) takes a pass over memory each, and about half of a block's bytes.

- "selective" keeps the results of products and attention, and computes the rest anew. Of a transformer block, torch's
  selective checkpointing does that: its dispatch mode sees every operator, ours too, for where such a mode watches they
  go through the dispatcher. Of a residual block, a norm and the convolution behind it are a region each. Plain
  checkpointing of a region stops once it has what was to be kept, the convolution's input, and so before the
  convolution; and unlike the selective one it keeps no result of a last product that nothing reads again.
- "full" keeps the input of a block and computes all of it anew: a third more work, for the fewest bytes.

Recomputed values are those of the forward pass bit for bit, and so are the gradients, on a device whose kernels are
deterministic. Only the blocks' `forward` is stood in for, on the instance: modules, their names and their parameters
stay, so state dicts, LoRA layers by path and copies are as before, and FSDP2's hooks lie around the recomputed part.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; selective: Korthikanti et al.,
Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from kolors_fast.models import mmdit_blocks, pixart_blocks, unet_blocks
from kolors_fast.models.layers import ResnetBlock

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]  # around a region: forward, and again
MakesContexts = Callable[[], Contexts]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
ATTENTION = ("attention", "attn", "flash")  # in the names of torch's, flash_attn's, xformers' and our own operators


def checkpoint_activations(model: nn.Module, mode: str = "selective") -> None:
    """Let every block of a model keep less for the backward pass from now on; `keep_activations` undoes it.

    Args:
        model: a KolorsUNet, MMDiT or PixArtTransformer, or whatever contains their blocks. Before or after LoRA layers
            are injected, and `fully_shard` or DDP are applied; before `torch.compile`.
        mode: "selective" or "full", see above.

    Raises:
        ValueError: the mode is unknown, or the model has no block of these models.
    """
    if mode not in REGIONS:
        raise ValueError(f"mode: expected one of {', '.join(REGIONS)}, got {mode!r}")
    keep_activations(model)
    found = list(_regions(model, mode))
    if not found:
        raise ValueError(f"model: expected blocks of a KolorsUNet, MMDiT or PixArtTransformer, got {type(model)}")
    for block, region in found:
        for name in region.methods:
            # a partial, for copies of the module then hold one of the copied block
            setattr(block, name, partial(_checkpointed, name, region.contexts, block))


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_activations`."""
    for mode in REGIONS:
        for block, region in _regions(model, mode):
            for name in region.methods:
                block.__dict__.pop(name, None)


def _checkpointed(name: str, contexts: MakesContexts | None, block: nn.Module, *args: Any) -> Any:
    run = getattr(type(block), name)
    if not torch.is_grad_enabled():
        return run(block, *args)
    modes = [] if torch.compiler.is_compiling() else _get_current_function_mode_stack()
    if modes:
        contexts = partial(_in_modes, modes, contexts or noop_context_fn)
    if contexts is None:
        return checkpoint(run, block, *args, use_reentrant=False)
    return checkpoint(run, block, *args, use_reentrant=False, context_fn=contexts)


def _in_modes(modes: list[TorchFunctionMode], contexts: MakesContexts) -> Contexts:
    """With these around the second context: torch brings autocast back for it, but not function modes."""
    forward, again = contexts()
    return forward, _entered(modes, again)


@contextmanager
def _entered(modes: list[TorchFunctionMode], context: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            if mode not in _get_current_function_mode_stack():
                stack.enter_context(mode)
        stack.enter_context(context)
        yield


# ---- what is kept


def _products_kept() -> Contexts:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2].partition(".")[0]
    keeps = name in PRODUCTS or any(part in name for part in ATTENTION)
    return CheckpointPolicy.PREFER_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


# ---- of which blocks


class Region(NamedTuple):
    """Methods of a block that are checkpointed, each by itself."""

    methods: tuple[str, ...]
    contexts: MakesContexts | None  # None: all of the region is computed anew


TRANSFORMERS = (unet_blocks.TransformerBlock, mmdit_blocks.JointBlock, pixart_blocks.TransformerBlock)
REGIONS: Mapping[str, Mapping[type[nn.Module], Region]] = {
    "selective": {
        **dict.fromkeys(TRANSFORMERS, Region(("forward",), _products_kept)),
        ResnetBlock: Region(("norm_and_conv1", "norm_and_conv2"), None),
    },
    "full": dict.fromkeys((*TRANSFORMERS, ResnetBlock), Region(("forward",), None)),
}


def _regions(model: nn.Module, mode: str) -> Iterator[tuple[nn.Module, Region]]:
    for module in model.modules():
        for kind, region in REGIONS[mode].items():
            if isinstance(module, kind):  # FSDP2 derives a class of each
                yield module, region
