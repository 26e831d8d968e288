"""Each saving that the UNet makes: what it replaces is gone, and the result is the same up to rounding."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kolors_fast
from kolors_fast import KolorsUNet, savings
from kolors_fast.models import layers
from kolors_fast.ops import _attention, _products

from . import test_mmdit_savings, test_pixart_savings

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 24,
    "encoder_hid_dim": 20,
    "norm_num_groups": 8,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 20,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
REAL = (7, 3)  # tokens of the two prompts


@pytest.fixture(autouse=True)
def every_product_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where oneDNN for linear layers and torch's attention (a profile does not see ours), Winograd's convolution,
    and four small convolutions in the place of one, are fastest at any size."""
    monkeypatch.setattr(_attention, "ORDER", {"cpu": ("math",)})
    monkeypatch.setattr(_products, "_for_linear", lambda *_: ("onednn",))
    monkeypatch.setattr(
        _products, "_for_conv2d",
        lambda x, w, *steps: ("winograd",) * (w[2:] == (3, 3) and steps == (1, 1, 1, 1)) + ("packed",),
    )  # fmt: skip
    monkeypatch.setattr(layers, "PHASES_FROM", 0)


def pair() -> tuple[KolorsUNet, diffusers.UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**CONFIG).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    ours = KolorsUNet(**CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(length: int = 32) -> dict[str, Any]:
    torch.manual_seed(1)
    text = torch.randn(2, length, 20)
    for row, real in enumerate(REAL):
        text[row, : length - real] = text[row, 0]  # equal pads on the left
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 613,
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 20), "time_ids": torch.randint(0, 2048, (2, 6)).float()},
    }


def calls(model: KolorsUNet, arguments: dict[str, Any]) -> Counter[str]:
    """How often each of torch's functions runs in the second step of a prompt."""
    with torch.no_grad():
        model(**arguments)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            model(**arguments)
    maps = [e for e in profiled.events() if e.input_shapes and len(e.input_shapes[0]) == 4]
    return Counter(event.name for event in profiled.events()) + Counter(f"{event.name} of maps" for event in maps)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# what a saving does away with: torch's function that runs more often without it
REPLACED = {
    "prompt_cache": "mkldnn::_linear_pointwise",
    "prompt_fold": "aten::scaled_dot_product_attention",
    "pad_collapse": "aten::scaled_dot_product_attention",  # too many keys to fold
    "fused_qkv": "mkldnn::_linear_pointwise",
    "channel_add": "aten::add of maps",
    "skip_concat": "aten::cat",
    "residual_norm": "aten::layer_norm",
    "geglu": "aten::gelu",
    "upsample_phases": "aten::upsample_nearest2d",
    "products": "aten::mkldnn_convolution",
    "winograd": "mkldnn::_convolution_pointwise",
    "channels_last": "aten::clone",  # tokens are a transposed copy
}


@pytest.mark.parametrize("name", REPLACED)
def test_each_saving_replaces_something_and_changes_nothing_else(name: str) -> None:
    (ours, theirs), arguments = pair(), inputs(length=80)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(
            **{**arguments, "sample": arguments["sample"].double(),
               "encoder_hidden_states": arguments["encoder_hidden_states"].double(),
               "added_cond_kwargs": {k: v.double() for k, v in arguments["added_cond_kwargs"].items()}}
        ).sample  # fmt: skip
        eager = relative(theirs(**arguments).sample.double(), truth)
        on = ours(**arguments).sample
    with_saving = calls(ours, arguments)
    with kolors_fast.without(name):
        without_saving = calls(ours, arguments)
        with torch.no_grad():
            off = ours(**arguments).sample
    assert without_saving[REPLACED[name]] > with_saving[REPLACED[name]]
    for result in (on, off):
        assert relative(result.double(), truth) < 2 * eager + 1e-7


def test_all_savings_off_is_plain_code() -> None:
    (ours, theirs), arguments = pair(), inputs()
    with kolors_fast.without(*savings.SAVINGS), torch.no_grad():
        assert relative(ours(**arguments).sample, theirs(**arguments).sample) < 2e-6
        assert ours.conv_in.weight.is_contiguous()
    with torch.no_grad():
        ours(**arguments)
    assert ours.conv_in.weight.is_contiguous(memory_format=torch.channels_last)  # stored anew


def test_names_are_checked_and_blocks_end() -> None:
    with pytest.raises(ValueError, match=r"without: expected names of prompt_cache, .*, got 'fusedqkv'"):
        kolors_fast.without("fusedqkv")
    with kolors_fast.without("geglu"):
        with kolors_fast.without("products"):
            assert savings.switched_off() == {"geglu", "products"}
        assert savings.switched_off() == {"geglu"}
    assert not savings.switched_off()


# ---- upsampling by phases


