"""Each saving that PixArt's transformer makes: what it replaces is gone, and the result is the same up to rounding."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kolors_fast
from kolors_fast import PixArtTransformer, savings
from kolors_fast.ops import _attention, _products

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "num_layers": 3,
    "caption_channels": 20,
    "sample_size": 8,
}
LENGTH = 40


@pytest.fixture(autouse=True)
def every_product_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where oneDNN for linear layers and torch's attention (a profile does not see ours) are fastest at any size."""
    monkeypatch.setattr(_attention, "ORDER", {"cpu": ("math",)})
    monkeypatch.setattr(_products, "_for_linear", lambda *_: ("onednn",))
    monkeypatch.setattr(_products, "_for_gelu", lambda *_: ("onednn",))


def pair() -> tuple[PixArtTransformer, nn.Module]:
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(**CONFIG).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.0, 0.3)
    ours = PixArtTransformer(**CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    mask[:, :7] = 1  # few enough to be folded, unlike all
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, LENGTH, 20),
        "timestep": torch.tensor([613, 613]),
        "encoder_attention_mask": mask,
    }


@torch.no_grad()
def calls(model: PixArtTransformer, arguments: dict[str, Any]) -> Counter[str]:
    """How often each of torch's functions runs in the second step of a prompt."""
    model(**arguments)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        model(**arguments)
    masked = [e for e in profiled.events() if e.name == "aten::scaled_dot_product_attention" and len(e.input_shapes[3])]
    return Counter(event.name for event in profiled.events()) + Counter({"attention under a mask": len(masked)})


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# what a saving does away with: torch's function that runs more often without it
REPLACED = {
    "prompt_cache": "mkldnn::_linear_pointwise",
    "prompt_fold": "aten::scaled_dot_product_attention",
    "pad_collapse": "attention under a mask",
    "fused_qkv": "mkldnn::_linear_pointwise",
    "residual_norm": "aten::layer_norm",
    "gelu": "aten::gelu",
    "products": "aten::linear",
}


@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_each_saving_replaces_something_and_changes_nothing_else(name: str) -> None:
    (ours, theirs), arguments = pair(), inputs()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    truth = copy.deepcopy(theirs).double()(**wide).sample
    eager = relative(theirs(**arguments).sample.double(), truth)
    on, with_saving = ours(**arguments).sample, calls(ours, arguments)
    with kolors_fast.without(name):
        without_saving, off = calls(ours, arguments), ours(**arguments).sample
    assert without_saving[REPLACED[name]] > with_saving[REPLACED[name]]
    for result in (on, off):
        assert relative(result.double(), truth) < 2 * eager + 1e-7


@torch.no_grad()
def test_all_savings_off_is_plain_code() -> None:
    (ours, theirs), arguments = pair(), inputs()
    with kolors_fast.without(*savings.SAVINGS):
        assert relative(ours(**arguments).sample, theirs(**arguments).sample) < 2e-6


@torch.no_grad()
def test_what_is_left_of_a_step() -> None:
    """Products of a block: queries, keys and values; output; up, with its GELU; down. Two more read longer prompts."""
    ours, _ = pair()
    folded = calls(ours, inputs())
    with kolors_fast.without("prompt_fold"):
        found = calls(ours, inputs())
    outside = 1 + 2 + 1 + 1  # patches, time, shared modulation, proj_out
    assert folded["mkldnn::_linear_pointwise"] == 3 * 4 + outside
    assert found["mkldnn::_linear_pointwise"] == 3 * 6 + outside
    assert folded["aten::scaled_dot_product_attention"] == 3
    assert found["aten::scaled_dot_product_attention"] == 3 * 2
    for one in (folded, found):
        assert one["aten::layer_norm"] == one["aten::gelu"] == 0
        assert one["aten::addcmul"] == 3  # the one residual that is needed by itself


# ---- torch.compile


@torch.no_grad()
def test_a_compiled_denoiser_keeps_what_is_kept_of_prompts() -> None:
    """After `model.denoise = torch.compile(model.denoise)` no step and no prompt compiles again."""
    (ours, theirs), arguments = pair(), inputs()
    ours(**arguments)  # positions are made at first use
    ours.forget_prompts()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ours.denoise = torch.compile(ours.denoise, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for change in ({}, {"timestep": torch.tensor([3, 3])}, {"encoder_hidden_states": torch.randn(2, LENGTH, 20)}):
        given = {**arguments, **change}
        assert relative(ours(**given).sample, theirs(**given).sample) < 2e-6
    assert counters["stats"]["unique_graphs"] == 1
