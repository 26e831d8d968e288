"""The autoencoder by strips against its undivided self, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kolors_fast import AutoencoderKL
from kolors_fast.models import autoencoder_kl_tiles
from kolors_fast.models.autoencoder_kl_memory import decode_peak_bytes
from kolors_fast.models.autoencoder_kl_tiles import Moments

CONFIGS: dict[str, dict[str, Any]] = {
    "like Kolors'": {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 4},
    "odd groups": {"block_out_channels": (6, 9), "norm_num_groups": 3, "in_channels": 1, "out_channels": 2},
    "one level": {"block_out_channels": (4,), "norm_num_groups": 2},
    "bare": {
        "block_out_channels": (4, 4, 8),
        "norm_num_groups": 1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}


def build(name: str) -> AutoencoderKL:
    torch.manual_seed(0)
    config = CONFIGS[name]
    levels = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    model = AutoencoderKL(**types, **config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            nn.init.normal_(parameter, 1.0 if "norm" in parameter_name and "weight" in parameter_name else 0.0, 0.3)
    return model


def images(model: AutoencoderKL, height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.config.in_channels, height, width, dtype=model.dtype)


def latents(model: AutoencoderKL, height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.config.latent_channels, height, width, dtype=model.dtype)


def relative(error: Tensor, truth: Tensor) -> float:
    return (error.abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("elements", [1, 1000, 1 << 22])  # strips of one row, of several, and a map whole
@torch.no_grad()
def test_strips_give_the_undivided_result(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, so that 1e-12 leaves no room for tiles of other moments; and float32."""
    monkeypatch.setattr(autoencoder_kl_tiles, "STRIP_ELEMENTS", elements)
    monkeypatch.setattr(autoencoder_kl_tiles, "QUERIES", 7)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = build(name).to(dtype)
        z, x = latents(model, 5, 3), images(model, 37, 26)
        model.disable_tiling()
        image, moments = model.decode(z).sample, model.encode(x).latent_dist.parameters
        model.enable_tiling()
        tiled_image, tiled_moments = model.decode(z).sample, model.encode(x).latent_dist.parameters
        for tiled, whole in ((tiled_image, image), (tiled_moments, moments)):
            assert tiled.stride() == whole.stride()
            assert tiled.dtype == whole.dtype
            assert relative(tiled - whole, whole) < bound


@torch.no_grad()
def test_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beside the borders of strips are no further from float64 than other rows."""
    model = build("like Kolors'")
    z = latents(model, 16, 12)
    truth = model.double().decode(z.double()).sample
    model.float().enable_tiling()
    rows = 16
    monkeypatch.setattr(autoencoder_kl_tiles, "STRIP_ELEMENTS", rows * 2 * 12 * 8 * 8)  # of 8 channels, at full size
    error = (model.decode(z).sample - truth).square().mean(dim=(0, 1, 3))  # [128]
    beside = torch.zeros(128, dtype=torch.bool)
    beside[rows - 1 : -1 : rows] = beside[rows:-1:rows] = True
    assert beside.sum() == 14
    assert error[beside].mean() < 1.2 * error[~beside].mean()


@torch.no_grad()
def test_slicing_gives_what_single_items_give() -> None:
    model = build("like Kolors'")
    z, x = latents(model, 6, 5, batch=3), images(model, 48, 40, batch=3)
    for tiling in (False, True):
        model.enable_tiling(tiling)
        model.enable_slicing()
        image, moments = model.decode(z).sample, model.encode(x).latent_dist.parameters
        model.disable_slicing()
        assert torch.equal(image, torch.cat([model.decode(one).sample for one in z.split(1)]))
        assert torch.equal(moments, torch.cat([model.encode(one).latent_dist.parameters for one in x.split(1)]))
        whole = model.decode(z).sample
        assert relative(image - whole, whole) < 1e-5


def test_slicing_decodes_one_item_at_a_time() -> None:
    model, batches = build("bare"), []
    model.decoder.register_forward_hook(lambda _, args, __: batches.append(args[0].shape[0]))
    model.enable_slicing()
    model.decode(latents(model, 3, 3, batch=3))
    assert batches == [1, 1, 1]


def test_gradients_come_from_the_undivided_pass() -> None:
    model = build("bare")
    model.enable_tiling()
    z = latents(model, 3, 3).requires_grad_()
    model.decode(z).sample.sum().backward()
    assert z.grad is not None
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    model.requires_grad_(False)
    assert model.decode(z).sample.requires_grad
    assert not model.decode(z.detach()).sample.requires_grad


def test_moments_of_strips_are_those_of_the_whole() -> None:
    """A mean 1000 times the deviation, where sums of squares in float32 would lose everything."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 37, 5) + 1000 * torch.randn(2, 2, 1, 1).repeat_interleave(3, dim=1)
    first, *rest = (Moments.of(strip, 2) for strip in x.split([1, 20, 16], dim=2))
    for moments in rest:
        first = first.merged(moments)
    grouped = x.double().unflatten(1, (2, 3)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    torch.testing.assert_close(first.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close((first.squares / first.elements).double(), variance, rtol=1e-4, atol=0)


def peak_bytes(model: AutoencoderKL, z: Tensor) -> int:
    model.decode(z)  # the first call loads kernels
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = model.decode(z)
    del result
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # a CPU's float16 convolutions unfold their input
@torch.no_grad()
def test_peak_stays_under_the_bound(
    dtype: torch.dtype, batch: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 256, 192
    monkeypatch.setattr(autoencoder_kl_tiles, "STRIP_ELEMENTS", height * width)  # an eighth of the largest map
    model = build("like Kolors'").to(dtype)
    model.enable_tiling(tiled)
    peak = peak_bytes(model, latents(model, height // 8, width // 8, batch))
    bound = decode_peak_bytes(model.config, height, width, dtype, tiled=tiled, batch_size=batch)
    assert peak <= bound < 1.3 * peak


def test_bound_of_kolors() -> None:
    """Two maps of 128 channels in place of six."""
    config = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "out_channels": 3}
    for side in (1024, 2048):
        full_map = 128 * side * side * 2
        tiled = decode_peak_bytes(config, side, side, torch.bfloat16, tiled=True)
        whole = decode_peak_bytes(config, side, side, torch.bfloat16)
        assert 2 * full_map < tiled < 2.25 * full_map
        assert 6 * full_map < whole < 6.1 * full_map