@pytest.mark.parametrize("shape", [(2, 5, 4, 7), (1, 8, 1, 1), (3, 6, 3, 2)])
def test_upsampling_by_phases(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = layers.Upsample(shape[1]).eval()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got = layer(x)
        assert got.is_contiguous(memory_format=torch.channels_last)
        wide = torch.nn.functional.interpolate(x.double(), scale_factor=2, mode="nearest")
        truth = torch.nn.functional.conv2d(wide, layer.conv.weight.double(), layer.conv.bias.double(), padding=1)
        assert relative(got.double(), truth) < 1e-6
        layer.conv.weight.mul_(2)  # derived weights are made anew
        truth = torch.nn.functional.conv2d(wide, layer.conv.weight.double(), layer.conv.bias.double(), padding=1)
        assert relative(layer(x).double(), truth) < 1e-6


def test_upsampling_by_phases_only_where_it_is_exact() -> None:
    layer = layers.Upsample(4)
    x = torch.randn(1, 4, 3, 3)
    assert not layers.upsamples_by_phases(layer.conv, x)  # gradients
    with torch.no_grad():
        assert layers.upsamples_by_phases(layer.conv, x)
        assert not layers.upsamples_by_phases(layer.conv, x.bfloat16())  # sums of weights would be rounded
        layer.conv.register_forward_hook(lambda *_: None)
        assert not layers.upsamples_by_phases(layer.conv, x)
        assert layer(x, (5, 6)).shape == (1, 4, 5, 6)  # another size is no doubling


# ---- one weight for queries, keys and values


def qkv(model: KolorsUNet) -> Any:
    return model.mid_block.attentions[0].transformer_blocks[0].attn1


def lie_together(model: KolorsUNet) -> bool:
    attention = qkv(model)
    return attention.to_k.weight.data_ptr() == attention.to_q.weight.data_ptr() + attention.to_q.weight.nbytes


@torch.no_grad()
def test_joined_weights_are_views_and_follow_every_edit(tmp_path: Any) -> None:
    (ours, theirs), arguments = pair(), inputs()
    before = list(ours.state_dict())
    ours(**arguments)
    assert lie_together(ours)
    attention, other = qkv(ours), theirs.mid_block.attentions[0].transformer_blocks[0].attn1

    def same() -> bool:
        return relative(ours(**arguments).sample, theirs(**arguments).sample) < 2e-6

    for edit in (
        lambda a: a.to_k.weight.mul_(1.5),
        lambda a: a.to_v.weight.data.neg_(),  # which no version counts
        lambda a: setattr(a.to_q, "weight", torch.nn.Parameter(a.to_q.weight * 2)),
        lambda a: a.load_state_dict({k: v * 0.5 for k, v in a.state_dict().items()}),
        lambda a: a.load_state_dict({k: v * 1.5 for k, v in a.state_dict().items()}, assign=True),
    ):
        edit(attention)
        edit(other)
        assert same()
        assert lie_together(ours)
    assert list(ours.state_dict()) == before
    ours.save_pretrained(tmp_path)
    loaded = KolorsUNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(**arguments).sample, ours(**arguments).sample)
    apart = copy.deepcopy(ours)
    qkv(apart).to_q.weight.zero_()
    assert same()  # the copy shares nothing
    assert not torch.equal(apart(**arguments).sample, ours(**arguments).sample)
    ours.double()
    assert not lie_together(ours) or qkv(ours)._joined.weight is None


def test_training_leaves_the_weights_where_they_are() -> None:
    ours, _ = pair()
    arguments = inputs()
    address = qkv(ours).to_q.weight.data_ptr()
    ours(**arguments).sample.sum().backward()
    ours.train()
    with torch.no_grad():
        ours(**arguments)
    assert qkv(ours).to_q.weight.data_ptr() == address
    assert not lie_together(ours)


# ---- torch.compile


@torch.no_grad()
def test_a_compiled_denoiser_keeps_what_is_kept_of_prompts() -> None:
    """After `unet.denoise = torch.compile(unet.denoise)` no step and no prompt compiles again."""
    (ours, theirs), arguments = pair(), inputs()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ours.denoise = torch.compile(ours.denoise, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for change in ({}, {"timestep": 3}, inputs(length=40)):
        given = {**arguments, **change}
        assert relative(ours(**given).sample, theirs(**given).sample) < 2e-6
    assert counters["stats"]["unique_graphs"] == 1
    assert len(ours._prompts._entries) == 1 + 1  # the last text is another


def test_every_saving_is_held_to_plain_code() -> None:
    """Here or in the tests of other models; `step_table` is one of runs, in tests/pipelines/test_savings.py."""
    tested = {*REPLACED, *test_mmdit_savings.REPLACED, *test_pixart_savings.REPLACED, "step_table"}
    assert tested == set(savings.SAVINGS)
