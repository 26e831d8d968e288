"""Features of pictures and captions by the models of any system's pipeline folder, and datasets over them.

The formats of captions are those in which each system's training keeps them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolors_fast.data.features import FeatureDataset, FeaturesError, read_index
from kolors_fast.data.precompute import Settings, precompute
from kolors_fast.data.sources import read_source
from kolors_fast.models.checkpoint import read_json
from kolors_fast.pipelines.folder import load_components, load_configs, load_index
from kolors_fast.pipelines.kolors import KolorsPipeline
from kolors_fast.pipelines.load import pipeline_class
from kolors_fast.pipelines.pipeline import Pipeline
from kolors_fast.pipelines.pixart import PixArtPipeline, PixArtSigmaPipeline
from kolors_fast.pipelines.pixart_text import read_pixart_prompts
from kolors_fast.pipelines.prompts_file import Worker
from kolors_fast.pipelines.sd3 import T5_TOKENS, SD3Pipeline
from kolors_fast.pipelines.sd3_text import SD3TextEncoders, read_sd3_parts
from kolors_fast.pipelines.text import read_prompts

from .encoded import MAX_TOKENS, EncodedCaptions
from .mmdit import SD3Captions
from .pixart import T5Captions

_AT_ONCE = 32  # captions
_OF_A_CHECKPOINT = ("torch_dtype", "dtype", "transformers_version")  # and not of what the model computes

Read = Callable[[list[str]], Any]  # a few captions -> a dataclass of fp16 tensors on the CPU

KINDS: dict[str, type] = {
    KolorsPipeline.index_name: EncodedCaptions,
    SD3Pipeline.index_name: SD3Captions,
    PixArtPipeline.index_name: T5Captions,
    PixArtSigmaPipeline.index_name: T5Captions,
}


class PipelineEncoder:
    """The autoencoder and the text encoders of a pipeline folder, a Hub id or a bundled model.

    Captions longer than the system's limit (256 tokens in Kolors and SD3's T5, 77 in CLIP, 120 in PixArt-alpha, 300 in
    PixArt-Sigma) are cut without a word. PixArt's are not cleaned, which would take Chinese out.

    Args:
        torch_dtype: of the text encoders; the autoencoder is float32 always.
        variant, device: as in `Pipeline.from_pretrained`.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        kind = pipeline_class(path_or_id)
        parts = {name: part for name, part in kind.parts.items() if name != kind.denoiser_name}
        vae = {"vae": parts.pop("vae")}
        without = {"scheduler": None}
        self.vae = load_components(path_or_id, vae, None, variant, device, given=without).components["vae"]
        loaded = load_components(path_or_id, parts, torch_dtype, variant, device, given=without).components
        self.captions = KINDS[kind.index_name]
        self.read = _reader(kind, path_or_id, {name: loaded[name] for name in parts})
        self.identity = {
            "class": kind.index_name,
            "name": Path(path_or_id).name,
            "sha256": model_hash(path_or_id),
            "dtype": str(torch_dtype or torch.float32).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode_pictures(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] -> mean and standard deviation of latents as the denoiser reads them: [B, C, h, w]."""
        pixels = torch.from_numpy(pictures).to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior, config = self.vae.encode(pixels)[0], self.vae.config
        return (posterior.mean - (config.shift_factor or 0.0)) * config.scaling_factor, (
            posterior.std * config.scaling_factor
        )

    def encode_captions(self, texts: list[str]) -> Any:
        """Captions of the system's kind."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of captions that are cut: there may be millions
            return _joined(self.captions, [self.read(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)])


def _reader(kind: type[Pipeline], path_or_id: str | os.PathLike[str], parts: dict[str, Any]) -> Read:
    if issubclass(kind, KolorsPipeline):
        tokenizer, encoder = parts["tokenizer"], parts["text_encoder"]

        def read_kolors(texts: list[str]) -> EncodedCaptions:
            features = read_prompts(tokenizer, encoder, texts, MAX_TOKENS)
            assert features.key_bias is not None
            present = features.key_bias > float("-inf")
            present[:, 0] = True  # the pad's place, also where a caption leaves none
            return EncodedCaptions(*_packed(features.embeds, present), features.pooled.half().cpu())

        return read_kolors
    if issubclass(kind, PixArtPipeline):
        tokenizer, encoder = parts["tokenizer"], parts["text_encoder"]
        if encoder is None or tokenizer is None:
            raise ValueError(f"model: expected one with a text encoder, got '{path_or_id}'")
        tokens = min(kind.tokens, tokenizer.model_max_length)

        def read_pixart(texts: list[str]) -> T5Captions:
            features = read_pixart_prompts(tokenizer, encoder, texts, tokens, clean_caption=False)
            return T5Captions(*_packed(features.prompt_embeds, features.prompt_attention_mask.bool()))

        return read_pixart
    transformer = load_configs(path_or_id, kind.parts)["transformer"]
    encoders = SD3TextEncoders(transformer.joint_attention_dim, transformer.pooled_projection_dim, **parts)
    rows = T5_TOKENS if encoders.tokenizer_3 is None else min(T5_TOKENS, encoders.tokenizer_3.model_max_length)

    def read_sd3(texts: list[str]) -> SD3Captions:
        outputs = read_sd3_parts(encoders, [texts] * 3, rows)
        return SD3Captions(*(output.half().cpu() for output in vars(outputs).values()))

    return read_sd3


def _packed(states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """States [B, L, D] where present [B, L], end to end: fp16 [total, D], and their starts [B + 1]."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0).cpu()])
    return states[present].half().cpu(), starts


def _joined(kind: type, some: list[Any]) -> Any:
    """Captions of several dataclasses in one."""
    parts = {}
    for name in vars(some[0]):
        tensors = [getattr(one, name) for one in some]
        if name == "starts":  # each counts from 0
            lengths = torch.cat([starts.diff() for starts in tensors])
            parts[name] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        else:
            parts[name] = torch.cat(tensors)
    return kind(**parts)


def model_hash(path_or_id: str | os.PathLike[str]) -> str:
    """sha256 of the configs of a pipeline's autoencoder and text encoders; their weights are not read."""
    index, file = load_index(path_or_id)
    names = sorted(name for name in index if name == "vae" or name.startswith("text_encoder"))
    configs = {}
    for name in names:
        if index[name][1] is not None:
            config = read_json(file.parent / name / "config.json")
            kept = {key: value for key, value in config.items() if key[0] != "_" and key not in _OF_A_CHECKPOINT}
            configs[name] = kept
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()


def open_features(
    folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None, **options: Any
) -> FeatureDataset:
    """The dataset in a folder of features.

    Args:
        model: the pipeline whose denoiser is to be trained; None takes features of any.
        options: of `FeatureDataset`.

    Raises:
        FeaturesError (an OSError): as `FeatureDataset`, or the features are of an unknown system.
    """
    named = read_index(Path(folder))["model"]["class"]
    if named not in KINDS:
        raise FeaturesError(f"{folder}: model: expected one of {', '.join(KINDS)}, got {named}")
    return FeatureDataset(folder, KINDS[named], model=None if model is None else model_hash(model), **options)


def precompute_command(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    settings: Settings,
    *,
    dtype: str | None,
    variant: str | None,
    device: str | None,
) -> FeatureDataset | None:
    """`kolors-fast precompute`, of one process of those that torchrun starts: the dataset, if this was the last."""
    worker = Worker.from_environment()
    device = worker.device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))
    encoder = PipelineEncoder(model, torch_dtype, variant, device)
    finished = precompute(read_source(data), encoder, output, settings, worker.rank, worker.count)
    return open_features(output) if finished else None
