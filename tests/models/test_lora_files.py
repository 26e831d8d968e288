"""LoRA files: what we write diffusers reads, what diffusers, PEFT and kohya's trainer write we read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kolors_fast import KolorsUNet, MMDiT, PixArtTransformer
from kolors_fast.models import lora_files
from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.models.lora_adapter import inject_lora, load_lora, save_lora
from kolors_fast.models.lora_files import LoRA, lora_layers, lora_shapes, read_lora, write_lora

FORMATS = ("diffusers", "peft", "kohya")
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
    "use_linear_projection": True,
}
MMDIT: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# our class, diffusers', the config, and the ends of the paths of adapted layers
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any], tuple[str, ...]]] = {
    "unet": (
        KolorsUNet,
        diffusers.UNet2DConditionModel,
        UNET,
        (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"),
    ),
    "mmdit": (
        MMDiT,
        diffusers.SD3Transformer2DModel,
        MMDIT,
        (*ATTENTION, "add_q_proj", "to_add_out", "ff_context.net.2", "norm1.linear", "context_embedder"),
    ),
    "pixart": (
        PixArtTransformer,
        diffusers.PixArtTransformer2DModel,
        PIXART,
        (*ATTENTION, "ff.net.0.proj", "linear_1", "pos_embed.proj", "proj_out"),
    ),
}


def pair(name: str) -> tuple[Any, Any]:
    kind, other, config, _ = MODELS[name]
    torch.manual_seed(0)
    theirs = other(**config).eval()
    ours = kind(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 10)
    if name == "unet":
        added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randint(0, 2048, (2, 6)).float()}
        return {"sample": latents, "timestep": 613, "encoder_hidden_states": text, "added_cond_kwargs": added}
    shared = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([30, 990])}
    if name == "mmdit":
        return {**shared, "pooled_projections": torch.randn(2, 7)}
    return {**shared, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def adapter(model: nn.Module, name: str, alpha: float = 5.0, dtype: torch.dtype = torch.float32) -> dict[str, LoRA]:
    """Random weights of rank 3 for the layers of MODELS."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for path, layer in lora_layers(model).items():
        if any(path == end or path.endswith(f".{end}") for end in MODELS[name][3]):
            down, up = (0.3 * torch.randn(s, generator=generator).to(dtype) for s in lora_shapes(layer, 3))
            found[path] = LoRA(down, up, alpha)
    return found


