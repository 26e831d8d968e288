"""Which activations of a block training keeps for the backward pass, and which it computes anew there.

An activation is worth keeping for the work that it took over the bytes that it takes. Products of matrices,
convolutions and attention are nearly all of a block's work; what lies between them (norms, modulations, GEGLU, GELU,
the packing of queries and keys, nearest-neighbour upsampling) takes a pass over memory each, and much of the bytes.

- "selective" keeps the results of products and attention, and computes the rest anew. In a transformer block torch's
  selective checkpointing does that: its dispatch mode sees every operator, ours too, for where such a mode watches they
  go through the dispatcher. In a residual block each norm is one region with the convolution behind it. Plain
  checkpointing of a region ends as soon as it has what was to be kept, the convolution's input, and so before the
  convolution; and it keeps no result of a last product, which nothing reads again.
- "full" keeps one tensor of a block, its input, and computes all else anew.

Recomputed values are those of the forward pass bit for bit where kernels are deterministic, so "selective" changes no
gradient. "full" adds up residuals between blocks by themselves, not within the next norm, and so differs by rounding.

Only methods of the blocks are stood in for, on the instance: modules, their names and their parameters stay, so state
dicts, LoRA layers by path and copies are as before, and FSDP2's hooks lie around what is computed anew.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; selective: Korthikanti et al.,
Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.layers import ResnetBlock, Upsample
from kolors_fast.models.mmdit_blocks import JointBlock, Stream
from kolors_fast.models.pixart_blocks import Left
from kolors_fast.models.pixart_blocks import TransformerBlock as PixArtBlock
from kolors_fast.models.unet_blocks import TransformerBlock as UNetBlock

from .dit import Block as DiTBlock

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]  # around a region: forward, and again
MakesContexts = Callable[[], Contexts]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_linear_pointwise")  # the last one is oneDNN's
ATTENTION = ("attention", "attn", "flash")  # in the names of torch's, flash_attn's, xformers' and our own operators


def checkpoint_activations(model: nn.Module, mode: str = "selective") -> None:
    """Let every block of a model keep less for the backward pass from now on; `keep_activations` undoes it.

    Args:
        model: a KolorsUNet, MMDiT, PixArtTransformer or DiT, or whatever else holds blocks of them. Before or after
            LoRA layers are injected and DDP or `fully_shard` are applied; before `torch.compile`.
        mode: "selective" or "full", see above.

    Raises:
        ValueError: the mode is unknown, or the model has no such block.
    """
    if mode not in REGIONS:
        raise ValueError(f"mode: expected one of {', '.join(REGIONS)}, got {mode!r}")
    keep_activations(model)
    found = list(_regions(model, mode))
    if not found:
        kinds = ", ".join(kind.__name__ for kind in REGIONS[mode])
        raise ValueError(f"model: expected one with blocks ({kinds}), got {type(model).__name__} without any")
    for block, region in found:
        # a partial, for a copy of the module then holds one of the copied block
        setattr(block, region.method, partial(_checkpointed, region, block))


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_activations`."""
    for mode in REGIONS:
        for block, region in _regions(model, mode):
            block.__dict__.pop(region.method, None)


class Region(NamedTuple):
    """A method of a block, what runs in its place, and what is kept of that: nothing by default."""

    method: str
    run: Callable[..., Any]
    contexts: MakesContexts | None = None


def _checkpointed(region: Region, block: nn.Module, *args: Any) -> Any:
    _, run, contexts = region
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
    return CheckpointPolicy.PREFER_SAVE if _keeps(operator) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _keeps(operator: Any) -> bool:
    name = operator.name().partition("::")[2].partition(".")[0]
    return name in PRODUCTS or any(part in name for part in ATTENTION)


# ---- blocks that leave nothing to be added by the next one, which then keeps one tensor


def _summed_unet_block(block: UNetBlock, x: Tensor, y: Tensor | None, cond: Conditioning) -> tuple[Tensor, None]:
    return torch.add(*UNetBlock.forward(block, x, y, cond)), None


def _summed_joint_block(
    block: JointBlock, image: Stream, text: Stream, cond: Conditioning
) -> tuple[Stream, Stream | None]:
    streams = JointBlock.forward(block, image, text, cond)
    return Stream(streams[0].sum()), None if streams[1] is None else Stream(streams[1].sum())


def _summed_pixart_block(block: PixArtBlock, x: Tensor, left: Left | None, cond: Conditioning) -> tuple[Tensor, None]:
    x, (y, gate) = PixArtBlock.forward(block, x, left, cond)
    return torch.addcmul(x, gate[:, None], y), None


# ---- of which blocks


_UPSAMPLE = (Region("forward", Upsample.forward),)  # of the small map, not of the large one that the convolution reads
REGIONS: Mapping[str, Mapping[type[nn.Module], Sequence[Region]]] = {
    "selective": {
        **{
            kind: (Region("forward", kind.forward, _products_kept),)
            for kind in (UNetBlock, JointBlock, PixArtBlock, DiTBlock)
        },
        ResnetBlock: (
            Region("norm_and_conv1", ResnetBlock.norm_and_conv1),
            Region("norm_and_conv2", ResnetBlock.norm_and_conv2),
        ),
        Upsample: _UPSAMPLE,
    },
    "full": {
        UNetBlock: (Region("forward", _summed_unet_block),),
        JointBlock: (Region("forward", _summed_joint_block),),
        PixArtBlock: (Region("forward", _summed_pixart_block),),
        DiTBlock: (Region("forward", DiTBlock.forward),),
        ResnetBlock: (Region("forward", ResnetBlock.forward),),
        Upsample: _UPSAMPLE,
    },
}


def _regions(model: nn.Module, mode: str) -> Iterator[tuple[nn.Module, Region]]:
    for module in model.modules():
        for kind, regions in REGIONS[mode].items():
            if isinstance(module, kind):  # FSDP2 makes a class of its own of each
                yield from ((module, region) for region in regions)
