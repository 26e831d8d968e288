"""Files of text encoders and tokenizers: loaded, saved, and refused in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.pipelines.text_encoders import (
    TEXT_ENCODERS,
    TOKENIZERS,
    load_text_encoder,
    load_tokenizer,
    save_text_encoder,
    save_tokenizer,
)

from .text_models import write_sd3_text

CLIP, T5 = "CLIPTextModelWithProjection", "T5EncoderModel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.mark.parametrize(
    ("name", "kind"), [("text_encoder_2", CLIPTextModelWithProjection), ("text_encoder_3", T5EncoderModel)]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_encoders_are_those_of_transformers(folder: Path, name: str, kind: Any, dtype: torch.dtype | None) -> None:
    ours = load_text_encoder(folder, name, kind.__name__, dtype)
    theirs = kind.from_pretrained(folder / name, dtype=dtype or torch.float32)
    assert type(ours) is kind and not ours.training
    assert ours.dtype == (dtype or torch.float32)
    expected = dict(theirs.named_parameters())
    for key, value in ours.named_parameters():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def test_none_is_float32_whatever_the_file_holds(folder: Path, tmp_path: Path) -> None:
    save_text_encoder(load_text_encoder(folder, "text_encoder", CLIP, torch.bfloat16), tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["text_projection.weight"].dtype == torch.bfloat16
    assert load_text_encoder(tmp_path, "half", CLIP).dtype == torch.float32


@pytest.mark.parametrize(("name", "kind"), [("text_encoder", CLIP), ("text_encoder_3", T5)])
def test_encoders_come_back_from_where_they_were_saved(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    encoder = load_text_encoder(folder, name, kind)
    save_text_encoder(encoder, tmp_path / "new")
    (tmp_path / "new" / "model-00001-of-00002.safetensors").write_bytes(b"")  # of an earlier save
    save_text_encoder(encoder, tmp_path / "new")
    save_text_encoder(encoder, tmp_path / "new", variant="fp16")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"config.json", "model.safetensors", "model.fp16.safetensors"}
    for variant in (None, "fp16"):
        state = load_text_encoder(tmp_path, "new", kind, variant=variant).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(CheckpointError, match=r"expected model\.fp8\.safetensors"):
        load_text_encoder(tmp_path, "new", kind, variant="fp8")
    with pytest.raises(CheckpointError, match=r"cannot save into .*config.json': it is a file"):
        save_text_encoder(encoder, tmp_path / "new" / "config.json")


@pytest.mark.parametrize(("name", "kind"), [("tokenizer_2", CLIPTokenizer), ("tokenizer_3", T5TokenizerFast)])
def test_tokenizers_are_those_of_transformers_and_come_back(folder: Path, tmp_path: Path, name: str, kind: Any) -> None:
    ours, theirs = load_tokenizer(folder, name, kind.__name__), kind.from_pretrained(folder / name)
    save_tokenizer(ours, tmp_path / name)
    again = load_tokenizer(tmp_path, name, kind.__name__)
    text = ["Two red circles, a cat", ""]
    arguments = {"padding": "max_length", "max_length": 30, "return_tensors": "pt"}
    expected = theirs(text, **arguments)
    for tokenizer in (ours, again):
        assert tokenizer.model_max_length == theirs.model_max_length
        got = tokenizer(text, **arguments)
        assert torch.equal(got.input_ids, expected.input_ids)
        assert torch.equal(got.attention_mask, expected.attention_mask)
    pads = expected.input_ids[1, 2:]
    assert (pads == 0).all()  # of CLIP-bigG and T5


def test_classes_that_are_not_known_are_refused(folder: Path) -> None:
    for load, known in ((load_text_encoder, TEXT_ENCODERS), (load_tokenizer, TOKENIZERS)):
        with pytest.raises(CheckpointError, match=f"text_encoder of .*: expected one of {', '.join(known)}, got AutoM"):
            load(folder, "text_encoder", "AutoModel")


def test_missing_files_are_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no subfolder 'text_encoder_4'"):
        load_text_encoder(copied, "text_encoder_4", T5)
    with pytest.raises(CheckpointError, match="has no subfolder 'tokenizer_4'"):
        load_tokenizer(copied, "tokenizer_4", "T5Tokenizer")
    (copied / "text_encoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"text_encoder.config\.json is missing"):
        load_text_encoder(copied, "text_encoder", CLIP)
    (copied / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text_encoder_3 has no weights"):
        load_text_encoder(copied, "text_encoder_3", T5)
    # transformers would make an empty vocabulary
    (copied / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no vocabulary for a CLIPTokenizer: expected tokenizer\.json, or vocab"):
        load_tokenizer(copied, "tokenizer", "CLIPTokenizer")
    (copied / "tokenizer_3" / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match=r"no vocabulary for a T5Tokenizer: expected tokenizer\.json, or spiece"):
        load_tokenizer(copied, "tokenizer_3", "T5Tokenizer")


def test_broken_files_are_refused(copied: Path) -> None:
    weights = copied / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    missing = {key: value for key, value in state.items() if key != "text_projection.weight"}
    save_file(missing, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 'text_projection\.weight', which CLIPTextModelWithProjection"):
        load_text_encoder(copied, "text_encoder", CLIP)
    save_file(state | {"text_projection.weight": torch.zeros(2, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_projection\.weight \(expected \(8, 8\), got \(2, 3\)\)$"):
        load_text_encoder(copied, "text_encoder", CLIP)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_text_encoder(copied, "text_encoder", CLIP)
    config = json.loads((copied / "text_encoder" / "config.json").read_text())
    shutil.copy(copied / "text_encoder_2" / "model.safetensors", weights)
    (copied / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(CheckpointError, match="text_encoder does not load as a CLIPTextModelWithProjection: "):
        load_text_encoder(copied, "text_encoder", CLIP)
    with pytest.raises(CheckpointError, match="model_type: expected t5, got clip_text_model"):
        load_text_encoder(copied, "text_encoder_2", T5)
    (copied / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer does not load as a CLIPTokenizer"):
        load_tokenizer(copied, "tokenizer", "CLIPTokenizer")


class Trap:
    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


def test_bin_weights_load_but_run_no_code(copied: Path) -> None:
    folder = copied / "text_encoder"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    loaded = load_text_encoder(copied, "text_encoder", CLIP).state_dict()
    assert torch.equal(loaded["text_projection.weight"], state["text_projection.weight"])
    torch.save({**state, "trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated or not a file of plain tensors"):
        load_text_encoder(copied, "text_encoder", CLIP)


def test_code_beside_the_weights_is_not_run(copied: Path) -> None:
    folder = copied / "text_encoder_3"
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "T5EncoderModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load_text_encoder(copied, "text_encoder_3", T5)) is T5EncoderModel


@pytest.mark.parametrize("module", ["transformers", "google.protobuf"])
def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    needs = rf"tokenizer_3 of '.*' is a T5Tokenizer, which needs {module}: pip install 'kolors-fast\[text\]'"
    with pytest.raises(ImportError, match=needs):
        load_tokenizer(folder, "tokenizer_3", "T5Tokenizer")
