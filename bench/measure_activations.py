"""Count the bytes that training keeps of blocks and models between the forward and the backward pass: diffusers eager,
ours, and ours under `checkpoint_activations`. From shapes alone, so a CPU tells what a GPU would:

    python bench/measure_activations.py

A storage counts once, however many views of it are kept, from the operator that returned it until it is freed.
Parameters, their copies in another dtype, and the inputs do not count. "kept" is what is left when the forward pass
has ended; without checkpointing it is what saved-tensor hooks see, to the byte. "peak" is the most at any time of the
forward and the backward pass, gradients and what is computed anew included; of weights' gradients each goes at once.

diffusers reads the captions as its pipelines make them, with pads; ours as the trainer has them, Kolors' equal pads as
one key with a bias, and PixArt's behind a mask, as diffusers' are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from bench_models import REAL_TOKENS, SMALL_UNET
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kolors_fast import KolorsUNet
from kolors_fast.models import pixart_blocks
from kolors_fast.models.activations import _Peak
from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.layers import ResnetBlock, use_channels_last
from kolors_fast.models.mmdit_blocks import JointBlock, Stream
from kolors_fast.models.pixart_conditioning import Prompt as PixArtPrompt
from kolors_fast.models.pixart_conditioning import masked
from kolors_fast.models.unet_blocks import TransformerBlock
from kolors_fast.models.unet_conditioning import Prompt, balanced, collapse_pads
from kolors_fast.training.activation_checkpointing import checkpoint_activations

BATCH, TOKENS, SIDE = 2, 256, 16  # SIDE * SIDE = TOKENS
KOLORS, KOLORS_HEADS, KOLORS_TEXT = 320, 5, 2048
DIT, DIT_HEADS = 384, 6
ModuleT = TypeVar("ModuleT", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16)


class Provider(NamedTuple):
    """What is run, and the tensors beside its parameters that do not count."""

    module: nn.Module
    forward: Callable[[], list[Tensor]]
    inputs: list[Tensor]


class Kept(NamedTuple):
    """Bytes."""

    kept: int
    peak: int


class _Alive(_Peak):
    def __init__(self, free: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        super().__init__([*free, *weights])
        self.weights = {value.untyped_storage()._cdata for value in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            cast = func(*args, **(kwargs or {}))  # by autocast
            storage = cast.untyped_storage()
            self.live[storage._cdata] = 0
            weakref.finalize(storage, self._freed, storage._cdata)
            return cast
        return super().__torch_dispatch__(func, types, args, kwargs)


def measure(provider: Provider, dtype: torch.dtype = torch.float32) -> Kept:
    """What a training step of it keeps; below float32 under autocast."""
    weights = list(provider.module.parameters())
    hooks = [weight.register_post_accumulate_grad_hook(_drop_gradient) for weight in weights]
    with _Alive(provider.inputs, weights) as alive:
        with autocast(dtype):
            outputs = provider.forward()
        edges = [get_gradient_edge(output) for output in outputs]
        like = [(output.shape, output.dtype) for output in outputs]
        del outputs
        kept = alive.now
        torch.autograd.backward(edges, [torch.ones(shape, dtype=kind) for shape, kind in like])
    for hook in hooks:
        hook.remove()
    return Kept(kept, alive.most)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


# ---- what is measured: diffusers' and ours, with the same weights and inputs


def transformer_block(dtype: torch.dtype) -> dict[str, Provider]:
    rival = BasicTransformerBlock(
        KOLORS, KOLORS_HEADS, KOLORS // KOLORS_HEADS, cross_attention_dim=KOLORS_TEXT, activation_fn="geglu"
    )
    block = _like(rival, TransformerBlock(KOLORS, KOLORS_HEADS, KOLORS_TEXT))
    x, states = _normal(BATCH, TOKENS, KOLORS).to(dtype), _normal(BATCH, 256, KOLORS_TEXT)
    states[:, : 256 - REAL_TOKENS] = states[:, :1]
    found = collapse_pads(states)
    assert found is not None
    x, states, short = (tensor.to(dtype).requires_grad_() for tensor in (x, states, found[0]))
    bias = balanced(found[1], dtype)
    cond = Conditioning(Prompt(short, bias, x, ()), {})

    def ours() -> list[Tensor]:
        y, left = block(x, None, cond)
        return [y if left is None else y + left]

    return {
        "diffusers": Provider(rival, lambda: [rival(x, encoder_hidden_states=states)], [x, states]),
        "kolors_fast": Provider(block, ours, [x, short, bias]),
    }


def resnet_block(channels: int, skip_channels: int, out: int, dtype: torch.dtype) -> dict[str, Provider]:
    time_dim = 4 * KOLORS
    rival = ResnetBlock2D(in_channels=channels + skip_channels, out_channels=out, temb_channels=time_dim, eps=1e-5)
    block = _like(rival, ResnetBlock(channels + skip_channels, out, time_dim=time_dim, num_groups=32, eps=1e-5))
    use_channels_last(block)
    x, *skips = (
        _normal(BATCH, width, SIDE, SIDE).to(dtype, memory_format=torch.channels_last).requires_grad_()
        for width in (channels, skip_channels)
        if width
    )
    time = _normal(BATCH, time_dim).to(dtype).requires_grad_()

    def ours() -> list[Tensor]:
        return [block(x, block.projection(F.silu(time)), *skips)]

    return {
        "diffusers": Provider(rival, lambda: [rival(torch.cat([x, *skips], 1), time)], [x, *skips, time]),
        "kolors_fast": Provider(block, ours, [x, *skips, time]),
    }


def joint_block(dtype: torch.dtype, qk_norm: str | None = None) -> dict[str, Provider]:
    rival = JointTransformerBlock(DIT, DIT_HEADS, DIT // DIT_HEADS, qk_norm=qk_norm)
    block = JointBlock(DIT, DIT_HEADS, dual=False, last=False)
    if qk_norm is not None:
        block.attn.add_norms()
    _like(rival, block)
    x, text, vector = (
        _normal(*shape).to(dtype).requires_grad_() for shape in ((BATCH, TOKENS, DIT), (BATCH, 154, DIT), (BATCH, DIT))
    )

    def ours() -> list[Tensor]:
        active = F.silu(vector)
        modulations = {m: m.linear(active) for m in (block.norm1, block.norm1_context)}
        return [stream.sum() for stream in block(Stream(x), Stream(text), Conditioning(None, modulations))]

    return {
        "diffusers": Provider(rival, lambda: list(rival(x, text, vector)), [x, text, vector]),
        "kolors_fast": Provider(block, ours, [x, text, vector]),
    }


def pixart_block(dtype: torch.dtype) -> dict[str, Provider]:
    rival = BasicTransformerBlock(
        DIT, DIT_HEADS, DIT // DIT_HEADS, cross_attention_dim=DIT, activation_fn="gelu-approximate",
        attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    block = _like(rival, pixart_blocks.TransformerBlock(DIT, DIT_HEADS, DIT))
    x, text, shared = (
        _normal(*shape).to(dtype).requires_grad_()
        for shape in ((BATCH, TOKENS, DIT), (BATCH, 120, DIT), (BATCH, 6 * DIT))
    )
    mask = (torch.arange(120) < torch.tensor([[1], [REAL_TOKENS]])).long()
    captions, bias = masked(text, mask), (1 - mask[:, None].to(dtype)) * -10000.0
    prompt = PixArtPrompt(text, captions, None, dtype, ())

    def ours() -> list[Tensor]:
        modulations = {block: (shared + block.scale_shift_table.flatten()).to(dtype)}
        y, left = block(x, None, Conditioning(prompt, modulations))
        return [y if left is None else torch.addcmul(y, left[1][:, None], left[0])]

    def theirs() -> list[Tensor]:
        return [rival(x, encoder_hidden_states=text, timestep=shared, encoder_attention_mask=bias)]

    assert captions.bias is not None
    return {
        "diffusers": Provider(rival, theirs, [x, text, shared, bias]),
        "kolors_fast": Provider(block, ours, [x, text, shared, captions.bias]),
    }


def unet(dtype: torch.dtype, config: dict[str, Any] = SMALL_UNET, side: int = 32) -> dict[str, Provider]:
    rival = UNet2DConditionModel(**config).train()
    model = _like(rival, KolorsUNet(**config)).train()
    width = config["encoder_hid_dim"]
    sample, states, pooled = _normal(BATCH, 4, side, side), _normal(BATCH, 256, width), _normal(BATCH, width)
    states[:, : 256 - REAL_TOKENS] = states[:, :1]
    found = collapse_pads(states)
    assert found is not None
    (short, bias), sizes = found, torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * BATCH)
    timestep, added = torch.tensor([300, 600]), {"text_embeds": pooled, "time_ids": sizes}

    def theirs() -> list[Tensor]:
        return list(rival(sample, timestep, states, added_cond_kwargs=added, return_dict=False))

    def ours() -> list[Tensor]:
        return list(model(sample, timestep, short, added_cond_kwargs=added, return_dict=False, encoder_key_bias=bias))

    return {
        "diffusers": Provider(rival, theirs, [sample, timestep, states, pooled, sizes]),
        "kolors_fast": Provider(model, ours, [sample, timestep, short, bias, pooled, sizes]),
    }


def _like(rival: nn.Module, ours: ModuleT) -> ModuleT:
    ours.load_state_dict(rival.state_dict())
    return ours


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, Callable[[torch.dtype], dict[str, Provider]]] = {
    f"Kolors transformer block {BATCH}x{TOKENS}x{KOLORS}": transformer_block,
    f"ResnetBlock {KOLORS}, {SIDE}x{SIDE}": partial(resnet_block, KOLORS, 0, KOLORS),
    f"ResnetBlock {2 * KOLORS} + skip {KOLORS} to {KOLORS}": partial(resnet_block, 2 * KOLORS, KOLORS, KOLORS),
    f"MM-DiT block {BATCH}x({TOKENS} + 154)x{DIT}": joint_block,
    "the same with QK-norm": partial(joint_block, qk_norm="rms_norm"),
    f"PixArt block {BATCH}x{TOKENS}x{DIT}": pixart_block,
    f"KolorsUNet 33M, latent {BATCH}x32x32": unet,
}
MODES = (None, "selective", "full")


def line_up(providers: dict[str, Provider], dtype: torch.dtype) -> dict[str, Kept]:
    """Of diffusers, and of ours in every mode."""
    found = {"diffusers": measure(providers["diffusers"], dtype)}
    ours = providers["kolors_fast"]
    for mode in MODES:
        if mode is not None:
            checkpoint_activations(ours.module, mode)
        found[mode or "kolors_fast"] = measure(ours, dtype)
    return found


def main() -> None:
    print("MiB kept, and peak (of diffusers)")
    for dtype in DTYPES:
        print("float32" if dtype == torch.float32 else f"autocast to {dtype}")
        for case in CASES:
            found = line_up(CASES[case](dtype), dtype)
            theirs = found["diffusers"]
            print(f"  {case}")
            for name, (kept, peak) in found.items():
                parts = (
                    f"{kept / 2**20:8.2f} ({kept / theirs.kept:4.2f}) {peak / 2**20:8.2f} ({peak / theirs.peak:4.2f})"
                )
                print(f"    {name:12} {parts}", flush=True)


if __name__ == "__main__":
    main()
