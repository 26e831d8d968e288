"""Fused kernels behind drop-in Kolors-class text-to-image models.

    from kolors_fast import KolorsPipeline
    picture = KolorsPipeline.from_pretrained("kolors-tiny")("红色圆形在蓝色方块左边").images[0]

Names are imported at first use, so that `import kolors_fast` stays quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.autoencoder_kl import AutoencoderKL
    from .models.chatglm import ChatGLM
    from .models.chatglm_tokenizer import ChatGLMTokenizer
    from .models.mmdit import MMDiT
    from .models.pixart import PixArtTransformer
    from .models.unet import KolorsUNet
    from .ops import explain, use_backend
    from .pipelines.kolors import KolorsPipeline
    from .pipelines.pixart import PixArtPipeline
    from .pipelines.sd3 import SD3Pipeline
    from .ranges import nvtx_ranges
    from .savings import without

_HOME = {
    "AutoencoderKL": "models.autoencoder_kl",
    "ChatGLM": "models.chatglm",
    "ChatGLMTokenizer": "models.chatglm_tokenizer",
    "KolorsPipeline": "pipelines.kolors",
    "KolorsUNet": "models.unet",
    "MMDiT": "models.mmdit",
    "PixArtPipeline": "pipelines.pixart",
    "PixArtTransformer": "models.pixart",
    "SD3Pipeline": "pipelines.sd3",
    "explain": "ops",
    "nvtx_ranges": "ranges",
    "use_backend": "ops",
    "without": "savings",
}

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022  (models first)
    "KolorsUNet",
    "MMDiT",
    "PixArtTransformer",
    "AutoencoderKL",
    "ChatGLM",
    "ChatGLMTokenizer",
    "KolorsPipeline",
    "SD3Pipeline",
    "PixArtPipeline",
    "explain",
    "nvtx_ranges",
    "use_backend",
    "without",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


if os.environ.get("KOLORS_FAST_NVTX", "0") not in ("", "0"):
    __getattr__("nvtx_ranges")()
