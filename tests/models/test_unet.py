"""KolorsUNet against diffusers' UNet2DConditionModel, weights copied by state dict."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_fast.models import layers
from kolors_fast.models.unet import KolorsUNet

# the smallest model of the family: two levels, attention on the lower one
SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
THREE_LEVELS: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (8, 12, 20),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 3, 5),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "three levels": THREE_LEVELS,  # concats 40, 32, 24, 20, 16: groups straddle the seam of 20+12 and 12+8
    "mixed layers": {**THREE_LEVELS, "layers_per_block": (1, 2, 1), "transformer_layers_per_block": 1},
    "nine inputs": {**SMALL, "in_channels": 9, "out_channels": 3, "norm_eps": 1e-4},
    "attention everywhere": {
        **THREE_LEVELS,
        "block_out_channels": (8, 16, 12),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sine first": {**SMALL, "flip_sin_to_cos": False, "freq_shift": 1, "norm_num_groups": 1},
}
KOLORS: dict[str, Any] = {
    **{k: v for k, v in THREE_LEVELS.items() if k.endswith("_types")},
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 5632,
    "use_linear_projection": True,
}


def pair(config: dict[str, Any]) -> tuple[KolorsUNet, diffusers.UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    ours = KolorsUNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(config: dict[str, Any], batch: int = 2, size: tuple[int, int] = (8, 8), text: int = 7) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(batch, config["in_channels"], *size),
        "timestep": 613,
        "encoder_hidden_states": torch.randn(batch, text, config["encoder_hid_dim"]),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, config["encoder_hid_dim"]),
            "time_ids": torch.randint(0, 2048, (batch, 6)).float(),
        },
    }


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


@torch.no_grad()
def assert_same(models: tuple[KolorsUNet, diffusers.UNet2DConditionModel], **arguments: Any) -> None:
    ours, theirs = models
    lists = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}  # theirs pops from lists
    got, want = ours(**arguments).sample, theirs(**lists).sample
    assert_close(got, want)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "size"), [(2, (8, 8)), (3, (7, 10)), (1, (5, 13))])
def test_matches_diffusers(name: str, batch: int, size: tuple[int, int]) -> None:
    assert_same(pair(CONFIGS[name]), **inputs(CONFIGS[name], batch, size))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys_in_order(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.attn_processors) == list(theirs.attn_processors)


@pytest.mark.parametrize(
    "timestep",
    [
        7,
        7.25,
        torch.tensor(991),
        torch.tensor([12.5]),
        torch.tensor([1, 1099]),
        torch.tensor([3.0], dtype=torch.float64),
    ],
    ids=str,
)
def test_timestep_forms(timestep: Any) -> None:
    assert_same(pair(SMALL), **{**inputs(SMALL), "timestep": timestep})


def test_masks() -> None:
    models, arguments = pair(SMALL), inputs(SMALL, batch=3)
    text_mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [0, 0, 0, 0, 0, 0, 1]])
    pixel_mask = (torch.rand(3, 16) > 0.4).long()  # the only attention is on 4x4 pixels
    assert_same(models, **arguments, encoder_attention_mask=text_mask)
    assert_same(models, **arguments, attention_mask=pixel_mask)
    assert_same(models, **arguments, attention_mask=pixel_mask.bool(), encoder_attention_mask=text_mask.bool())


def skip_shapes(config: dict[str, Any], size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of a ControlNet's residuals for the down path of two-layer levels, then of the mid block's."""
    (a, b, c), (h, w) = config["block_out_channels"], size
    h2, w2, h4, w4 = -(-h // 2), -(-w // 2), -(-h // 4), -(-w // 4)
    maps = [(a, h, w)] * 3 + [(a, h2, w2)] + [(b, h2, w2)] * 2 + [(b, h4, w4)] + [(c, h4, w4)] * 3
    return [(2, *shape) for shape in maps]


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_controlnet_residuals(size: tuple[int, int]) -> None:
    models, arguments = pair(THREE_LEVELS), inputs(THREE_LEVELS, size=size)
    *down, mid = [torch.randn(shape) for shape in skip_shapes(THREE_LEVELS, size)]
    assert len(down) == 9
    with_residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_same(models, **arguments, **with_residuals)
    # the mid residual alone does nothing
    assert_same(models, **arguments, mid_block_additional_residual=mid)
    with pytest.raises(ValueError, match="down_block_additional_residuals: expected 9 tensors, got 8"):
        models[0](**arguments, **{**with_residuals, "down_block_additional_residuals": down[:-1]})


@pytest.mark.parametrize("name", ["three levels", "attention everywhere"])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("argument", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
def test_t2i_adapter_residuals(name: str, count: int, argument: str) -> None:
    config = CONFIGS[name]
    # a block with transformers takes its residual before it halves the sides, one without takes it behind
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    sides = [8 if attends[0] else 4, 4 if attends[1] else 2, 2, 2]
    channels = [*config["block_out_channels"], config["block_out_channels"][-1]]
    residuals = [torch.randn(2, c, side, side) for c, side in zip(channels, sides, strict=True)][:count]
    assert_same(pair(config), **inputs(config), **{argument: residuals})
    assert len(residuals) == count


def test_return_forms() -> None:
    ours, _ = pair(SMALL)
    arguments = inputs(SMALL)
    with torch.no_grad():
        output = ours(**arguments)
        plain = ours(**arguments, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1
    assert torch.equal(output.sample, plain[0])
    assert torch.equal(output[0], plain[0])


def gradients(model: nn.Module, arguments: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Of the mean square of the prediction, in sample, text, pooled text and every parameter."""
    model = copy.deepcopy(model).to(dtype)
    sample, text, pooled = (
        value.detach().to(dtype).requires_grad_()
        for value in (
            arguments["sample"],
            arguments["encoder_hidden_states"],
            arguments["added_cond_kwargs"]["text_embeds"],
        )
    )
    added = {"text_embeds": pooled, "time_ids": arguments["added_cond_kwargs"]["time_ids"]}
    model(sample, arguments["timestep"], text, added_cond_kwargs=added).sample.square().mean().backward()
    leaves = [sample, text, pooled, *model.parameters()]
    return [leaf.grad.double() for leaf in leaves]


def worst_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest error of any gradient relative to that gradient's largest value."""
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def test_gradients_match_diffusers() -> None:
    (ours, theirs), arguments = pair(THREE_LEVELS), inputs(THREE_LEVELS, size=(8, 6))
    truth = gradients(theirs, arguments, torch.float64)
    assert worst_error(gradients(ours, arguments, torch.float64), truth) < 1e-9
    theirs_error = worst_error(gradients(theirs, arguments, torch.float32), truth)
    assert worst_error(gradients(ours, arguments, torch.float32), truth) < 2 * theirs_error


def test_collapsed_padding_equals_full_padding() -> None:
    """One pad state with logit bias ln(m) stands for m of them; padding of the shorter text gets -inf."""
    ours, _ = pair(THREE_LEVELS)
    arguments = inputs(THREE_LEVELS, text=256)
    real = [5, 19]
    longest = max(real)
    full = arguments["encoder_hidden_states"]
    collapsed = torch.zeros(2, longest + 1, full.shape[2])
    bias = torch.full((2, longest + 1), -math.inf)
    for row, n in enumerate(real):
        full[row, : 256 - n] = full[row, 0]  # left padding: equal states
        collapsed[row, 0], collapsed[row, 1 : n + 1] = full[row, 0], full[row, 256 - n :]
        bias[row, 0], bias[row, 1 : n + 1] = math.log(256 - n), 0.0
    with torch.no_grad():
        want = ours(**arguments).sample
        got = ours(**{**arguments, "encoder_hidden_states": collapsed}, encoder_key_bias=bias).sample
        unbiased = ours(**{**arguments, "encoder_hidden_states": collapsed}).sample
    assert_close(got, want, rtol=2e-6)
    assert (unbiased - want).abs().max() > 1e-3 * want.abs().max()


def test_key_bias_adds_to_the_text_mask() -> None:
    """ln(3) on the first key is that key three times."""
    ours, theirs = pair(SMALL)
    arguments = inputs(SMALL)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1] * 7])
    bias = torch.tensor([[math.log(3), 0, 0, 0, 0, 0, 0]]).expand(2, 7)
    text = arguments["encoder_hidden_states"]
    tripled = {**arguments, "encoder_hidden_states": torch.cat([text[:, :1], text[:, :1], text], dim=1)}
    with torch.no_grad():
        got = ours(**arguments, encoder_attention_mask=mask, encoder_key_bias=bias).sample
        want = theirs(**tripled, encoder_attention_mask=torch.cat([mask[:, :1]] * 2 + [mask], dim=1)).sample
    assert_close(got, want)


class CatWatch(TorchDispatchMode):
    """Counts concatenations of feature maps outside the fused op."""

    def __init__(self) -> None:
        super().__init__()
        self.inside_op = False
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default and args[0][0].dim() == 4 and not self.inside_op:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_cats(model: KolorsUNet, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    watch, op = CatWatch(), layers.group_norm_silu

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        watch.inside_op = True
        try:
            return op(*args, **kwargs)
        finally:
            watch.inside_op = False

    with monkeypatch.context() as patch, torch.no_grad(), watch:
        patch.setattr(layers, "group_norm_silu", watched)
        model(**arguments)
    return watch.count


def test_the_skip_concat_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(THREE_LEVELS)
    arguments = inputs(THREE_LEVELS)
    assert count_cats(ours, arguments, monkeypatch) == 0
    # the watch does see one where a wrapped shortcut needs it
    block = ours.up_blocks[0].resnets[0]
    block.conv_shortcut = Strengthened(block.conv_shortcut)
    assert count_cats(ours, arguments, monkeypatch) == 1


def test_maps_and_weights_are_channels_last(tmp_path: Path) -> None:
    _, theirs = pair(THREE_LEVELS)
    theirs.save_pretrained(tmp_path)
    ours = KolorsUNet.from_pretrained(tmp_path)
    layouts: list[bool] = []
    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last), name
            module.register_forward_hook(
                lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        ours(**inputs(THREE_LEVELS))
    assert layouts
    assert all(layouts)


def test_folders_travel_both_ways(tmp_path: Path) -> None:
    _, theirs = pair(THREE_LEVELS)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = KolorsUNet.from_pretrained(tmp_path / "theirs")
    assert loaded.config.block_out_channels == [8, 12, 20]
    loaded.save_pretrained(tmp_path / "ours")
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").eval()
    assert_same((loaded, theirs), **inputs(THREE_LEVELS))
    assert_same((loaded, back), **inputs(THREE_LEVELS))
    assert dict(back.config)["projection_class_embeddings_input_dim"] == 46


class Strengthened(nn.Module):
    """A wrapped layer, as LoRA injects it, with PEFT's way of scaling: base(x) + strength * delta(x)."""

    active_adapters = ("default",)

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.delta = type(base)(
            *(
                (base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding)
                if isinstance(base, nn.Conv2d)
                else (base.in_features, base.out_features)
            )
        )
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.strength * self.delta(x)

    def scale_layer(self, scale: float) -> None:
        self.strength *= scale

    def unscale_layer(self, scale: float) -> None:
        self.strength /= scale

    def set_scale(self, adapter: str, scale: float) -> None:
        assert adapter == "default"
        self.strength = scale


RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
TRANSFORMER = ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
WRAPPED = (*RESNET, *TRANSFORMER, ".conv", "linear_1", "conv_in", "conv_out", "encoder_hid_proj")


def wrap(model: nn.Module) -> list[Strengthened]:
    torch.manual_seed(2)
    wrapped = []
    for name, module in list(model.named_modules()):
        if name.endswith(WRAPPED):
            parent, _, leaf = name.rpartition(".")
            wrapped.append(Strengthened(module))
            setattr(model.get_submodule(parent), leaf, wrapped[-1])
    return wrapped


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_injected_layers_are_honoured_and_scaled(scale: float) -> None:
    ours, theirs = pair(SMALL)
    arguments = inputs(SMALL)
    with torch.no_grad():
        before = ours(**arguments).sample
        injected = wrap(ours)
        assert len(injected) > 50
        for layer in wrap(theirs):
            layer.strength = scale
        given = {"scale": scale}
        got = ours(**arguments, cross_attention_kwargs=given).sample
        assert_close(got, theirs(**arguments).sample)
        assert given == {"scale": scale}
        assert {layer.strength for layer in injected} == {1.0}
        moved = (got - before).abs().max() / before.abs().max()
        assert moved < 1e-5 if scale == 0 else moved > 1e-2


def test_strength_is_restored_after_an_error() -> None:
    ours, _ = pair(SMALL)
    injected = wrap(ours)
    with pytest.raises(ValueError, match="time_ids"):
        ours(
            **{**inputs(SMALL), "added_cond_kwargs": {"text_embeds": torch.zeros(2, 10)}},
            cross_attention_kwargs={"scale": 0.5},
        )
    assert {layer.strength for layer in injected} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.zeros(2)}, "class_labels: expected None"),
        ({"timestep_cond": torch.zeros(2, 8)}, "timestep_cond: expected None"),
        ({"timestep": torch.zeros(3)}, "timestep: expected 1 or 2 numbers, got 3"),
        ({"added_cond_kwargs": None}, "added_cond_kwargs: expected text_embeds and time_ids, got no text_embeds"),
        ({"cross_attention_kwargs": {"gligen": 1}}, r"expected no key but 'scale', got \['gligen'\]"),
        ({"encoder_attention_mask": torch.ones(2, 6)}, r"one value for each of 7 keys, got shape \[2, 6\]"),
        ({"encoder_key_bias": torch.ones(2, 8)}, r"one value for each of 7 keys, got shape \[2, 8\]"),
        ({"attention_mask": torch.ones(2, 64)}, r"one value for each of 16 keys, got shape \[2, 64\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    ours, _ = pair(SMALL)
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs(SMALL), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": False}, "use_linear_projection: expected True, .* got False"),
        ({"addition_embed_type": "text"}, "addition_embed_type: expected 'text_time', .* got 'text'"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim: expected None, .* got 256"),
        ({"resnet_out_scale_factor": 1.4}, r"resnet_out_scale_factor: expected 1.0, .* got 1.4"),
        ({"some_new_switch": True}, "some_new_switch: expected None, .* got True"),
        ({"encoder_hid_dim": None}, "encoder_hid_dim: expected a positive number, got None"),
        ({"attention_head_dim": (1, 3)}, "attention_head_dim: expected a divisor of 16 channels, got 3"),
        ({"layers_per_block": (1, 1, 1)}, "layers_per_block: expected a positive number or 2 of them"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, "down_block_types: expected 2 of DownBlock2D, "),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types: expected 2 of UpBlock2D, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_outside_the_family_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KolorsUNet(**{**SMALL, **change})


def test_attention_processors() -> None:
    from diffusers.models import attention_processor

    ours, _ = pair(SMALL)
    ours.set_attn_processor(attention_processor.AttnProcessor2_0())
    ours.set_attn_processor(ours.attn_processors)
    foreign = attention_processor.PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(ValueError, match=r"set_attn_processor: .* got PAGIdentitySelfAttnProcessor2_0"):
        ours.set_attn_processor(foreign)
    one_foreign = {**ours.attn_processors, "mid_block.attentions.0.transformer_blocks.0.attn1.processor": foreign}
    with pytest.raises(ValueError, match="set_attn_processor: mid_block"):
        ours.set_attn_processor(one_foreign)


def test_kolors_parameter_counts() -> None:
    with torch.device("meta"):
        ours, theirs = KolorsUNet(), diffusers.UNet2DConditionModel(**KOLORS)
        nine = KolorsUNet(in_channels=9)
    assert sum(p.numel() for p in ours.parameters()) == 2_579_458_820
    assert sum(p.numel() for p in nine.parameters()) == 2_579_473_220
    assert len(ours.state_dict()) == 1682
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert len(ours.attn_processors) == 140
    assert ours.add_embedding.linear_1.in_features == 5632
    for key, value in theirs.config.items():
        if not key.startswith("_") and key != "sample_size":
            mine = ours.config[key]
            assert (list(mine) == list(value)) if isinstance(value, (list, tuple)) else mine == value, key


def test_compiles_whole() -> None:
    ours, _ = pair(THREE_LEVELS)
    arguments = {**inputs(THREE_LEVELS), "timestep": torch.tensor(613)}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**arguments).sample, ours(**arguments).sample, rtol=1e-6)
