"""Measures over pictures, one pass over a folder or what was just drawn: Frechet distance and CLIP-score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kolors_fast.pipelines.prompts_file.files import recorded

from .clip_score import ClipFolder, clip_scores
from .fid import Features, frechet_distance, load_features
from .statistics import Moments, Share

Pair = tuple[Image.Image, str | None]  # a picture, and its prompt where it is known

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Measures:
    """The Frechet distance to a reference and the CLIP-score, whichever are asked for, of pictures as they come.

    Args:
        features: of the distance, as `load_features` takes it.
        reference: a folder of pictures, or statistics that `save` wrote.
        clip: a folder with a CLIPModel.
        share: takes this worker's files of the reference; then every worker calls `all_reduce`.
    """

    def __init__(
        self,
        features: str | None = None,
        reference: Path | None = None,
        clip: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch: int = 32,
        share: Share = iter,
    ) -> None:
        self.batch = batch
        self.clip = None if clip is None else ClipFolder(clip, device)
        self.features: Features | None = None
        if features is not None:
            self.features, self.name = load_features(features, device)
        self.seen, self.scores = Moments(), Moments()
        self.reference = None if reference is None else self._reference(reference, share)

    def _reference(self, where: Path, share: Share) -> Moments:
        if self.features is None:
            raise ValueError("features: expected those of the distance to a reference, got none")
        if where.suffix == ".safetensors":
            return Moments.load(where, self.name)
        moments = Moments()
        for pixels, _ in stacks(read(share(picture_files(where))), self.batch):
            moments.update(self.features(pixels))
        moments.all_reduce()
        return moments

    def update(self, pairs: Iterable[Pair]) -> None:
        """Look at pictures; the CLIP-score needs their prompts."""
        for pixels, prompts in stacks(pairs, self.batch):
            if self.features is not None:
                self.seen.update(self.features(pixels))
            if self.clip is not None:
                texts = [prompt for prompt in prompts if prompt is not None]
                if len(texts) < len(prompts):
                    raise ValueError(
                        "--clip: expected pictures that `kolors-fast generate` drew, got one with no prompt"
                    )
                self.scores.update(clip_scores(self.clip.pictures(pixels), self.clip.texts(texts))[:, None])

    def all_reduce(self) -> None:
        """Take the pictures of all workers together."""
        for moments, asked in ((self.seen, self.features), (self.scores, self.clip)):
            if asked is not None:
                moments.all_reduce()

    def save(self, path: Path) -> None:
        """Write the statistics of the pictures seen, to be a reference for others."""
        self.seen.save(path, self.name)

    def figures(self) -> dict[str, float]:
        """The measures asked for, by name, with the number of pictures behind them."""
        figures: dict[str, float] = {}
        if self.reference is not None:
            counts = {"pictures": self.seen.count, "reference pictures": self.reference.count}
            figures |= {"frechet distance": frechet_distance(self.seen, self.reference), **counts}
        if self.clip is not None:
            figures |= {"clip score": float(self.scores.mean), "clip score error": float(self.scores.standard_error)}
        return figures


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and of those in it, by name; hidden ones are left out, which may be half-written."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: expected a folder of pictures ({', '.join(_SUFFIXES)}), got none in it")
    return files


def read(files: Iterable[Path]) -> Iterator[Pair]:
    """Each picture, with the prompt that `kolors-fast generate` has put into it."""
    for file in files:
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{file}: expected a picture, got what cannot be read as one") from error
        yield picture, (recorded(file) or {}).get("prompt")


def stacks(pairs: Iterable[Pair], size: int) -> Iterator[tuple[Tensor, Sequence[str | None]]]:
    """Pictures uint8 [B, 3, H, W] with their prompts, up to `size` that follow one another and are equally large."""
    pictures: list[Image.Image] = []
    prompts: list[str | None] = []
    for picture, prompt in pairs:
        if pictures and (len(pictures) == size or picture.size != pictures[0].size):
            yield _stack(pictures), prompts
            pictures, prompts = [], []
        pictures.append(picture)
        prompts.append(prompt)
    if pictures:
        yield _stack(pictures), prompts


def _stack(pictures: Sequence[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])  # [B, H, W, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
