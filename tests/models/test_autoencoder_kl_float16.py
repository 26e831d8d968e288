"""AutoencoderKL in float16 where its maps leave float16's range, against float64."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from kolors_fast import AutoencoderKL, ChatGLM, ChatGLMTokenizer
from kolors_fast.assets import bundled
from kolors_fast.models.autoencoder_kl_layers import StreamNorm
from kolors_fast.models.layers import ResnetBlock

CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
SHAPES = {"decode": (2, 4, 12, 10), "encode": (2, 3, 48, 40)}


def state_with_gain(gain: float) -> dict[str, Tensor]:
    """Random weights in float16, those inside residual blocks `gain` times as large."""
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        if name.endswith(("conv1.weight", "conv2.weight")):
            parameter.data *= gain
    state = {name: value.half() for name, value in model.state_dict().items()}
    assert all(value.isfinite().all() for value in state.values())
    return state


def built(kind: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    model = kind(**CONFIG).eval().to(dtype)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def run(model: Any, direction: str, x: Tensor) -> Tensor:
    x = x.to(model.dtype)
    return model.decode(x).sample if direction == "decode" else model.encode(x).latent_dist.parameters


def error(y: Tensor, truth: Tensor) -> float:
    """Relative, root mean square."""
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("direction", SHAPES)
def test_maps_of_1e6(direction: str, tiled: bool) -> None:
    """Rounding is relative: ours is as far from float64 as diffusers' model is in the same dtype where everything fits.

    Not quite, for other weights round otherwise: 1.5 times.
    """
    x = torch.randn(SHAPES[direction], generator=torch.Generator().manual_seed(1)).half()
    small, large = state_with_gain(1), state_with_gain(3e5)
    model, reached = built(AutoencoderKL, large, torch.float64), [0.0]
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            module.register_forward_hook(lambda _, __, y: reached.append(y.abs().max().item()))
    truth, small_truth = run(model, direction, x), run(built(AutoencoderKL, small, torch.float64), direction, x)
    assert 1e6 < max(reached) < 4e6
    assert not run(built(diffusers.AutoencoderKL, large, torch.float16), direction, x).isfinite().all()

    for dtype in (torch.float16, torch.bfloat16):
        bound = 1.5 * error(run(built(diffusers.AutoencoderKL, small, dtype), direction, x), small_truth)
        for state, expected in ((small, small_truth), (large, truth)):
            ours = built(AutoencoderKL, state, dtype)
            ours.enable_tiling(tiled)
            y = run(ours, direction, x)
            assert y.dtype == dtype
            assert error(y, expected) < bound


def test_scaling_does_not_change_what_eps_does() -> None:
    """Maps of a variance near eps, 1e-6."""
    torch.manual_seed(0)
    norm, x = StreamNorm(2, 4), 1e-3 * torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(norm(x / 64, scale=1 / 64), norm(x))


def test_shapes_without_data() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(**CONFIG).half()
        assert model.decode(torch.empty(2, 4, 3, 5, dtype=torch.float16)).sample.shape == (2, 3, 12, 20)


def test_autocast_to_float16() -> None:
    x = torch.randn(SHAPES["decode"])
    ours = built(AutoencoderKL, state_with_gain(3e5), torch.float32)
    with torch.autocast("cpu", torch.float16):
        y = run(ours, "decode", x)
    assert error(y, run(ours.double(), "decode", x)) < 1e-2


def test_parameters_keep_their_values_and_edits_are_seen() -> None:
    state = state_with_gain(1)
    ours, x = built(AutoencoderKL, state, torch.float16), torch.randn(SHAPES["decode"])
    run(ours, "decode", x)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    for name in ("decoder.conv_in.weight", "decoder.up_blocks.1.resnets.0.conv2.bias"):
        ours.get_parameter(name).data.mul_(2)  # not even the version counter tells of this
        state[name] = state[name] * 2
    assert torch.equal(run(ours, "decode", x), run(built(AutoencoderKL, state, torch.float16), "decode", x))


def test_gradients_are_those_of_float64() -> None:
    state, x = state_with_gain(1), torch.randn(SHAPES["decode"])
    ours, truth = built(AutoencoderKL, state, torch.float16), built(AutoencoderKL, state, torch.float64)
    weight = torch.randn(2, 3, 48, 40)
    for model in (ours, truth):
        (model.decode(x.to(model.dtype)).sample * weight.to(model.dtype)).sum().backward()
    for name in ("decoder.conv_in.weight", "decoder.mid_block.attentions.0.to_v.weight", "decoder.conv_out.bias"):
        assert error(ours.get_parameter(name).grad, truth.get_parameter(name).grad) < 1e-2, name


class Adapted(nn.Module):
    """A layer with a low-rank update beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.update = nn.Conv2d(layer.in_channels, layer.out_channels, 1, stride=layer.stride, bias=False).half()

    def forward(self, x: Tensor) -> Tensor:
        # the update's 1x1 sees the middle of what the layer's window sees
        inner = x if self.layer.padding[0] or self.layer.kernel_size[0] == 1 else x[..., 1:-1, 1:-1]
        return self.layer(x) + self.update(inner)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("direction", SHAPES)
def test_wrapped_layers(direction: str, tiled: bool) -> None:
    """LoRA layers stand around convolutions; their maps of 1e6 fit as well."""
    ours = built(AutoencoderKL, state_with_gain(3e5), torch.float16)
    ours.enable_tiling(tiled)
    torch.manual_seed(0)
    for name, module in list(ours.named_modules()):
        if isinstance(module, nn.Conv2d) and "quant_conv" not in name:
            parent, _, child = name.rpartition(".")
            setattr(ours.get_submodule(parent), child, Adapted(module))
    x = torch.randn(SHAPES[direction]).half()
    y = run(ours, direction, x)
    assert error(y, run(ours.double(), direction, x)) < 5e-3


@pytest.mark.parametrize("tiled", [False, True])
def test_layers_offloaded_one_by_one(tiled: bool) -> None:
    """Weights that are there only while their module runs."""
    state, x = state_with_gain(1), torch.randn(SHAPES["decode"]).half()
    ours, truth = (built(AutoencoderKL, state, dtype) for dtype in (torch.float16, torch.float64))
    ours.enable_tiling(tiled)
    expected, there = run(truth, "decode", x), run(ours, "decode", x)
    cpu_offload(ours, torch.device("cpu"))
    assert ours.decoder.conv_out.weight.is_meta
    with torch.no_grad():
        assert error(ours.decode(x).sample, expected) < 1.5 * error(there, expected)


def test_diffusers_pipeline_casts_it_to_float32_and_back() -> None:
    """`force_upcast` stays True in the config for diffusers, whose pipelines then do as they always did."""
    folder = bundled("kolors-tiny")
    half: dict[str, Any] = {"torch_dtype": torch.float16}
    pipeline = diffusers.KolorsPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", **half),
        text_encoder=ChatGLM.from_pretrained(folder, subfolder="text_encoder", **half),
        tokenizer=ChatGLMTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **half),
        scheduler=diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    before = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
    dtypes: list[torch.dtype] = []
    pipeline.vae.decoder.register_forward_hook(lambda _, args, __: dtypes.append(args[0].dtype))
    image = pipeline("红色圆形", num_inference_steps=1, output_type="pt").images
    assert pipeline.vae.config.force_upcast is True
    assert dtypes == [torch.float32]
    assert image.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in pipeline.vae.state_dict().items())
