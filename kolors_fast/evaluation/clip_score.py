"""How well pictures fit their prompts, as a CLIP of the user's sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_scores(pictures: Tensor, texts: Tensor) -> Tensor:
    """max(100 cos(picture, text), 0) of each pair: [B], float64, from features [B, D] of both.

    The CLIP-score of a set is the mean (Hessel et al. 2021, https://arxiv.org/abs/2104.08718, whose factor is 2.5).
    """
    if pictures.shape != texts.shape:
        shapes = f"{list(pictures.shape)} and {list(texts.shape)}"
        raise ValueError(f"features: expected those of pictures and texts in one shape [B, D], got {shapes}")
    return (100 * F.cosine_similarity(pictures.double(), texts.double(), dim=1)).clamp(min=0)


class ClipFolder:
    """The features of a CLIPModel in a folder of transformers', with its tokenizer and picture processor.

    Texts longer than the model reads are cut.

    Raises:
        ValueError: the folder holds no CLIPModel with safetensors weights.
        ImportError: transformers is not installed.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        import transformers

        # of the two in transformers 5, that by Pillow, so that a score does not depend on torchvision being there
        kind: Any = transformers.CLIPModel
        processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        if not (folder / "config.json").is_file():
            raise ValueError(f"--clip: expected a folder with a CLIPModel, got {str(folder)!r}, without config.json")
        try:
            self.model, report = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            self.processor = processor.from_pretrained(str(folder), local_files_only=True)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            told = str(error).strip().partition("\n")[0]
            raise ValueError(f"--clip: expected a folder with a CLIPModel, got {str(folder)!r}: {told}") from error
        if report["missing_keys"]:  # which transformers has filled at random
            missing = min(report["missing_keys"])
            raise ValueError(f"--clip: expected all weights of a CLIPModel in {str(folder)!r}, got none for {missing}")
        self.model.eval().to(device)
        self.device, self.length = device, self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, D]."""
        inputs = self.processor(images=list(pictures.cpu()), return_tensors="pt").to(self.device)
        return _tensor(self.model.get_image_features(**inputs))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D]."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        return _tensor(self.model.get_text_features(**inputs))


def _tensor(output: Any) -> Tensor:
    """The projected features, which transformers 5 wraps."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
