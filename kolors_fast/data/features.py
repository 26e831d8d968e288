"""A dataset of latents and text features that `precompute` has made, to train a denoiser on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .buckets import Size, epoch_batches
from .precompute import FORMAT, INDEX, file_sha256

_MAPPED = 1024  # shards at a time


class FeaturesError(OSError):
    """A folder of features is incomplete, broken or of another model."""


class Draws(Protocol):
    """Random numbers of a step, and this process's rows of a batch: see `kolors_fast.training.streams.Streams`."""

    def numpy(self, step: int) -> np.random.Generator: ...

    def share(self, count: int) -> slice: ...

    def noise(self, step: int, count: int, shape: Sequence[int], number: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class FeatureBatch:
    """What this process reads of a step's batch, of one picture size: b of its B rows."""

    size: Size  # height, width in pixels
    latents: Tensor  # fp32 [b, C, h, w], drawn from the autoencoder's posterior and scaled
    noise: Tensor  # fp32 [b, C, h, w]
    texts: Any  # what the captions' `gather` gives
    time_ids: Tensor  # fp32 [b, 6]: original height, width, crop top, left, height, width, as SDXL is told
    rows: slice  # of the whole batch


@dataclass
class _Shard:
    file: Path
    sha256: str
    verified: bool = False

    def verify(self) -> None:
        """Compare the checksum, once.

        Raises:
            FeaturesError: the file is missing, or not the one that was written.
        """
        if self.verified:
            return
        try:
            found = file_sha256(self.file)
        except FileNotFoundError:
            raise FeaturesError(f"the shard {self.file}, of which the index tells, is missing") from None
        if found != self.sha256:
            raise FeaturesError(f"the shard {self.file} is broken: expected sha256 {self.sha256}, got {found}")
        self.verified = True

    def tensors(self) -> dict[str, Tensor]:
        """Memory-mapped: only what is read of them is loaded."""
        self.verify()
        return _mapped(self.file, self.sha256)


@lru_cache(_MAPPED)
def _mapped(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise FeaturesError(f"the shard {file} is not readable: {error}") from error


class FeatureBucket:
    """The samples of one picture size, numbered from 0 through its shards."""

    def __init__(self, size: Size, shards: list[_Shard], counts: list[int], empty: _Shard, kind: Any) -> None:
        self.size, self.shards, self.empty, self.kind = size, shards, empty, kind
        self.ends = np.cumsum(counts)  # [shards]

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> Sequence[int]:
        """C, h, w of its latents."""
        return self.shards[0].tensors()["mean"].shape[1:]

    def mean(self, items: Tensor) -> Tensor:
        """Of the posterior of samples `items` [B]: fp32 [B, C, h, w]."""
        return self._stacked("mean", items)

    def draw(self, items: Tensor, normal: Tensor) -> Tensor:
        """Latents mean + std n of samples `items` [B], with n = normal: fp32 [B, C, h, w] on the CPU."""
        return self.mean(items) + self._stacked("std", items) * normal

    def texts(self, items: Tensor, choice: Tensor, dropped: Tensor) -> Any:
        """What the denoiser reads of a caption of each item [B]: 0 the original, 1 the synthetic; the empty one where
        it is dropped."""
        picks = []
        for (shard, row), which, drop in zip(self._places(items), choice.tolist(), dropped.tolist(), strict=True):
            tensors = (self.empty if drop else shard).tensors()
            picks.append((tensors, 0 if drop else int(tensors["rows"][row, which])))
        with torch.autocast("cpu", enabled=False):  # which cannot stack halves
            return self.kind(**_captions(self.kind, picks)).gather(torch.arange(len(picks)))

    def time_ids(self, items: Tensor) -> Tensor:
        """Original height, width, crop top, left, height, width: fp32 [B, 6]."""
        return self._stacked("sizes", items)

    def _stacked(self, name: str, items: Tensor) -> Tensor:
        return torch.stack([shard.tensors()[name][row].float() for shard, row in self._places(items)])

    def _places(self, items: Tensor) -> list[tuple[_Shard, int]]:
        """The shard of each item, and its row there."""
        places = np.searchsorted(self.ends, items.numpy(), side="right")
        starts = np.concatenate([[0], self.ends])
        return [(self.shards[p], int(i - starts[p])) for p, i in zip(places, items.tolist(), strict=True)]


def _captions(kind: Any, picks: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """The fields of the captions' dataclass for rows of several shards; how `starts` and `states` belong together is
    said in `Encoder.encode_captions`."""
    names = [part.name for part in fields(kind)]
    parts = {}
    if "starts" in names:
        spans = [tensors["captions.starts"][row : row + 2].tolist() for tensors, row in picks]
        states = [
            tensors["captions.states"][start:end] for (tensors, _), (start, end) in zip(picks, spans, strict=True)
        ]
        parts["states"] = torch.cat(states)
        parts["starts"] = torch.tensor([0, *(end - start for start, end in spans)]).cumsum(0)
    for name in names:
        if name not in parts:
            parts[name] = torch.stack([tensors[f"captions.{name}"][row] for tensors, row in picks])
    return parts


class FeatureDataset:
    """Features from a folder that `precompute` has made, and the order in which they are visited.

    A batch is a function of seed and step alone, so that a resumed run sees what it would have seen. An epoch visits
    each sample at most once; see `epoch_batches` for what waits for another one.

    Args:
        folder: with index.json. Shards are opened when they are first read, and stay mapped, not loaded.
        kind: the dataclass of the captions, with `gather`.
        model: config hash of the models that the features must be of; None takes any.
        synthetic: probability of the synthetic caption in the place of the original.
        verify: compare the checksums of all shards now, not each at its first use.

    Raises:
        FeaturesError (an OSError): the index is missing, of another format or of other models, or a checksum is wrong.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: Callable[..., Any],
        *,
        model: str | None = None,
        synthetic: float = 0.5,
        seed: int = 0,
        verify: bool = False,
    ) -> None:
        if not 0 <= synthetic <= 1:
            raise ValueError(f"synthetic: expected a probability, 0 to 1, got {synthetic}")
        self.folder, self.synthetic, self.seed = Path(folder), synthetic, seed
        self.index = read_index(self.folder)
        if model is not None and model != self.index["model"]["sha256"]:
            named = "{class} '{name}', {sha256:.12}".format(**self.index["model"])
            raise FeaturesError(f"{self.folder}: expected features of models with the hash {model:.12}, got {named}")
        empty = _Shard(self.folder / self.index["empty"]["file"], self.index["empty"]["sha256"])
        by_size: dict[Size, tuple[list[_Shard], list[int]]] = {}
        for entry in self.index["shards"]:
            shards, counts = by_size.setdefault((entry["size"][0], entry["size"][1]), ([], []))
            shards.append(_Shard(self.folder / entry["file"], entry["sha256"]))
            counts.append(entry["count"])
        self.buckets = [FeatureBucket(size, *by_size[size], empty, kind) for size in sorted(by_size)]
        if verify:
            for shard in (empty, *(shard for bucket in self.buckets for shard in bucket.shards)):
                shard.verify()
        self._epoch: tuple[int, int] | None = None  # number and batch size of
        self._batches = np.empty(0), np.empty(0)  # bucket [T], items [T, size]

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def batch(self, step: int, size: int) -> tuple[FeatureBucket, Tensor]:
        """The bucket and the items [size] of a step; every epoch is a new shuffle.

        Raises:
            ValueError: no bucket has enough samples for a batch.
        """
        steps = sum(len(bucket) // size for bucket in self.buckets)
        if steps == 0:
            largest = max(map(len, self.buckets), default=0)
            raise ValueError(
                f"batch: expected at most the samples of one picture size in {self.folder}, where the most are "
                f"{largest} of {len(self)}, got {size}"
            )
        number, place = divmod(step, steps)
        if self._epoch != (number, size):
            if self._epoch is None:
                self._warn_of_small_buckets(size)
            members = [np.arange(len(bucket)) for bucket in self.buckets]
            self._batches = epoch_batches(members, size, np.random.default_rng([self.seed, number]))
            self._epoch = number, size
        buckets, items = self._batches
        return self.buckets[buckets[place]], torch.from_numpy(items[place])

    def draw(self, step: int, size: int, dropout: float, draws: Draws) -> FeatureBatch:
        """This process's rows of a step's batch of `size`: latents from the posterior, one of each item's captions, a
        share `dropout` of them empty, and noise. What is drawn for a row does not depend on how many processes there
        are, and each reads its own rows alone."""
        rng, (bucket, items) = draws.numpy(step), self.batch(step, size)
        choice = torch.from_numpy((rng.random(size) < self.synthetic).astype(np.int64))
        dropped = torch.from_numpy(rng.random(size) < dropout)
        rows = draws.share(size)
        mine = items[rows]
        latents = bucket.draw(mine, draws.noise(step, size, bucket.shape, 1))
        noise = draws.noise(step, size, bucket.shape)
        texts = bucket.texts(mine, choice[rows], dropped[rows])
        return FeatureBatch(bucket.size, latents, noise, texts, bucket.time_ids(mine), rows)

    def _warn_of_small_buckets(self, size: int) -> None:
        small = [bucket for bucket in self.buckets if len(bucket) < size]
        if small:
            lost = sum(map(len, small))
            names = ", ".join(f"{bucket.size[0]}x{bucket.size[1]}" for bucket in small)
            warnings.warn(
                f"{self.folder}: {lost} of {len(self)} samples are never drawn: there is less than a batch of {size} "
                f"of their size, {names}",
                stacklevel=3,
            )


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of features.

    Raises:
        FeaturesError: it is missing, broken or of another format.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FeaturesError(
            f"{path} is missing: expected a folder that 'kolors-fast precompute' has finished"
        ) from None
    except ValueError as error:
        raise FeaturesError(f"{path} is no JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise FeaturesError(f"{path}: format: expected {FORMAT}, got {found}")
    return index
