"""Features by the bundled models against the pipelines' own reading of prompts and the autoencoders' posteriors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_fast.assets import bundled
from kolors_fast.cli import main
from kolors_fast.data.features import FeaturesError
from kolors_fast.data.pictures import fit_picture, open_picture
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.pipelines.load import load_pipeline
from kolors_fast.pipelines.pixart_text import read_pixart_prompts
from kolors_fast.pipelines.sd3_text import SD3TextEncoders, read_sd3_parts
from kolors_fast.training.precompute import PipelineEncoder, model_hash, open_features
from kolors_fast.training.streams import Streams

CAPTIONS = [("a red circle", "一个红色的圆形"), ("two green squares above a blue star", None), (None, "a small moon")]
SIDES = [(100, 100), (60, 180), (180, 60)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 pictures with captions and metadata."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for n in range(12):
        pixels = rng.integers(0, 256, (*SIDES[n // 2 % 3], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.png")
        fields = dict(zip(("caption", "synthetic_caption"), CAPTIONS[n % 3], strict=True), quality=n % 5 + 1)
        (folder / f"{n:02d}.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module", params=["kolors-tiny", "sd3-tiny", "pixart-tiny"])
def made(request, data, tmp_path_factory):
    """A bundled model's name, and the folder of features that the command has made with it."""
    folder = tmp_path_factory.mktemp(request.param)
    limits = ["--area", "128", "--min", "64", "--limit", "256", "--batch", "3"]
    assert main(["precompute", str(data), "-o", str(folder), "--model", request.param, *limits]) == 0
    return request.param, folder


def test_latents_are_the_posteriors(made, data):
    name, folder = made
    dataset = open_features(folder, name, verify=True)
    vae = AutoencoderKL.from_pretrained(bundled(name), subfolder="vae")
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    assert len(dataset) == 12 and len(dataset.buckets) == 3
    for bucket in dataset.buckets:
        keys = [k for s in dataset.index["shards"] if tuple(s["size"]) == bucket.size for k in s["keys"]]
        means = torch.cat([shard.tensors()["mean"] for shard in bucket.shards])
        stds = torch.cat([shard.tensors()["std"] for shard in bucket.shards])
        for key, mean, std in zip(keys, means, stds, strict=True):
            pixels, _ = fit_picture(open_picture((data / key).read_bytes()), bucket.size, key)
            scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
            with torch.no_grad():
                posterior = vae.encode(scaled)[0]
            half = {"rtol": 2**-10, "atol": 1e-4}  # of a rounding to fp16, and of another batch
            torch.testing.assert_close(mean.float(), ((posterior.mean - shift) * scale)[0], **half)
            torch.testing.assert_close(std.float(), (posterior.std * scale)[0], **half)


def read(name, texts):
    """What the pipeline's denoiser reads, as `gather` gives it."""
    if name == "kolors-tiny":
        encoder = ChatGLM.from_pretrained(bundled(name), subfolder="text_encoder")
        tokenizer = ChatGLMTokenizer.from_pretrained(bundled(name), subfolder="tokenizer")
        tokens = tokenizer(texts, padding="max_length", max_length=256, truncation=True)
        with torch.no_grad():
            return encoder.text_features_collapsed(**tokens)
    pipeline = load_pipeline(name)
    if name == "sd3-tiny":
        transformer = pipeline.transformer.config
        parts = {n: c for n, c in pipeline.components.items() if n.startswith(("text_encoder", "tokenizer"))}
        encoders = SD3TextEncoders(transformer.joint_attention_dim, transformer.pooled_projection_dim, **parts)
        return tuple(vars(read_sd3_parts(encoders, [texts] * 3, pipeline.tokenizer_3.model_max_length)).values())
    longest = max(len(ids) for ids in pipeline.tokenizer(texts)["input_ids"])
    features = read_pixart_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, longest, clean_caption=False)
    mask = features.prompt_attention_mask
    return features.prompt_embeds * mask[..., None], mask


def test_captions_are_the_pipelines(made):
    name, folder = made
    dataset = open_features(folder, name)
    for bucket in dataset.buckets:
        keys = [k for s in dataset.index["shards"] if tuple(s["size"]) == bucket.size for k in s["keys"]]
        items = torch.tensor([3, 0, 1, 2])
        choice, dropped = torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, False, True])
        texts = []
        for item, which, drop in zip(items, choice, dropped, strict=True):
            captions = CAPTIONS[int(keys[item][:2]) % 3]
            texts.append("" if drop else captions[which] or captions[1 - which])
        found, expected = bucket.texts(items, choice, dropped), read(name, texts)
        found = tuple(vars(found).values()) if name == "sd3-tiny" else found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2**-10, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the text has 602 tokens")  # of the pipeline's own reading
def test_kolors_captions_without_a_pad():
    texts = ["a red circle " * 200, ""]
    found = PipelineEncoder("kolors-tiny").encode_captions(texts).gather(torch.arange(2))
    for one, other in zip(found, read("kolors-tiny", texts), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-4)
    assert found[0].shape[1] == 257 and found[1][0, 0] == float("-inf")


def test_captions_do_not_depend_on_how_many_there_are(made):
    """More than are encoded at once, the last among others and alone."""
    encoder = PipelineEncoder(made[0])
    texts = [f"{n} blue squares " * (n % 4) for n in range(70)]
    many = vars(encoder.encode_captions(texts))
    alone = vars(encoder.encode_captions(texts[-1:]))
    for field, one in alone.items():
        if field == "starts":
            assert one.tolist() == [0, int(many[field][-1] - many[field][-2])] and len(many[field]) == 71
        else:
            torch.testing.assert_close(many[field][-len(one) :], one, rtol=2**-9, atol=1e-3)


def test_a_step_of_training_can_be_drawn(made):
    dataset = open_features(made[1])
    batch = dataset.draw(0, 2, 0.5, Streams(0, "stage"))
    assert batch.latents.shape == (2, 4, batch.size[0] // 8, batch.size[1] // 8)
    assert torch.isfinite(batch.latents).all()
    assert batch.time_ids[:, 4:].tolist() == [list(map(float, batch.size))] * 2


def test_of_another_model(made):
    name, folder = made
    assert len({model_hash(one) for one in ("kolors-tiny", "sd3-tiny", "pixart-tiny")}) == 3
    other = "sd3-tiny" if name == "kolors-tiny" else "kolors-tiny"
    with pytest.raises(FeaturesError, match=f"expected features of models with the hash .*, got .* '{name}'"):
        open_features(folder, other)
    index = json.loads((folder / "index.json").read_text())
    index["model"]["class"] = "Unknown"
    (folder / "other").mkdir()
    (folder / "other" / "index.json").write_text(json.dumps(index))
    with pytest.raises(FeaturesError, match=r"model: expected one of KolorsPipeline, .*, got Unknown"):
        open_features(folder / "other")


def test_the_command_tells_what_it_made(data, tmp_path, capsys):
    (tmp_path / "filter.toml").write_text("quality = {min = 4}\n")
    options = ["--model", "kolors-tiny", "--area", "128", "--min", "64", "--limit", "256"]
    command = ["precompute", str(data), "-o", str(tmp_path / "out"), *options]
    assert main([*command, "--filter", str(tmp_path / "filter.toml")]) == 0
    assert "4 samples in " in capsys.readouterr().out
    assert main(command) == 1
    assert "filter: expected {'quality': {'min': 4}}, with which" in capsys.readouterr().err
    assert main(["precompute", str(tmp_path / "none"), "-o", str(tmp_path / "other"), *options]) == 1
    assert "data: expected pictures" in capsys.readouterr().err
