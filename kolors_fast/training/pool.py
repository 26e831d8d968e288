"""A pool of scenes with captions, all encoded once, so that a step of a denoiser's training costs only the denoiser.

Latents are those of the autoencoder; captions are encoded by the system's own text encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from kolors_fast.data.buckets import Size, epoch_batches, make_buckets, nearest_bucket
from kolors_fast.data.features import Draws, FeatureBatch
from kolors_fast.data.shapes import Scene, caption, render, sample_training
from kolors_fast.models.autoencoder_kl import AutoencoderKL

from .config import PoolStage
from .streams import Streams

_ENCODED_PIXELS = 16 * 256 * 256  # at a time
_EPOCH_STREAM = 2**30  # steps of this stream count epochs


class Captions(Protocol):
    """M encoded captions: a dataclass of tensors, which are what a pool's file holds."""

    def __len__(self) -> int: ...

    def gather(self, which: Tensor) -> Any:
        """Captions `which` [B] as the system's denoiser reads them."""


Encode = Callable[[list[str]], Any]  # texts -> Captions of one kind


@dataclass(frozen=True)
class Bucket:
    """The scenes of one picture size."""

    size: Size  # height, width
    latents: Tensor  # [N, C, h, w] fp16, scaled to about unit variance
    captions: Captions  # each item's in turn, and at the end the empty one

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def shape(self) -> Sequence[int]:
        """C, h, w of its latents."""
        return self.latents.shape[1:]

    def mean(self, items: Tensor) -> Tensor:
        """Latents of scenes `items` [B]: fp32 [B, C, h, w]."""
        return self.latents[items].float()

    def time_ids(self, items: Tensor) -> Tensor:
        """Of whole pictures: height, width, 0, 0, height, width, fp32 [B, 6]."""
        height, width = self.size
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(items), -1)

    def texts(self, items: Tensor, choice: Tensor, dropped: Tensor) -> Any:
        """What the denoiser reads of one caption of each item [B]; of the empty one where it is dropped."""
        empty = len(self.captions) - 1
        per_item = empty // len(self.latents)
        return self.captions.gather(torch.where(dropped, empty, items * per_item + choice))


class Pool(Protocol):
    """What a denoiser is trained on: a `LatentPool` of rendered scenes, or a `FeatureDataset` of real pictures."""

    @property
    def buckets(self) -> Sequence[Any]:
        """Of one picture size each."""

    def draw(self, step: int, size: int, dropout: float, draws: Draws) -> FeatureBatch:
        """See `FeatureDataset.draw`."""


class LatentPool:
    """Buckets of latents with captions, and the order in which they are visited."""

    def __init__(self, buckets: list[Bucket], streams: Streams) -> None:
        self.buckets, self.streams = buckets, streams
        self._epoch = -1
        self._batches = np.empty(0), np.empty(0)  # of that epoch: bucket [T], items [T, size]

    def batch(self, step: int, size: int) -> tuple[Bucket, Tensor]:
        """The bucket and the items [size] of a step; every epoch is a new shuffle."""
        members = [np.arange(len(bucket.latents)) for bucket in self.buckets]
        per_epoch = sum(len(ids) // size for ids in members)
        if per_epoch == 0:
            raise ValueError(f"scenes: expected enough for one batch of {size} in a bucket, got fewer")
        number, place = divmod(step, per_epoch)
        if self._epoch != number:
            self._batches = epoch_batches(members, size, self.streams.numpy(_EPOCH_STREAM + number))
            self._epoch = number
        buckets, items = self._batches
        return self.buckets[buckets[place]], torch.from_numpy(items[place])

    def draw(self, step: int, size: int, dropout: float, draws: Draws) -> FeatureBatch:
        """As `FeatureDataset.draw`, of whole pictures."""
        rng, (bucket, items) = draws.numpy(step), self.batch(step, size)
        choice = torch.from_numpy(rng.integers((len(bucket.captions) - 1) // len(bucket.latents), size=size))
        dropped = torch.from_numpy(rng.random(size) < dropout)
        rows = draws.share(size)
        mine, noise = items[rows], draws.noise(step, size, bucket.shape)
        texts = bucket.texts(mine, choice[rows], dropped[rows])
        return FeatureBatch(bucket.size, bucket.mean(mine), noise, texts, bucket.time_ids(mine), rows)


def build_pool(
    vae: AutoencoderKL,
    encode: Encode,
    kind: Callable[..., Captions],
    stage: PoolStage,
    streams: Streams,
    count: int,
    cache: Path,
) -> LatentPool:
    """A pool of `count` training scenes, read from the file `cache` where it exists, else made and written there.

    Args:
        encode: makes captions of the dataclass `kind` of texts.
    """
    parts = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    if not cache.exists():
        rng = streams.numpy(_EPOCH_STREAM - 1)
        stored: dict[str, Tensor] = {}
        with tqdm(total=count, desc="latents", unit="scene", disable=streams.rank > 0, mininterval=10) as bar:
            for size, scenes in _draw_scenes(stage, count, rng).items():
                texts = [caption(scene, rng)[0] for scene in scenes for _ in range(stage.captions)]
                encoded = encode([*texts, ""])
                stored |= {_key(part, size): getattr(encoded, part) for part in parts}
                stored[_key("latents", size)] = _encode_all(vae, scenes, size, bar)
        cache.parent.mkdir(parents=True, exist_ok=True)
        scratch = cache.with_name(f".{cache.name}.tmp")
        save_file(stored, scratch)
        scratch.replace(cache)
    stored = load_file(cache)
    buckets = []
    for size in _sizes(stage):
        if _key("latents", size) in stored:
            captions = kind(*(stored[_key(part, size)] for part in parts))
            buckets.append(Bucket(size, stored[_key("latents", size)], captions))
    return LatentPool(buckets, streams)


def _key(part: str, size: Size) -> str:
    return f"{part}.{size[0]}x{size[1]}"


def _sizes(stage: PoolStage) -> list[Size]:
    return make_buckets(stage.area**2, stage.shortest, stage.longest, stage.divisor)


def _draw_scenes(stage: PoolStage, count: int, rng: np.random.Generator) -> dict[Size, list[Scene]]:
    """Training scenes by the size of the bucket they fall into; no bucket is empty."""
    sizes = _sizes(stage)
    scenes: dict[Size, list[Scene]] = {size: [] for size in sizes}
    for _ in range(count):
        square = len(sizes) == 1 or rng.random() < stage.square_share
        aspect = 1.0 if square else float(np.exp(rng.uniform(-np.log(2), np.log(2))))
        scenes[sizes[nearest_bucket(sizes, aspect)]].append(sample_training(rng, count=stage.objects)[0])
    return {size: members for size, members in scenes.items() if members}


def _encode_all(vae: AutoencoderKL, scenes: list[Scene], size: Size, bar: tqdm[Any]) -> Tensor:
    """Latents of all scenes, a few at a time: fp16 [N, C, h, w]."""
    at_once = max(1, _ENCODED_PIXELS // (size[0] * size[1]))
    latents = []
    for start in range(0, len(scenes), at_once):
        latents.append(encode_scenes(vae, scenes[start : start + at_once], *size))
        bar.update(len(latents[-1]))
    return torch.cat(latents).half().contiguous()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: list[Scene], height: int, width: int) -> Tensor:
    """Scaled latents (posterior means) of scenes: [B, C, h, w]."""
    pictures = np.stack([render(scene, height, width) for scene in scenes])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = vae.encode(pixels.to(vae.device))[0].mode().float().cpu()
    return (means - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
