"""Pictures in a given amount of memory: which models are there when, in how many bits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.activations import activation_bytes
from ..models.autoencoder_kl import AutoencoderKL
from ..models.chatglm import ChatGLM
from ..models.checkpoint import PretrainedModel
from ..models.unet import KolorsUNet
from .checks import MAX_TEXT, check_size, expect, whole

_SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
# what a process takes before the first weight: on a CPU Python with PyTorch; on a GPU the CUDA context, cuBLAS'
# workspace and what the allocator loses between blocks
_RESERVED = {"cpu": 512 << 20, "cuda": 900 << 20}
# model -> the phase of a picture in which it works
PHASES = {"text_encoder": "reading", "unet": "denoising", "vae": "decoding"}


def parse_bytes(limit: int | str) -> int:
    """8589934592 of "8GiB"; "8GB" is 8 * 10^9.

    Raises:
        ValueError: it is no positive number of bytes.
    """
    match = _SIZE.fullmatch(limit.strip()) if isinstance(limit, str) else None
    if match:
        unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
        limit = int(float(match[1]) * unit)
    if not whole(limit) or int(limit) <= 0:
        raise ValueError(f"memory_limit: expected bytes or text such as '8GiB', got {limit!r}")
    return int(limit)


@dataclass(frozen=True)
class Model:
    """One model of a plan."""

    name: str
    kind: str  # dtype, or "int8", "int4" with the dtype of activations
    weights: int  # bytes
    activations: int  # bytes at most, while it works


@dataclass(frozen=True)
class Plan:
    """How a pipeline uses memory; made by `plan_memory`, printed as a table."""

    models: tuple[Model, ...]  # in the order in which they work
    one_by_one: bool  # only the model that works has its weights, else all have them always
    quantization: str | None  # of the text encoder
    tiled: bool  # whether the autoencoder decodes by tiles
    features: int  # bytes of the text features, which stay until the picture is there
    device: str
    picture: str  # what was planned for, in words

    @property
    def reserved(self) -> int:
        """Bytes of the process itself."""
        return _RESERVED[self.device]

    def peak(self, model: Model) -> int:
        """Bytes while this model works."""
        weights = model.weights if self.one_by_one else sum(one.weights for one in self.models)
        features = 0 if model.name == "text_encoder" else self.features
        return weights + model.activations + features + self.reserved

    @property
    def most(self) -> int:
        """Bytes at the worst moment."""
        return max(self.peak(model) for model in self.models)

    @property
    def name(self) -> str:
        parts = [
            "one model after the other" if self.one_by_one else "all models resident",
            f"text encoder in {self.quantization}" if self.quantization else "",
            "tiled decoding" if self.tiled else "",
        ]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        rows = [("model", "weights", "", "activations", "resident", "peak")]
        for model in self.models:
            resident = f"while {PHASES[model.name]}" if self.one_by_one else "always"
            sizes = _text(model.weights), _text(model.activations)
            rows.append((model.name, sizes[0], model.kind, sizes[1], resident, _text(self.peak(model))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        base = f"each peak includes {_text(self.reserved)} of the process and {_text(self.features)} of text features"
        return "\n".join([f"memory: {self.name}; {self.picture}", *table, base])


def plan_memory(
    limit: int | str,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    height: int | None = None,
    width: int | None = None,
    pictures: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> Plan:
    """The fastest way to draw that stays within the limit.

    In this order: all models resident; one after the other, loaded when its turn comes and dropped afterwards; the
    text encoder in int8; in int4; each of them with undivided decoding first. Weights are counted exactly, activations
    by `activation_bytes` for prompts of the full length under guidance, all pictures at once.

    Args:
        limit: bytes, or text such as "8GiB", for everything that the process holds on the device.
        configs: those of text_encoder, unet and vae.
        height, width: pixels; default: the UNet's own size.
        pictures: how many one call draws.
        dtype, device: of the pipeline.
        quantization: of the text encoder, where it is not to be chosen.

    Raises:
        ValueError: an argument is malformed, or no plan fits.
    """
    allowed = parse_bytes(limit)
    smallest: Plan | None = None
    for plan in plans(configs, height, width, pictures, dtype, device, quantization):
        if plan.most <= allowed:
            return plan
        if smallest is None or plan.most < smallest.most:
            smallest = plan
    assert smallest is not None
    raise ValueError(
        f"memory_limit: expected at least {_text(smallest.most)} for {smallest.picture} ({smallest.name}), "
        f"got {_text(allowed)}"
    )


def plans(
    configs: Mapping[str, Mapping[str, Any]],
    height: int | None,
    width: int | None,
    pictures: int,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: str | None,
) -> Iterator[Plan]:
    """All plans, the fastest first."""
    kind = torch.device(device).type
    expect(kind in _RESERVED, "device", "cpu or cuda with a memory limit", kind)
    expect(whole(pictures) and pictures >= 1, "pictures", "a whole number from 1", repr(pictures))
    unet_model, vae_model = KolorsUNet.empty(configs["unet"], dtype), AutoencoderKL.empty(configs["vae"], dtype)
    factor = 2 ** (len(vae_model.config.block_out_channels) - 1)
    side = unet_model.config.sample_size
    own = (side, side) if isinstance(side, int) else side
    height, width = (factor * s if given is None else given for given, s in zip((height, width), own, strict=True))
    check_size(height, width, factor)
    h, w = height // factor, width // factor
    features = 2 * pictures * MAX_TEXT * unet_model.config.encoder_hid_dim * dtype.itemsize

    unet = _unet(unet_model, pictures, h, w, kind)
    vaes = [_vae(vae_model, pictures, h, w, tiled, kind) for tiled in (False, True)]
    for bits in (None, "int8", "int4") if quantization is None else (quantization,):
        encoder = _text_encoder(configs["text_encoder"], dtype, pictures, bits)
        for one_by_one in (False, True) if bits == quantization else (True,):
            for tiled, vae in enumerate(vaes):
                yield Plan(
                    models=(encoder, unet, vae),
                    one_by_one=one_by_one,
                    quantization=bits,
                    tiled=bool(tiled),
                    features=2 * features,  # as read, and stacked for the UNet
                    device=kind,
                    picture=f"{pictures} picture{'s'[: pictures > 1]} of {height}x{width} in {_kind(dtype)}",
                )


def _text_encoder(config: Mapping[str, Any], dtype: torch.dtype, pictures: int, quantization: str | None) -> Model:
    def empty(**changes: Any) -> ChatGLM:
        model = ChatGLM.empty({**config, **changes}, dtype)
        return model if quantization is None else model.quantize_(quantization)

    def read(model: ChatGLM) -> Any:
        ids = torch.zeros(2 * pictures, MAX_TEXT + 1, dtype=torch.int64)  # prompts and negative prompts, and a pad
        return model.text_features(ids, torch.ones_like(ids))

    model = empty()
    # no state but the last two is kept, so that two layers take as much as all of them
    few = empty(num_layers=min(2, model.config.num_layers))
    return Model("text_encoder", _kind(dtype, quantization), _weight_bytes(model), activation_bytes(few, read))


def _unet(model: KolorsUNet, pictures: int, height: int, width: int, device: str) -> Model:
    count, dtype = 2 * pictures, model.dtype
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim

    def denoise(model: KolorsUNet) -> Any:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype)

        latents = [zeros(count, model.config.in_channels, height, width) for _ in range(3)]  # two are the solver's
        text = zeros(count, MAX_TEXT, model.config.encoder_hid_dim)
        added = {"text_embeds": zeros(count, pooled), "time_ids": torch.zeros(count, 6)}
        return latents, model(latents[0], 1.0, text, added_cond_kwargs=added)

    return Model("unet", _kind(dtype), _weight_bytes(model), activation_bytes(model, denoise, device))


def _vae(model: AutoencoderKL, pictures: int, height: int, width: int, tiled: bool, device: str) -> Model:
    model = AutoencoderKL.empty(model.config, model.dtype)
    if tiled:
        model.enable_tiling()

    def decode(model: AutoencoderKL) -> Any:
        return model.decode(torch.zeros(pictures, model.config.latent_channels, height, width, dtype=model.dtype))

    return Model("vae", _kind(model.dtype), _weight_bytes(model), activation_bytes(model, decode, device))


def _kind(dtype: torch.dtype, quantization: str | None = None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantization is None else f"{quantization}, {name}"


def _weight_bytes(model: PretrainedModel) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


class Turns:
    """Models of which one at a time has its weights, read from the checkpoint when its turn comes.

    Between turns a model has shapes and dtypes only, so that it cannot be edited, moved or saved.
    """

    def __init__(
        self,
        models: Mapping[str, PretrainedModel],
        load: Callable[[str, PretrainedModel], None],
        device: torch.device,  # that `load` loads to
    ) -> None:
        self.models = models
        self.load = load
        self.device = device
        self.present: str | None = None

    def turn(self, name: str | None) -> None:
        """Drop the weights of the last model and load those of this one; None only drops."""
        if name == self.present:
            return
        if self.present is not None:
            model = self.models[self.present]
            model.release_weights()
            if isinstance(model, KolorsUNet):
                model.forget_prompts()
            self.present = None
        if name is not None:
            self.load(name, self.models[name])
            self.present = name


def _text(size: int) -> str:
    """Rounded up, so that a limit of that text is enough."""
    return f"{math.ceil(size / 2**20)} MiB" if size < 1 << 30 else f"{math.ceil(size / 2**30 * 100) / 100:.2f} GiB"
