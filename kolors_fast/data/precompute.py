"""Pictures and captions to a folder of latents and text features, in shards of one bucket each.

    index.json            what is there: the model, the settings, counts, and of each shard its file, sha256, bucket
                          size, number of samples and their keys
    skipped.jsonl         key and reason of each sample that could not be used
    empty.safetensors     the empty caption
    HxW-R-N.safetensors   shard N of process R

A shard holds, for each of its samples:

    mean, std   fp16 [n, C, h, w]  of the autoencoder's posterior, both as the denoiser reads latents: scaled (and the
                                   mean shifted) by the autoencoder's config
    sizes       int32 [n, 6]       original height and width, the crop's top and left, the bucket's height and width
    rows        int64 [n, 2]       of the original and of the synthetic caption; where one is missing, the other's twice
    captions.*                     the tensors of the captions' dataclass

While it runs, settings.json tells what a run must share to go on, finished-R.jsonl the shards that are done, and
done-R.json that a process has nothing left. A killed run goes on behind the last shard of each bucket.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from .buckets import Size, assign_bucket, make_buckets
from .metadata import Filter
from .pictures import PictureError, fit_picture
from .sources import Sample, Skipped

INDEX, SKIPPED, EMPTY, SETTINGS = "index.json", "skipped.jsonl", "empty.safetensors", "settings.json"
FORMAT = 1


class Encoder(Protocol):
    """What a system's models make of pictures and captions."""

    @property
    def identity(self) -> dict[str, str]:
        """class, name, config hash ("sha256") and dtype of the models; equal ones make the same features."""

    def encode_pictures(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] -> mean and standard deviation [B, C, h, w] of the latents, scaled."""

    def encode_captions(self, texts: list[str]) -> Any:
        """A dataclass of tensors on the CPU, a row for each text.

        Where one of them is `starts` [M + 1], `states` [total, ...] holds rows starts[i] to starts[i + 1] of text i.
        """


@dataclass(frozen=True)
class Settings:
    """What the features depend on, beside the data and the models."""

    area: int = 1024  # side of the square whose area no bucket exceeds
    shortest: int = 512  # side of a bucket, in pixels
    longest: int = 2048
    batch: int = 8  # pictures encoded at once
    shard: int = 128  # samples of a full shard
    filter: Filter = field(default_factory=lambda: Filter({}))

    def __post_init__(self) -> None:
        for name in ("batch", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    def buckets(self) -> list[Size]:
        return make_buckets(self.area**2, self.shortest, self.longest)

    def table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "filter": self.filter.table}


def precompute(
    source: Iterable[Sample | Skipped],
    encoder: Encoder,
    folder: str | os.PathLike[str],
    settings: Settings,
    rank: int = 0,
    world: int = 1,
) -> bool:
    """Encode every `world`-th sample of the source, from number `rank` on; the last process to end writes the index.

    Processes need no communication. A sample is always encoded together with the same others, so that a run that is
    killed and started again makes the same files, byte for byte. With more samples in the source, another run adds
    them; finished shards are kept unless their checksum is wrong.

    Returns:
        Whether the index is written.

    Raises:
        ValueError: the folder was begun with other settings, models or processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder / SETTINGS, {"model": encoder.identity, **settings.table(), "processes": world})
    done = folder / f"done-{rank}.json"
    done.unlink(missing_ok=True)
    if rank == 0:
        _write(folder / EMPTY, save(_captions(encoder.encode_captions([""]))))
    share = _Share(folder, encoder, settings, rank)
    with tqdm(desc="features", unit="sample", disable=rank > 0, mininterval=10) as bar:
        for number, one in enumerate(source):
            share.add(one, own=number % world == rank)
            bar.update()
    share.finish()
    report = {"counts": share.counts, "dropped": share.dropped, "skipped": share.skipped}
    _write(done, _json(report))
    if not all((folder / f"done-{other}.json").exists() for other in range(world)):
        return False
    _write_index(folder, encoder.identity, settings, world)
    return True


