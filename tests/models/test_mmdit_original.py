"""Files in Stability's own layout against diffusers' converter, and both ways bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolors_fast import KolorsUNet, MMDiT
from kolors_fast.models import mmdit_original
from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.models.mmdit_original import PREFIX, config_of, from_original, to_original

SMALL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "joint_attention_dim": 10,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "norms": {**SMALL, "attention_head_dim": 12, "num_attention_heads": 3, "caption_projection_dim": 36,
              "qk_norm": "rms_norm"},
    "dual and norms": {**SMALL, "qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
    "one block": {**SMALL, "num_layers": 1, "patch_size": 1},
}  # fmt: skip


def make(name: str) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(**CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_converts_as_diffusers_does(name: str) -> None:
    state = make(name).state_dict()
    original = to_original(state)
    assert_equal(from_original(original), state)
    assert_equal(to_original(from_original(original)), original)
    given = {f"{PREFIX}{key}": value for key, value in original.items()}
    assert_equal(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(given), state)


def test_keys_are_those_of_the_released_files() -> None:
    """Of a block amid the others, of the last one, and outside of both."""
    original = to_original(make("dual and norms").state_dict())
    names = {key.removesuffix(".weight") for key in original if not key.endswith("bias")}
    first = {key.removeprefix("joint_blocks.0.") for key in names if key.startswith("joint_blocks.0.")}
    last = {key.removeprefix("joint_blocks.2.") for key in names if key.startswith("joint_blocks.2.")}
    attention = {"qkv", "proj", "ln_q", "ln_k"}
    assert first == {
        *(f"x_block.attn.{k}" for k in attention), *(f"x_block.attn2.{k}" for k in attention),
        *(f"context_block.attn.{k}" for k in attention),
        *(f"{b}.{k}" for b in ("x_block", "context_block") for k in ("adaLN_modulation.1", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert first - last == {"context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2"}
    assert {key for key in names if not key.startswith("joint_blocks.")} == {
        "pos_embed", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2",
        "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1",
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_read_off_the_shapes(name: str) -> None:
    model = make(name)
    found = MMDiT(**config_of(to_original(model.state_dict()), "file"))
    assert dict(found.config) == {**model.config, "dual_attention_layers": tuple(model.config.dual_attention_layers)}


def test_released_sizes_are_recognised() -> None:
    config = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
              "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}  # fmt: skip
    with torch.device("meta"):
        original = to_original(MMDiT(**config).state_dict())
    assert MMDiT.empty(config_of(original, "file")).config == MMDiT.empty(config).config


# ---- files


def with_others(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beside an autoencoder and text encoders."""
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.ones(3),
        "text_encoders.clip_l.logit_scale": torch.ones(1),
    }
    return {**others, **state}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_files_travel_both_ways(name: str, tmp_path: Path) -> None:
    model, file = make(name), tmp_path / "model.safetensors"
    model.save_single_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(key.startswith(PREFIX) for key in load_file(file))
    loaded = MMDiT.from_single_file(file)
    assert not loaded.training
    assert_equal(loaded.state_dict(), model.state_dict())
    theirs = diffusers.SD3Transformer2DModel(**CONFIGS[name]).eval()
    theirs.load_state_dict(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(load_file(file)))
    arguments = (torch.randn(2, 4, 6, 8), torch.randn(2, 5, 10), torch.randn(2, 7), torch.tensor([3.0, 900.0]))
    for parameter in [*loaded.parameters(), *theirs.parameters()]:
        parameter.mul_(0.1)
    got, want = loaded(*arguments).sample, theirs(*arguments).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert loaded.to(torch.float16).dtype == torch.float16
    assert_equal(MMDiT.from_single_file(file).state_dict(), model.state_dict())  # the file is not what was edited


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = make("plain"), tmp_path / "model.safetensors"
    model.save_single_file(file)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(mmdit_original.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        model.double().save_single_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_other_models_in_a_file_are_left_alone(suffix: str, prefix: str, tmp_path: Path) -> None:
    model, file = make("plain"), tmp_path / f"model{suffix}"
    state = with_others({f"{prefix}{k}": v for k, v in to_original(model.state_dict()).items()})
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if suffix == ".ckpt" else state, file)
    assert_equal(MMDiT.from_single_file(file).state_dict(), model.state_dict())


