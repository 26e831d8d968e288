"""Small pictures as files, and an encoder that needs no models."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def png():
    """Bytes of a picture of noise, by height, width and seed."""

    def make(height, width, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    return make


@dataclass(frozen=True)
class Letters:
    """Captions as the codes of their letters, a row each; `total` is their sum."""

    states: torch.Tensor  # [total, 1]
    starts: torch.Tensor
    total: torch.Tensor  # [M]

    def gather(self, which):
        texts = ["".join(chr(int(c)) for c in self.states[self.starts[i] : self.starts[i + 1], 0]) for i in which]
        assert [sum(map(ord, text)) for text in texts] == self.total[which].tolist()
        return texts


class StubEncoder:
    """Latents: the mean colours of 8 x 8 pixels, their standard deviation 0.5; counts what it has encoded."""

    identity = {"class": "Stub", "name": "stub", "sha256": "0" * 64}  # noqa: RUF012, no dataclass
    captions = Letters

    def __init__(self):
        self.encoded = 0

    def encode_pictures(self, pictures):
        self.encoded += len(pictures)
        pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, torch.full_like(mean, 0.5)

    def encode_captions(self, texts):
        codes = [torch.tensor([ord(c) for c in text]) for text in texts]
        lengths = torch.tensor([0, *map(len, texts)])
        total = torch.tensor([int(c.sum()) for c in codes])
        return Letters(torch.cat(codes)[:, None].int(), lengths.cumsum(0), total)


@pytest.fixture
def encoder():
    return StubEncoder()