def uneven(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The same with ranks and alphas that differ between layers."""
    found = adapter(model, name)
    for i, (path, lora) in enumerate(found.items()):
        rank = 1 + i % 3
        found[path] = LoRA(lora.down[:rank], lora.up[:, :rank], (0.7, 3.0)[i // 2 % 2])
    return found


def pipeline(name: str, model: nn.Module) -> Any:
    """One of diffusers with nothing but the model."""
    if name == "unet":
        return diffusers.KolorsPipeline(None, None, None, model, diffusers.EulerDiscreteScheduler())
    return diffusers.StableDiffusion3Pipeline(model, None, None, *[None] * 6)


@torch.no_grad()
def assert_same(name: str, ours: nn.Module, theirs: nn.Module) -> None:
    arguments, plain = inputs(name), pair(name)[0]
    got, want = ours(**arguments).sample, theirs(**arguments).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got - plain(**arguments).sample).abs().max() > 1e-2 * want.abs().max()


def assert_equal(got: dict[str, LoRA], want: dict[str, LoRA]) -> None:
    assert set(got) == set(want)
    for path, lora in want.items():
        assert got[path].alpha == lora.alpha
        assert torch.equal(got[path].down, lora.down)
        assert torch.equal(got[path].up, lora.up)
        assert got[path].down.dtype == lora.down.dtype


# ---- diffusers reads what we write


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_diffusers_models_load_what_we_save(name: str, format: str, tmp_path: Path) -> None:
    (ours, theirs), file = pair(name), tmp_path / "lora.safetensors"
    write_lora(file, uneven(ours, name), ours, format)
    inject_lora(ours, uneven(ours, name))
    prefix = "unet" if name == "unet" else "transformer"
    theirs.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix=prefix)  # by its path alone, without alpha
    assert_same(name, ours, theirs)


def test_peft_loads_what_we_save(tmp_path: Path) -> None:
    """diffusers has no LoRA for PixArt, whose own training scripts use PEFT."""
    (ours, theirs), file = pair("pixart"), tmp_path / "lora.safetensors"
    write_lora(file, adapter(ours, "pixart"), ours, "peft")
    inject_lora(ours, adapter(ours, "pixart"))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(MODELS["pixart"][3]))
    peft.inject_adapter_in_model(config, theirs)
    state = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    assert_same("pixart", ours, theirs)


@pytest.mark.parametrize(
    ("name", "format"), [*(("unet", format) for format in FORMATS), ("mmdit", "diffusers"), ("mmdit", "peft")]
)
def test_diffusers_pipelines_load_what_we_save(name: str, format: str, tmp_path: Path) -> None:
    """Kohya's keys through diffusers' converter."""
    (ours, theirs), file = pair(name), tmp_path / "lora.safetensors"
    write_lora(file, adapter(ours, name), ours, format)
    inject_lora(ours, adapter(ours, name))
    pipeline(name, theirs).load_lora_weights(str(tmp_path), weight_name=file.name)
    assert_same(name, ours, theirs)


def test_metadata(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    for format in FORMATS:
        write_lora(file, adapter(ours, "unet"), ours, format, base_model="Kwai-Kolors/Kolors-diffusers")
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        assert metadata["base_model"] == "Kwai-Kolors/Kolors-diffusers"
        assert (metadata["rank"], metadata["alpha"]) == ("3", "5.0")
        assert ("ss_network_dim" in metadata) == (format == "kohya")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_keys_are_those_of_the_formats(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    path = "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0"
    lora = adapter(ours, "unet")[path]
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_out_0"
    for format, keys in {
        "diffusers": {f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight"},
        "peft": {f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"},
        "kohya": {f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"},
    }.items():
        write_lora(file, {path: lora}, ours, format)
        assert set(load_file(file)) == keys


# ---- we read what others write


def with_peft(name: str, model: nn.Module) -> None:
    """An adapter of diffusers, with other ranks and alphas in some layers."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(MODELS[name][3]),
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_out.0": 7, r"transformer_blocks\.1\..*\.to_k": 4},
        init_lora_weights=False,
    )
    model.add_adapter(config)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_loads_what_diffusers_models_save(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    with_peft(name, theirs)
    theirs.save_lora_adapter(tmp_path)
    load_lora(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(name, ours, theirs)


@pytest.mark.parametrize("keys", ["peft", "diffusers"])
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_loads_what_diffusers_pipelines_save(name: str, keys: str, tmp_path: Path) -> None:
    """As its training scripts do."""
    ours, theirs = pair(name)
    with_peft(name, theirs)
    state, config = peft.get_peft_model_state_dict(theirs), theirs.peft_config["default"].to_dict()
    if keys == "diffusers":
        state = convert_state_dict_to_diffusers(state)
    component = "unet" if name == "unet" else "transformer"
    arguments = {f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": config}
    type(pipeline(name, theirs)).save_lora_weights(tmp_path, **arguments)
    load_lora(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(name, ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_loads_what_peft_saves(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ATTENTION), init_lora_weights=False)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path)
    load_lora(ours, tmp_path / "adapter_model.safetensors")
    assert_same(name, ours, theirs)


def test_alpha_is_the_rank_where_nothing_tells_it(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    for format in FORMATS:
        write_lora(file, adapter(ours, "unet"), ours, format)
        save_file({key: value for key, value in load_file(file).items() if not key.endswith(".alpha")}, file)
        assert {lora.alpha for lora in read_lora(file, ours).values()} == {3.0}


def test_original_names_are_those_that_diffusers_knows(tmp_path: Path) -> None:
    """Kohya's trainer has SDXL's UNet with the names of its first code."""
    (ours, theirs), file = pair("unet"), tmp_path / "lora.safetensors"
    want = adapter(ours, "unet")
    blocks = lora_files._original_blocks(ours)
    tensors: dict[str, Tensor] = {}
    for path, lora in want.items():
        name = "lora_unet_" + lora_files._original_name(path, blocks).replace(".", "_")
        assert re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_\d+_", name)
        parts = {"lora_down.weight": lora.down, "lora_up.weight": lora.up, "alpha": torch.tensor(lora.alpha)}
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(tensors, file)
    assert_equal(read_lora(file, ours), want)
    load_lora(ours, file)
    pipe = diffusers.StableDiffusionXLPipeline(*[None] * 5, theirs, diffusers.EulerDiscreteScheduler())
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)  # which diffusers' KolorsPipeline cannot
    assert_same("unet", ours, theirs)


@pytest.mark.parametrize("kind", [KolorsUNet, MMDiT, PixArtTransformer])
def test_no_two_layers_share_a_name(kind: type[Any]) -> None:
    model = kind.empty({})
    names, layers = lora_files._names(model), lora_layers(model)
    component = lora_files.component_of(model)
    blocks = lora_files._original_blocks(model) if kind is KolorsUNet else {}
    for path in layers:
        original = lora_files._original_name(path, blocks)
        flat = [f"lora_{component}_{one.replace('.', '_')}" for one in (path, original)]
        assert {names[name] for name in (path, f"{component}.{path}", *flat)} == {path}
    assert set(names.values()) == set(layers)


def test_names_of_a_resnet_and_of_samplers() -> None:
    """Against diffusers' converter, whole, for those that it maps without a pipeline."""
    ours, _ = pair("unet")
    blocks = lora_files._original_blocks(ours)
    keys = {}
    for path in lora_layers(ours):
        original = lora_files._original_name(path, blocks)
        if original != path and "embed" not in path:
            keys[f"lora_unet_{original.replace('.', '_')}.lora_down.weight"] = path
    state = {key: torch.tensor(i) for i, key in enumerate(keys)}
    state |= {key.replace("down.weight", "up.weight"): value for key, value in state.items()}
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(state, ours.config)
    found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    paths = list(keys.values())
    places = {"_lora.down.weight": "", ".lora.down.weight": "", "to_out": "to_out.0", ".processor": ""}
    for key, value in found.items():
        if ".up." in key:
            continue
        for old, new in places.items():
            key = key.replace(old, new)
        assert key == f"unet.{paths[int(value)]}"
    assert len(found) == 2 * len(paths)


# ---- exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours, file = pair(name)[0], tmp_path / "lora.safetensors"
    want = adapter(ours, name, alpha=3.7, dtype=dtype) if dtype is not torch.float32 else uneven(ours, name)
    got = want
    for format in (*FORMATS, *FORMATS[::-1]):
        write_lora(file, got, ours, format)
        got = read_lora(file, ours)
        assert_equal(got, want)
        assert list(got) == list(want)


def test_a_model_gives_the_file_back(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    want = uneven(ours, "unet")
    write_lora(file, want, ours)
    load_lora(ours, file)
    for format in FORMATS:
        save_lora(ours, file, format)
        assert_equal(read_lora(file, pair("unet")[0]), want)


# ---- refusals


PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "unknown": (
        lambda t: t.update({"unet.mid_block.x.lora_A.weight": torch.zeros(1, 1)}),
        "expected LoRA weights of linear layers and convolutions of KolorsUNet, got 'unet.mid_block.x.lora_A.weight'",
    ),
    "of the text encoder": (
        lambda t: t.update({f"text_encoder.{i}.q_proj.lora_A.weight": torch.zeros(1, 1) for i in (0, 1)}),
        "got 'text_encoder.0.q_proj.lora_A.weight' and 1 more",
    ),
    "DoRA": (lambda t: t.update({f"unet.{PATH}.lora_magnitude_vector": torch.zeros(1)}), "lora_magnitude_vector'"),
    "half": (lambda t: t.pop(f"unet.{PATH}.lora_B.weight"), f"lacks the 'up' of layer '{PATH}'"),
    "shape": (
        lambda t: t.update({f"unet.{PATH}.lora_B.weight": torch.zeros(16, 2)}),
        f"down and up of layer '{PATH}': expected shapes ((3, 16), (16, 3)), got ((3, 16), (16, 2))",
    ),
    "scalar": (lambda t: t.update({f"unet.{PATH}.lora_A.weight": torch.tensor(1.0)}), "got ((), (16, 3))"),
    "alpha": (lambda t: t.update({f"unet.{PATH}.alpha": torch.zeros(2)}), "expected one number, got shape (2,)"),
    "twice": (
        lambda t: t.update({f"{PATH}.lora.down.weight": torch.zeros(3, 16)}),
        f"holds the 'down' of layer '{PATH}' twice",
    ),
    "empty": (lambda t: t.clear(), "got nothing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    write_lora(file, adapter(ours, "unet"), ours, "peft")
    tensors = load_file(file)
    act, message = CHANGES[change]
    act(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_lora(ours, file)
    assert not any(hasattr(layer, "lora_A") for layer in ours.modules())


def test_other_adapters_and_broken_files_are_refused(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    write_lora(file, adapter(ours, "unet"), ours)
    tensors = load_file(file)
    for metadata, message in {
        json.dumps({"unet.use_rslora": True}): "expected a plain LoRA adapter, got one with use_rslora",
        json.dumps({"use_dora": True}): "expected a plain LoRA adapter, got one with use_dora",
        "[1]": "expected a JSON object",
        "{": "expected a JSON object",
    }.items():
        save_file(tensors, file, {"lora_adapter_metadata": metadata})
        with pytest.raises(CheckpointError, match=message):
            read_lora(file, ours)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_lora(file, ours)
    with pytest.raises(CheckpointError, match=r"the file .* is missing"):
        read_lora(tmp_path / "other.safetensors", ours)


def test_bad_arguments(tmp_path: Path) -> None:
    ours, file = pair("unet")[0], tmp_path / "lora.safetensors"
    with pytest.raises(ValueError, match=r"format: expected one of \['diffusers', 'peft', 'kohya'\], got 'a1111'"):
        write_lora(file, adapter(ours, "unet"), ours, "a1111")
    with pytest.raises(ValueError, match="adapter: expected one layer or more, got none"):
        write_lora(file, {}, ours)
    assert not file.exists()