def test_weights_are_cast_where_asked(tmp_path: Path) -> None:
    model, file = make("norms"), tmp_path / "model.safetensors"
    model.half().save_single_file(file)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert_equal(MMDiT.from_single_file(file, torch_dtype=torch.float16).state_dict(), model.state_dict())
    wide = MMDiT.from_single_file(file)
    assert_equal(wide.state_dict(), {k: v.float() for k, v in model.state_dict().items()})
    on_meta = MMDiT.from_single_file(file, device="meta", torch_dtype=torch.bfloat16)
    assert {(v.device.type, v.dtype) for v in on_meta.state_dict().values()} == {("meta", torch.bfloat16)}


@torch.no_grad()
def test_loaded_projections_are_one_product_without_a_copy(tmp_path: Path) -> None:
    """Rows of q, k and v follow each other in the file, and so in memory."""
    make("plain").save_single_file(tmp_path / "model.safetensors")
    loaded = MMDiT.from_single_file(tmp_path / "model.safetensors")
    attention = loaded.transformer_blocks[0].attn
    address = attention.to_q.weight.data_ptr()
    loaded(torch.randn(1, 4, 6, 8), torch.randn(1, 5, 10), torch.randn(1, 7), 3)
    assert attention._joined.weight.data_ptr() == address == attention.to_q.weight.data_ptr()


# ---- errors


def unet() -> dict[str, Tensor]:
    config = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": 1,
              "attention_head_dim": 2, "norm_num_groups": 4}  # fmt: skip
    return KolorsUNet(**config).state_dict()


def pixart() -> dict[str, Tensor]:
    return {
        "x_embedder.proj.weight": torch.zeros(8, 4, 2, 2),
        "blocks.0.cross_attn.kv_linear.weight": torch.zeros(8, 8),
    }


def without(key: str) -> dict[str, Tensor]:
    state = to_original(make("norms").state_dict())
    del state[key]
    return state


def changed(**values: Tensor) -> dict[str, Tensor]:
    return {**to_original(make("norms").state_dict()), **{k.replace("__", "."): v for k, v in values.items()}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (unet, "is no MM-DiT in Stability's layout: it lacks 'pos_embed' and holds 'add_embedding.linear_1.bias'"),
        (
            pixart,
            "is no MM-DiT in Stability's layout: it lacks 'pos_embed' and holds 'blocks.0.cross_attn.kv_linear.weight'",
        ),
        (lambda: make("norms").state_dict(), "lacks 'pos_embed' and holds 'context_embedder.bias'"),
        (dict, "lacks 'pos_embed' and holds nothing"),
        (
            lambda: without("joint_blocks.1.context_block.attn.qkv.bias"),
            "lack 'joint_blocks.1.context_block.attn.qkv.bias', which MMDiT needs",
        ),
        (
            lambda: {k: v for k, v in changed().items() if not k.startswith("joint_blocks.2.")},  # cut off
            r"hold 'joint_blocks.1.context_block.attn.proj.bias', .* unknown to MMDiT",
        ),
        (lambda: changed(lora=torch.zeros(1)), "hold 'lora', unknown to MMDiT"),
        (
            lambda: changed(context_embedder__bias=torch.zeros(5)),
            r"do not fit .* context_embedder.bias \(expected \(36,\), got \(5,\)\)",
        ),
        (
            lambda: {k: v for k, v in changed().items() if "ln_" not in k},
            "is no MM-DiT of heads of 64, for its width is 36",
        ),
    ],
    ids=["unet", "pixart", "diffusers", "nothing", "missing", "cut off", "unexpected", "shape", "heads"],
)
def test_files_of_other_models_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in state().items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        MMDiT.from_single_file(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file .* is missing"),
        (b"", "is truncated or not a file of plain tensors"),
        ([torch.ones(1)], "must hold a dict of tensors, by itself or under state_dict"),
        ({"state_dict": {"a": 1}}, "must hold a dict of tensors, by itself or under state_dict"),
        ({"a": Evil()}, "is truncated or not a file of plain tensors"),
    ],
    ids=["missing", "empty", "list", "numbers", "pickle"],
)
def test_broken_files_are_refused(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        MMDiT.from_single_file(file)
    assert not (tmp_path / "evil").exists()


def test_heads_that_a_file_would_not_tell_are_not_written(tmp_path: Path) -> None:
    model = MMDiT(**{**SMALL, "attention_head_dim": 16, "num_attention_heads": 4})
    with pytest.raises(ValueError, match="attention_head_dim: expected 64, for such a file does not tell it, got 16"):
        model.save_single_file(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
