"""Decoder output to pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def to_pictures(decoded: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Images [B, 3, H, W] in about [-1, 1] to the range [0, 1]: clamp(x / 2 + 0.5).

    Returns:
        "pt": [B, 3, H, W] in the decoder's dtype; "np": float32 [B, H, W, 3]; "pil": B pictures, rounded to 8 bits.
    """
    image = (decoded.float() * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return image.to(decoded.dtype)
    array: np.ndarray = image.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(one) for one in (array * 255).round().astype(np.uint8)]
