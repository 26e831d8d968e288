"""Adapters in a model: what they compute, their dtype, and merging them into weights from which others are derived."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kolors_fast
from kolors_fast import KolorsUNet, savings
from kolors_fast.models.layers import Linear
from kolors_fast.models.lora_adapter import inject_lora, load_lora, lora_of, merge_lora, save_lora
from kolors_fast.models.lora_files import LoRA, lora_layers, lora_shapes

pytestmark = pytest.mark.usefixtures("every_product_of_ours")  # whose packed weights follow every edit too

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
}
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def make() -> KolorsUNet:
    torch.manual_seed(0)
    return KolorsUNet(**CONFIG).eval()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(2, 10).to(dtype), "time_ids": torch.randint(0, 2048, (2, 6)).float()}
    return {
        "sample": torch.randn(2, 4, 8, 8).to(dtype),
        "timestep": 613,
        "encoder_hidden_states": torch.randn(2, 5, 10).to(dtype),
        "added_cond_kwargs": added,
    }


def adapter(model: nn.Module, rank: int = 2) -> dict[str, LoRA]:
    """For every layer there is."""
    generator, found = torch.Generator().manual_seed(2), {}
    for path, layer in lora_layers(model).items():
        down, up = (0.2 * torch.randn(shape, generator=generator) for shape in lora_shapes(layer, rank))
        found[path] = LoRA(down, up, 3.0)
    return found


def delta(lora: LoRA) -> Tensor:
    """(alpha / rank) up down in float64, a convolution's too: its up has one pixel."""
    product = lora.up.double().flatten(1) @ lora.down.double().flatten(1)
    return lora.alpha / lora.rank * product.view(len(lora.up), *lora.down.shape[1:])


@torch.no_grad()
def test_every_layer_computes_the_sum_of_both(tmp_path: Path) -> None:
    model, want = make(), make()
    loras = adapter(model)
    inject_lora(model, loras)
    for path, lora in loras.items():
        layer = want.get_submodule(path)
        layer.weight.add_(delta(lora))
    got, expected = model(**inputs()).sample, want(**inputs()).sample
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (got - make()(**inputs()).sample).abs().max() > 0.1 * expected.abs().max()
    half = model(**inputs(), cross_attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(half, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_merging_changes_nothing_but_the_layers(dtype: torch.dtype) -> None:
    """Queries, keys and values are joined before the adapter comes and after it has gone."""
    model, arguments = make().to(dtype), inputs(dtype)
    keys, attention = list(model.state_dict()), model.mid_block.attentions[0].transformer_blocks[0].attn1
    plain = model(**arguments).sample
    joined = attention._joined.weight
    assert joined is not None
    inject_lora(model, adapter(model), dtype)
    before = model(**arguments).sample
    merge_lora(model)
    with kolors_fast.without(*savings.SAVINGS):
        slow = model(**arguments).sample
    after = model(**arguments).sample
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * before.abs().max()
    assert (after - before).abs().max() <= tolerance
    assert (after - slow).abs().max() <= tolerance
    assert (after - plain).abs().max() > 0.1 * before.abs().max()
    assert torch.equal(attention._joined.weight[:16], attention.to_q.weight)
    assert list(model.state_dict()) == keys
    assert type(attention.to_q) is Linear
    assert not hasattr(model, "peft_config")
    inject_lora(model, adapter(model), dtype)  # another one fits


@torch.no_grad()
def test_merging_is_an_edit_that_is_counted() -> None:
    """What is derived of a weight on a GPU looks at its version alone."""
    model = make()
    layers = lora_layers(model)
    versions = {path: layer.weight._version for path, layer in layers.items()}
    inject_lora(model, adapter(model))
    merge_lora(model)
    assert all(lora_layers(model)[path] is layer for path, layer in layers.items())
    assert all(layer.weight._version > versions[path] for path, layer in layers.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_weights_of_16_bit_have_adapters_of_32(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    loras, plain = adapter(model), copy.deepcopy(model)
    parameters = inject_lora(model, loras)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert model(**inputs(dtype)).sample.dtype == dtype
    merge_lora(model)
    for path, layer in lora_layers(model).items():
        before, added = plain.get_submodule(path).weight.double(), delta(loras[path])
        assert layer.weight.dtype == dtype
        info = torch.finfo(dtype)
        once = info.eps / 2 * (before + added).abs().clamp(min=info.smallest_normal)
        in_fp32 = 2**-22 * (before.abs() + added.abs())  # of the sum, before it is rounded
        assert ((layer.weight.double() - before - added).abs() <= once + in_fp32).all()
    narrow = make().to(dtype)
    assert {parameter.dtype for parameter in inject_lora(narrow, loras, dtype)} == {dtype}


def test_an_adapter_keeps_its_own_copy_and_the_layers_mode() -> None:
    model = make()
    loras = adapter(model)
    model.mid_block.train()
    inject_lora(model, loras)
    assert model.get_submodule(TO_Q).training
    assert not model.get_submodule(TO_Q.replace("mid_block", "down_blocks.1")).training
    with torch.no_grad():
        lora_of(model)[TO_Q].down.add_(1)
    assert not torch.equal(lora_of(model)[TO_Q].down, loras[TO_Q].down)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{part}.default.weight" for path in loras for part in "AB"
    }


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = make(), tmp_path / "lora.safetensors"
    loras = adapter(model)
    with pytest.raises(ValueError, match="expected a KolorsUNet with LoRA layers, got one without"):
        save_lora(model, file)
    with pytest.raises(ValueError, match="adapter: expected one layer or more, got none"):
        inject_lora(model, {})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # importing it now raises
        with pytest.raises(ImportError, match=r"LoRA layers need PEFT: pip install 'kolors-fast\[train\]'"):
            inject_lora(model, loras)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, loras)
    for act in (lambda: inject_lora(model, loras), lambda: load_lora(model, file)):
        with pytest.raises(ValueError, match="expected a KolorsUNet without LoRA layers, got one with them"):
            act()
    model.get_submodule(TO_Q).set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"to_q: expected the strength alpha / rank = 1.5, got 0.75"):
        save_lora(model, file)
    assert not file.exists()
