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
from typing import Any, NamedTuple

import bench_transformers
import diffusers
import torch
import torch.nn.functional as F
from bench_models import KOLORS_UNET, REAL_TOKENS, SMALL_UNET
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from kolors_fast import KolorsUNet, MMDiT
from kolors_fast.models import pixart_blocks
from kolors_fast.models.activations import _Peak
from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.layers import ResnetBlock
from kolors_fast.models.mmdit_blocks import HeadNorm, JointBlock, Stream
from kolors_fast.models.pixart_conditioning import Prompt as PixArtPrompt
from kolors_fast.models.pixart_conditioning import masked
from kolors_fast.models.unet_blocks import TransformerBlock
from kolors_fast.models.unet_conditioning import Prompt
from kolors_fast.training.activation_checkpointing import checkpoint_activations

BATCH, TOKENS, SIDE = 2, 256, 16  # SIDE * SIDE = TOKENS
KOLORS, KOLORS_HEADS, KOLORS_TEXT = 320, 5, 2048
DIT, DIT_HEADS = 384, 6
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


# ---- what is measured: blocks and models of both, of the same sizes


def transformer_block(dtype: torch.dtype) -> dict[str, Provider]:
    rival = BasicTransformerBlock(
        KOLORS, KOLORS_HEADS, KOLORS // KOLORS_HEADS, cross_attention_dim=KOLORS_TEXT, activation_fn="geglu"
    )
    block = TransformerBlock(KOLORS, KOLORS_HEADS, KOLORS_TEXT)
    x, states, short = (
        torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True)
        for shape in ((TOKENS, KOLORS), (256, KOLORS_TEXT), (REAL_TOKENS + 1, KOLORS_TEXT))
    )
    bias = torch.zeros(BATCH, REAL_TOKENS + 1)
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
    block = ResnetBlock(channels + skip_channels, out, time_dim=time_dim, num_groups=32, eps=1e-5)
    x, *skips = (
        torch.randn(BATCH, width, SIDE, SIDE, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        for width in (channels, skip_channels)
        if width
    )
    time = torch.randn(BATCH, time_dim, dtype=dtype, requires_grad=True)

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
        for name in block.attn.norms:
            block.attn.add_module(name, HeadNorm(DIT // DIT_HEADS))
    x, text, vector = (
        torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True) for shape in ((TOKENS, DIT), (154, DIT), (DIT,))
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
    block = pixart_blocks.TransformerBlock(DIT, DIT_HEADS, DIT)
    x, text, shared = (
        torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True) for shape in ((TOKENS, DIT), (120, DIT), (6 * DIT,))
    )
    mask = (torch.arange(120) < torch.tensor([[1], [REAL_TOKENS]])).long()
    bias = (1 - mask[:, None].to(dtype)) * -10000.0
    prompt = PixArtPrompt(text, masked(text, mask), None, dtype, ())

    def ours() -> list[Tensor]:
        modulations = {block: (shared + block.scale_shift_table.flatten()).to(dtype)}
        y, left = block(x, None, Conditioning(prompt, modulations))
        return [y if left is None else torch.addcmul(y, left[1][:, None], left[0])]

    def theirs() -> list[Tensor]:
        return [rival(x, encoder_hidden_states=text, timestep=shared, encoder_attention_mask=bias)]

    read = [tensor for tensor in prompt.tensors() if tensor is not None]
    return {
        "diffusers": Provider(rival, theirs, [x, text, shared, bias]),
        "kolors_fast": Provider(block, ours, [x, shared, *read]),
    }


def unet(_dtype: torch.dtype, config: dict[str, Any] = SMALL_UNET, side: int = 32) -> dict[str, Provider]:
    rival, model = UNet2DConditionModel(**config).train(), KolorsUNet(**config).train()
    width = config["encoder_hid_dim"]
    sample, states, pooled = (torch.randn(BATCH, *shape) for shape in ((4, side, side), (256, width), (width,)))
    short, bias = states[:, : REAL_TOKENS + 1].clone(), torch.zeros(BATCH, REAL_TOKENS + 1)
    timestep, added = torch.full((BATCH,), 600), {"text_embeds": pooled, "time_ids": torch.full((BATCH, 6), 8.0 * side)}

    def theirs() -> list[Tensor]:
        return list(rival(sample, timestep, states, added_cond_kwargs=added, return_dict=False))

    def ours() -> list[Tensor]:
        return list(model(sample, timestep, short, added_cond_kwargs=added, return_dict=False, encoder_key_bias=bias))

    inputs = [sample, timestep, short, states, bias, *added.values()]
    return {"diffusers": Provider(rival, theirs, inputs), "kolors_fast": Provider(model, ours, inputs)}


def transformer(name: str, _dtype: torch.dtype) -> dict[str, Provider]:
    case = bench_transformers.CASES[name]
    rival = getattr(diffusers, case.kind.diffusers_name)(**case.config).train()
    model = case.kind(**case.config).train()
    width = model.config.joint_attention_dim if case.kind is MMDiT else model.config.caption_channels
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(BATCH, model.config.in_channels, case.side, case.side),
        "encoder_hidden_states": torch.randn(BATCH, case.text, width),
        "timestep": torch.full((BATCH,), 600),
        "return_dict": False,
    }
    if case.kind is MMDiT:
        inputs["pooled_projections"] = torch.randn(BATCH, model.config.pooled_projection_dim)
    else:
        pixels, ratio = torch.full((BATCH, 2), 8.0 * case.side), torch.ones(BATCH, 1)
        inputs["encoder_attention_mask"] = torch.ones(BATCH, case.text)
        inputs["added_cond_kwargs"] = {"resolution": pixels, "aspect_ratio": ratio}
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    return {
        "diffusers": Provider(rival, lambda: list(rival(**inputs)), tensors),
        "kolors_fast": Provider(model, lambda: list(model(**inputs)), tensors),
    }


BLOCKS: dict[str, Callable[[torch.dtype], dict[str, Provider]]] = {
    f"Kolors transformer block {BATCH}x{TOKENS}x{KOLORS}": transformer_block,
    f"ResnetBlock {KOLORS}, {SIDE}x{SIDE}": partial(resnet_block, KOLORS, 0, KOLORS),
    f"ResnetBlock {2 * KOLORS} + skip {KOLORS} to {KOLORS}": partial(resnet_block, 2 * KOLORS, KOLORS, KOLORS),
    f"MM-DiT block {BATCH}x({TOKENS} + 154)x{DIT}": joint_block,
    "the same with QK-norm": partial(joint_block, qk_norm="rms_norm"),
    f"PixArt block {BATCH}x{TOKENS}x{DIT}": pixart_block,
}
MODELS: dict[str, Callable[[torch.dtype], dict[str, Provider]]] = {
    f"KolorsUNet 33M, latent {BATCH}x32x32": unet,
    f"Kolors 2.58B, {BATCH}x1024x1024": partial(unet, config=KOLORS_UNET, side=128),
    f"SD3-medium 2.03B, {BATCH}x1024x1024": partial(transformer, "sd3_medium"),
    f"PixArt-XL/2 0.61B, {BATCH}x1024x1024": partial(transformer, "pixart_xl2"),
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
    print("MiB kept, and at the peak (of diffusers')")
    for case, make in (BLOCKS | MODELS).items():
        for dtype in DTYPES:
            print(f"{case}, {dtype}".replace("torch.", ""))
            with FakeTensorMode(allow_non_fake_inputs=True):
                found = line_up(make(dtype), dtype)
            theirs = found["diffusers"]
            for name, one in found.items():
                cells = [f"{ours / 2**20:9.2f} ({ours / most:4.2f})" for ours, most in zip(one, theirs, strict=True)]
                print(f"    {name:12} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
