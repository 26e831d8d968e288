"""NVTX ranges around text encoding, denoising steps, models, blocks and ops, for Nsight Systems.

Nothing of this is in the code that runs: switching on replaces methods and functions by ones with a range around them,
switching off puts them back. A range ends when its call returns or raises. What a CUDA graph replays and what
torch.compile has compiled runs without Python, so it has only the ranges around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import nvtx
import torch
from torch import nn

from .models import (
    attention,
    autoencoder_kl,
    autoencoder_kl_tiles,
    chatglm,
    dit_layers,
    layers,
    mmdit_blocks,
    pixart_blocks,
    unet_blocks,
)
from .models.mmdit import MMDiT
from .models.pixart import PixArtTransformer
from .models.unet import KolorsUNet
from .ops._operator import Operator
from .pipelines import kolors, pipeline, pixart, sd3, sd3_text

DOMAIN = "kolors_fast"
BLOCKS = (
    unet_blocks.DownBlock,
    unet_blocks.MidBlock,
    unet_blocks.UpBlock,
    unet_blocks.Transformer,
    unet_blocks.TransformerBlock,
    unet_blocks.FeedForward,
    mmdit_blocks.JointBlock,
    mmdit_blocks.Attention,
    pixart_blocks.TransformerBlock,
    dit_layers.FeedForward,
    attention.Attention,
    layers.ResnetBlock,
    layers.Downsample,
    layers.Upsample,
    autoencoder_kl.DownBlock,
    autoencoder_kl.MidBlock,
    autoencoder_kl.UpBlock,
    chatglm.Block,
)
MODELS = (
    (KolorsUNet, "denoise", "unet"),
    (KolorsUNet, "plan_steps", "unet.plan_steps"),
    (MMDiT, "denoise", "transformer"),
    (MMDiT, "plan_steps", "transformer.plan_steps"),
    (PixArtTransformer, "denoise", "transformer"),
    (PixArtTransformer, "plan_steps", "transformer.plan_steps"),
    (chatglm.ChatGLM, "forward", "text_encoder"),
    (chatglm.ChatGLM, "text_features", "text_encoder"),
    (chatglm.ChatGLM, "text_features_collapsed", "text_encoder"),
    (autoencoder_kl.AutoencoderKL, "encode", "vae.encode"),
    (autoencoder_kl.AutoencoderKL, "decode", "vae.decode"),
)

_originals: list[tuple[Any, str, Any]] = []  # owner, attribute, and what it held itself; None: it inherits
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of the blocks of models that have run


class nvtx_ranges:
    """Put an NVTX range around each text encoding, step, model, block and op: a call does it for good, a `with` block
    until its end.

        with kolors_fast.nvtx_ranges():
            pipeline("红色圆形在蓝色方块左边")

    Ranges nest: text encoding > text_encoder > encoder.layers.0; step 0 > unet > up_blocks.0 >
    up_blocks.0.attentions.1 > ... > geglu_linear; step 0 > transformer > transformer_blocks.3 >
    transformer_blocks.3.attn > qk_norm_attention; decode > vae.decode. They are in the domain "kolors_fast". The
    environment variable KOLORS_FAST_NVTX=1 switches them on at import. Pictures are the same bit for bit.
    """

    def __init__(self) -> None:
        self._were_on = bool(_originals)
        if not self._were_on:
            _install()

    def __enter__(self) -> nvtx_ranges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._were_on:
            _remove()


def _install() -> None:
    for kind in (kolors.KolorsPipeline, sd3.SD3Pipeline, pixart.PixArtPipeline):
        _swap(kind, "_read", _ranged("text encoding"))
    # around encoders of another library, whose classes are its own
    _swap(sd3_text, "_read_clip", _ranged(lambda name: name))
    _swap(sd3_text, "_read_t5", _ranged("text_encoder_3"))
    _swap(pixart, "read_pixart_prompts", _ranged("text_encoder"))
    _swap(pipeline.Pipeline, "_decode", _ranged("decode"))
    _swap(pipeline, "denoise", _step_by_step)
    for model, method, name in MODELS:
        _swap(model, method, _ranged(name, _learn_names))
    for block in BLOCKS:  # their __call__, which subclasses inherit and no forward calls
        _swap(block, "__call__", _ranged(_block_name))
    for function in ("_resnet", "_attention", "_mid_block"):
        _swap(autoencoder_kl_tiles, function, _ranged(_block_name))
    _swap(Operator, "__call__", _ranged(lambda operator: operator.name))
    for op in ("qk_norm_attention", "geglu_linear"):  # may be composed of other ops, without an operator's call
        _swap(import_module(f"{__package__}.ops.{op}"), "_composed", _ranged(op))


def _remove() -> None:
    while _originals:
        owner, attribute, original = _originals.pop()
        if original is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, original)
    _names.clear()


def _swap(owner: Any, attribute: str, change: Callable[[Any], Any]) -> None:
    _originals.append((owner, attribute, vars(owner).get(attribute)))
    setattr(owner, attribute, change(getattr(owner, attribute)))


def _ranged(name: str | Callable[[Any], str], before: Callable[[Any], None] | None = None) -> Callable[[Any], Any]:
    """A decorator; the first argument of what is decorated may tell the name."""

    def decorate(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if before is not None:
                before(args[0])
            nvtx.push_range(name if isinstance(name, str) else name(args[0]), domain=DOMAIN)
            try:
                return function(*args, **kwargs)
            finally:
                nvtx.pop_range(domain=DOMAIN)

        return call

    return decorate


def _step_by_step(denoise: Any) -> Any:
    """`denoise` asks before each step whether to go on: there the range of a step begins, and the one before ends."""

    @wraps(denoise)
    def call(*args: Any, interrupted: Callable[[], bool], start: int = 0, **kwargs: Any) -> Any:
        row, is_open = start, False

        def close() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                nvtx.pop_range(domain=DOMAIN)

        def ask() -> bool:
            nonlocal row, is_open
            close()
            if interrupted():
                return True
            nvtx.push_range(f"step {row}", domain=DOMAIN)
            row, is_open = row + 1, True
            return False

        try:
            return denoise(*args, interrupted=ask, start=start, **kwargs)
        finally:
            close()

    return call


def _learn_names(model: nn.Module) -> None:
    if model not in _names:
        _names.update({module: name for name, module in model.named_modules()})


def _block_name(block: nn.Module) -> str:
    return _names.get(block) or type(block).__name__