class _Share:
    """The samples of one process on their way into shards."""

    def __init__(self, folder: Path, encoder: Encoder, settings: Settings, rank: int) -> None:
        self.folder, self.encoder, self.settings, self.rank = folder, encoder, settings, rank
        self.buckets = settings.buckets()
        self.of_metadata, self.of_pictures = settings.filter.split()
        self.journal = folder / f"finished-{rank}.jsonl"
        self.shards = _intact(self.journal)
        self.finished = {key for shard in self.shards for key in shard["keys"]}
        self.seen: set[str] = set()
        self.open: dict[Size, _Shard] = {}
        self.counts = Counter(samples=0, encoded=len(self.finished))
        self.dropped: Counter[str] = Counter()
        self.skipped: list[dict[str, str]] = []

    def add(self, one: Sample | Skipped, *, own: bool) -> None:
        """Take the next sample, or remember the key of another process's."""
        self.counts["samples"] += own
        if own and isinstance(one, Skipped):
            self._skip(one.key, one.reason)
        elif own and one.key in self.seen:
            self._skip(one.key, "another sample has this key")
        elif own and isinstance(one, Sample) and one.key not in self.finished:
            self._encode(one)
        if isinstance(one, Sample):
            self.seen.add(one.key)

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.append({"key": key, "reason": reason})

    def _encode(self, sample: Sample) -> None:
        reason = self.of_metadata.refusal(sample.metadata)
        if reason is None:
            try:
                image = sample.picture()
            except PictureError as error:
                return self._skip(sample.key, f"picture: {error}")
            reason = self.of_pictures.refusal({"width": image.width, "height": image.height})
        if reason is None:
            place = assign_bucket(self.buckets, (image.height, image.width))
            reason = "aspect ratio" if place is None else None
        if reason is not None or place is None:
            self.dropped[str(reason)] += 1
            return None
        size = self.buckets[place]
        pixels, crop = fit_picture(image, size, sample.key)
        shard = self.open.setdefault(size, _Shard())
        shard.samples.append(sample)
        shard.sizes.append([image.height, image.width, *crop, *size])
        shard.pixels.append(pixels)
        self.counts["encoded"] += 1
        if len(shard.pixels) == self.settings.batch:
            shard.encode_pictures(self.encoder)
        if len(shard.samples) == self.settings.shard:
            self._write(size)
        return None

    def finish(self) -> None:
        """Write the shards that are not full."""
        for size in list(self.open):
            self._write(size)

    def _write(self, size: Size) -> None:
        shard = self.open.pop(size)
        content = save(shard.tensors(self.encoder))
        taken = {one["file"] for one in self.shards}
        stem = f"{size[0]}x{size[1]}-{self.rank}"
        name = next(name for n in range(len(taken) + 1) if (name := f"{stem}-{n:05d}.safetensors") not in taken)
        _write(self.folder / name, content)
        keys = [sample.key for sample in shard.samples]
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append({"file": name, "sha256": digest, "size": size, "count": len(keys), "keys": keys})
        with self.journal.open("ab") as journal:
            journal.write(_json(self.shards[-1]))
            journal.flush()
            os.fsync(journal.fileno())


class _Shard:
    """Samples of one bucket: their pictures wait for a batch, their captions for the shard to be full."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.sizes: list[list[int]] = []
        self.pixels: list[np.ndarray] = []
        self.latents: list[tuple[Tensor, Tensor]] = []

    def encode_pictures(self, encoder: Encoder) -> None:
        if self.pixels:
            mean, std = encoder.encode_pictures(np.stack(self.pixels))
            self.latents.append((_stored(mean), _stored(std)))
            self.pixels.clear()

    def tensors(self, encoder: Encoder) -> dict[str, Tensor]:
        self.encode_pictures(encoder)
        texts: list[str] = []
        rows = []
        for sample in self.samples:
            own = dict.fromkeys(text for text in (sample.caption, sample.synthetic_caption) if text is not None)
            rows.append([len(texts), len(texts) + len(own) - 1])
            texts += own
        mean, std = (torch.cat(parts) for parts in zip(*self.latents, strict=True))
        sizes = torch.tensor(self.sizes, dtype=torch.int32)
        stored = {"mean": mean, "std": std, "sizes": sizes, "rows": torch.tensor(rows)}
        return stored | _captions(encoder.encode_captions(texts))


def _stored(value: Tensor) -> Tensor:
    return value.half().cpu().contiguous()


def _captions(encoded: Any) -> dict[str, Tensor]:
    return {f"captions.{part.name}": getattr(encoded, part.name).contiguous() for part in fields(encoded)}


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Begin with these settings, or find them there."""
    settings = json.loads(_json(settings))  # tuples become lists
    if not path.exists():
        _write(path, _json(settings))
    begun = json.loads(path.read_bytes())
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(f"{name}: expected {begun.get(name)!r}, with which {path.parent} was begun, got {value!r}")


def _intact(journal: Path) -> list[dict[str, Any]]:
    """The finished shards of the journal, which is rid of those that are missing or broken."""
    shards = []
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            shard = json.loads(line)
            intact = file_sha256(journal.parent / shard["file"]) == shard["sha256"]
        except (ValueError, OSError):  # a line that was cut off, or no such file
            continue
        if intact:
            shards.append(shard)
    _write(journal, b"".join(map(_json, shards)))
    return shards


def _write_index(folder: Path, model: dict[str, str], settings: Settings, world: int) -> None:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    skipped, shards = [], []
    for rank in range(world):
        done = json.loads((folder / f"done-{rank}.json").read_bytes())
        counts.update(done["counts"])
        dropped.update(done["dropped"])
        skipped += done["skipped"]
        shards += [json.loads(line) for line in (folder / f"finished-{rank}.jsonl").read_bytes().splitlines()]
    _write(folder / SKIPPED, b"".join(map(_json, skipped)))
    index = {
        "format": FORMAT,
        "model": model,
        "settings": settings.table(),
        "counts": {**counts, "skipped": len(skipped), "dropped": dict(sorted(dropped.items()))},
        "empty": {"file": EMPTY, "sha256": file_sha256(folder / EMPTY)},
        "shards": sorted(shards, key=lambda shard: (shard["size"], shard["file"])),
    }
    _write(folder / INDEX, _json(index))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Beside, then renamed: a file is there whole or not at all."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
