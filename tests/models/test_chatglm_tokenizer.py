"""ChatGLMTokenizer against diffusers' copy of the original, on a small sentencepiece model trained here."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer as DiffusersTokenizer

from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.checkpoint import CheckpointError

SENTENCES = [
    "a photo of a cat",
    "two red circles on a blue background",
    "a small green triangle left of a large yellow star!",
    "the quick brown fox jumps over the lazy dog, 1234567890",
    "一张瓢虫的照片",
    "红色的圆在蓝色的正方形上",
    "一只猫坐在椅子上，高品质，超清晰",
]
TEXTS = [
    *SENTENCES,
    "",
    "  ",
    " leading and  double spaces\n\ttrailing ",
    "MiXeD 猫 and cat，ＦＵＬＬ　ｗｉｄｔｈ",
    "unknown: 🎉 é ∀",
    "[gMASK] sop <unk> </s> <|user|> as plain text",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(path / "tokenizer"),
        vocab_size=150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(folder.parent, subfolder=folder.name)


@pytest.fixture(scope="module")
def original(folder: Path) -> DiffusersTokenizer:
    return DiffusersTokenizer(str(folder / "tokenizer.model"))


def test_special_ids_match_diffusers(tokenizer: ChatGLMTokenizer, original: DiffusersTokenizer) -> None:
    assert tokenizer.special_ids == original.tokenizer.special_tokens
    assert tokenizer.prefix == original.get_prefix_tokens()
    assert tokenizer.vocab_size == len(tokenizer) == original.vocab_size
    assert tokenizer.pad_token_id == original.pad_token_id
    assert tokenizer.eos_token_id == original.eos_token_id
    # the released model has 64789 pieces: [gMASK] is 64790 and sop 64792
    assert [i - tokenizer.pieces.vocab_size() for i in tokenizer.prefix] == [1, 3]


@pytest.mark.filterwarnings("ignore:the text has")
@pytest.mark.parametrize("max_length", [256, 11, 2])
@pytest.mark.parametrize("text", [*TEXTS, TEXTS], ids=str)
def test_call_matches_diffusers(
    tokenizer: ChatGLMTokenizer, original: DiffusersTokenizer, text: str | list[str], max_length: int
) -> None:
    arguments = {
        "padding": "max_length",
        "max_length": max_length,
        "truncation": True,
        "return_tensors": "pt",
    }
    expected, got = original(text, **arguments), tokenizer(text, **arguments)
    assert set(got) == set(expected.keys()) == set(tokenizer.model_input_names)
    for name, value in got.items():
        assert value.dtype == torch.int64
        assert torch.equal(value, expected[name]), name


def test_padding_to_the_longest_matches_diffusers(tokenizer: ChatGLMTokenizer, original: DiffusersTokenizer) -> None:
    expected = original(TEXTS, padding=True, return_tensors="pt")
    for padding in (True, "longest"):
        got = tokenizer(TEXTS, padding=padding)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_matches_diffusers(tokenizer: ChatGLMTokenizer, original: DiffusersTokenizer, text: str) -> None:
    ids = tokenizer(text, max_length=64).input_ids[0]
    assert tokenizer.decode(ids) == original.decode(ids)


def test_decode_gives_the_text_back(tokenizer: ChatGLMTokenizer) -> None:
    for text in ("two red circles on a blue background", "红色的圆在蓝色的正方形上"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_batch_access(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["a cat", "a"]).to("meta")
    assert batch.input_ids is batch["input_ids"] and batch.position_ids.is_meta
    assert not hasattr(batch, "token_type_ids")
    assert dict(**batch).keys() == {"input_ids", "attention_mask", "position_ids"}


def test_truncation_warns_with_limit_and_lost_text(tokenizer: ChatGLMTokenizer) -> None:
    text = "a photo of a cat"
    limit = len(tokenizer.encode("a photo of a"))
    total = len(tokenizer.encode(text))
    with pytest.warns(UserWarning, match=f"has {total} tokens, but the limit is {limit}; .*: 'cat'") as caught:
        batch = tokenizer(text, max_length=limit)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "a photo of a"


def test_round_trip(tokenizer: ChatGLMTokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "ChatGLMTokenizer"
    theirs = DiffusersTokenizer.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "theirs")
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "theirs")
    worker_copy = pickle.loads(pickle.dumps(again))
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == worker_copy.encode(text) == theirs(text)["input_ids"]


def test_stands_in_a_diffusers_pipeline(tokenizer: ChatGLMTokenizer, original: DiffusersTokenizer) -> None:
    """KolorsPipeline.encode_prompt with our tokenizer and encoder, and with its own."""
    config = {
        "num_layers": 2,
        "padded_vocab_size": tokenizer.vocab_size,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "kv_channels": 8,
        "num_attention_heads": 2,
    }
    ours = ChatGLM(**config).eval()
    theirs = ChatGLMModel(ChatGLMConfig(**config, original_rope=True), empty_init=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)

    def encode(tokenizer: Any, text_encoder: Any) -> tuple[torch.Tensor, ...]:
        pipeline = SimpleNamespace(
            _execution_device="cpu",
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            config=SimpleNamespace(force_zeros_for_empty_prompt=False),
        )
        with torch.no_grad():
            return KolorsPipeline.encode_prompt(
                pipeline, ["a cat", "一只猫"], num_images_per_prompt=2, negative_prompt=["", "blue"]
            )

    for got, expected in zip(encode(tokenizer, ours), encode(original, theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_refusals(tokenizer: ChatGLMTokenizer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text must be a string or a non-empty list"):
        tokenizer([])
    with pytest.raises(ValueError, match="text must be a string or a non-empty list"):
        tokenizer(None)
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        tokenizer("a", return_tensors="np")
    with pytest.raises(ValueError, match=r"padding must be .* got 'left'"):
        tokenizer("a", padding="left")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenizer("a", max_length=1)
    with pytest.raises(ValueError, match="padding=False needs texts of one length"):
        tokenizer(["a", "a photo of a cat"], padding=False)
    with pytest.raises(ValueError, match="the limit is 4 and truncation is off"):
        tokenizer("a photo of a cat", max_length=4, truncation=False)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="truncated or not a sentencepiece model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(CheckpointError, match="describes a T5Tokenizer"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_works_without_transformers_and_diffusers(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    """From text to features in a process where importing either raises."""
    torch.manual_seed(0)
    model = ChatGLM(
        num_layers=2,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        ffn_hidden_size=24,
        kv_channels=8,
        num_attention_heads=2,
    ).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = textwrap.dedent(
        """
        import sys
        sys.modules["transformers"] = sys.modules["diffusers"] = None
        import torch
        from kolors_fast.models.chatglm import ChatGLM
        from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
        tokenizer = ChatGLMTokenizer.from_pretrained(sys.argv[1], subfolder="tokenizer")
        model = ChatGLM.from_pretrained(sys.argv[1], subfolder="text_encoder")
        with torch.no_grad():
            torch.save(model.text_features(**tokenizer("一只猫 a cat", max_length=32)), sys.argv[2])
        """
    )
    result = tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(result)], check=True, timeout=120)
    with torch.no_grad():
        expected = model.text_features(**tokenizer("一只猫 a cat", max_length=32))
    for got, wanted in zip(torch.load(result, weights_only=True), expected, strict=True):
        torch.testing.assert_close(got, wanted)
