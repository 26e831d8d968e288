"""AutoencoderKL against diffusers' class, weights copied by state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kolors_fast.models.autoencoder_kl import AutoencoderKL, DiagonalGaussianDistribution

KOLORS: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
# five levels and eight latent channels; uneven widths; three groups; no optional parts
CONFIGS: dict[str, dict[str, Any]] = {
    "five levels": {"block_out_channels": (4, 8, 8, 12, 8), "latent_channels": 8, "norm_num_groups": 4},
    "two layers": {"block_out_channels": (8, 16, 8), "layers_per_block": 2, "norm_num_groups": 2},
    "odd groups": {"block_out_channels": (6, 9), "norm_num_groups": 3, "in_channels": 1, "out_channels": 2},
    "bare": {
        "block_out_channels": (4, 4),
        "norm_num_groups": 1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}


def with_types(config: dict[str, Any]) -> dict[str, Any]:
    levels = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return {**types, **config}


def pair(config: dict[str, Any]) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**with_types(config)).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    ours = AutoencoderKL(**with_types(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 48), (33, 19)])
def test_encode_and_decode_match_diffusers(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(CONFIGS[name])
    image = torch.randn(2, ours.config.in_channels, *size)
    with torch.no_grad():
        got, want = ours.encode(image).latent_dist, theirs.encode(image).latent_dist
        assert_close(got.parameters, want.parameters)
        z = torch.randn_like(want.mean)
        assert_close(ours.decode(z).sample, theirs.decode(z).sample)
        assert_close(ours(image).sample, theirs(image).sample)
        assert torch.equal(ours.decode(z, return_dict=False)[0], ours.decode(z).sample)
        assert torch.equal(ours.encode(image, return_dict=False)[0].mode(), ours.encode(image)[0].mean)


def test_forward_with_a_sampled_posterior_follows_the_generator() -> None:
    ours, theirs = pair(CONFIGS["two layers"])
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        got = ours(image, sample_posterior=True, generator=torch.manual_seed(3)).sample
        want = theirs(image, sample_posterior=True, generator=torch.manual_seed(3)).sample
    assert_close(got, want)


def test_distribution_matches_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs

    moments = torch.randn(2, 6, 5, 4) * 2
    moments[0, 3, 0, 0], moments[0, 4, 0, 0] = -100.0, 100.0  # outside [-30, 20]
    got, want = DiagonalGaussianDistribution(moments), Theirs(moments)
    assert got.logvar.min() == -30
    assert got.logvar.max() == 20
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.mode(), want.mode())
    assert torch.equal(got.sample(torch.manual_seed(1)), want.sample(torch.manual_seed(1)))
    torch.testing.assert_close(got.kl(), want.kl())
    other = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(got.kl(DiagonalGaussianDistribution(other)), want.kl(Theirs(other)), rtol=1e-5, atol=0)
    still = DiagonalGaussianDistribution(moments, deterministic=True)
    assert torch.equal(still.sample(), still.mode())
    assert still.kl() == 0


def test_one_generator_per_item_draws_what_single_items_draw() -> None:
    moments = torch.randn(2, 6, 5, 4)
    seeds = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    both = DiagonalGaussianDistribution(moments).sample(seeds)
    alone = [
        DiagonalGaussianDistribution(moments[i : i + 1]).sample(torch.Generator().manual_seed(7 + i)) for i in range(2)
    ]
    assert torch.equal(both, torch.cat(alone))
    with pytest.raises(ValueError, match="generator: expected one per item, 2, got 1"):
        DiagonalGaussianDistribution(moments).sample(seeds[:1])


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys_in_order(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_kolors_parameter_count() -> None:
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**with_types(KOLORS)), diffusers.AutoencoderKL(**with_types(KOLORS))
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert sum(p.numel() for p in ours.encoder.parameters()) == 34_163_592
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.config.force_upcast is True
    assert ours.config.scaling_factor == 0.13025


def test_old_attention_names_load(tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS["two layers"])
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in theirs.state_dict().items():
        for new_name, old_name in new_to_old.items():
            key = key.replace(new_name, old_name)
        old[key] = value
    assert any(".query." in key for key in old)
    theirs.save_config(tmp_path)
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_match_diffusers() -> None:
    ours, theirs = pair(CONFIGS["two layers"])
    image = torch.randn(2, 3, 12, 16)
    for model in (ours, theirs):
        posterior = model.encode(image).latent_dist
        z = posterior.sample(torch.manual_seed(5))
        (model.decode(z).sample.square().mean() + 1e-3 * posterior.kl().mean()).backward()
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert got.grad is not None, name
        if name.endswith("to_k.bias"):  # softmax ignores it: its true gradient is zero
            assert got.grad.abs().max() < 1e-6
            continue
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5 * want.grad.abs().max().item(), msg=name)


def test_maps_stay_channels_last() -> None:
    ours, _ = pair(CONFIGS["two layers"])
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    layouts: list[bool] = []
    for module in ours.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    ours.decode(torch.randn(1, 4, 5, 6))
    assert layouts
    assert all(layouts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn: expected 'silu', got 'relu'"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types: expected 3 times"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) * 3}, "up_block_types: expected 3 times"),
    ],
)
def test_unsupported_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**{**with_types(CONFIGS["two layers"]), **change})
