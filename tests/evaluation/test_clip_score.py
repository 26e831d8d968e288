"""The CLIP-score against its formula and against transformers' own CLIPModel."""

import shutil

import numpy as np
import pytest
import torch

from kolors_fast.assets import bundled
from kolors_fast.evaluation.clip_score import ClipFolder, clip_scores

TEXTS = ["a red circle", "a blue square to the left of a green triangle"]


def test_scores_are_cosines_in_percent_and_never_below_zero():
    x, y = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = x.numpy(), y.numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(clip_scores(x, y), np.maximum(100 * cosines, 0), rtol=1e-12)
    assert (cosines < 0).any()
    assert clip_scores(3 * x, x).tolist() == pytest.approx([100] * 50)
    with pytest.raises(ValueError, match=r"in one shape \[B, D\], got \[50, 8\] and \[50, 7\]"):
        clip_scores(x, y[:, :7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIPModel of random weights, with the tokenizer of the bundled model."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(bundled("sd3-tiny") / "tokenizer", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {**layers, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_features_are_those_of_the_whole_model(folder):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = torch.randint(0, 256, (2, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=list(pictures), return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder).eval()(**ids, **pixels)
    clip = ClipFolder(folder)
    scores = clip_scores(clip.pictures(pictures), clip.texts(TEXTS))
    wanted = 100 * (output.image_embeds * output.text_embeds).sum(1).double()  # those are of unit length
    torch.testing.assert_close(scores, wanted.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_long_texts_are_cut_and_neighbours_do_not_matter(folder):
    clip = ClipFolder(folder)
    long = "a red circle " * 50
    both = clip.texts([TEXTS[0], long])
    torch.testing.assert_close(both[:1], clip.texts(TEXTS[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1:], clip.texts([long + "and more"]), rtol=1e-4, atol=1e-5)


def test_folders_that_hold_no_clip_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"--clip: expected a folder with a CLIPModel, got .* without config.json"):
        ClipFolder(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"--clip: expected all weights .* got none for text_projection.weight"):
        ClipFolder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="--clip: expected a folder with a CLIPModel, got"):
        ClipFolder(tmp_path)
