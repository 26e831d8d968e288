"""PixArtTransformer against diffusers' PixArtTransformer2DModel, weights copied by state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kolors_fast import PixArtTransformer

SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "sizes by sample size": {**SMALL, "sample_size": 128, "num_layers": 3},
    "sizes, half the scale": {
        **SMALL, "sample_size": 16, "use_additional_conditions": True, "interpolation_scale": 0.5,
        "num_attention_heads": 4, "attention_head_dim": 9, "cross_attention_dim": 36,
    },
    "no sizes, twice the scale": {**SMALL, "sample_size": 128, "use_additional_conditions": False},
    "no learned variance": {**SMALL, "in_channels": 3, "out_channels": None, "interpolation_scale": 1},
    "large patches": {**SMALL, "patch_size": 4, "num_attention_heads": 1, "attention_head_dim": 24},
    "captions unprojected": {**SMALL, "caption_channels": None, "cross_attention_dim": 10, "patch_size": 1},
}  # fmt: skip
KEPT = (1, 5, 3)  # tokens of the captions
LENGTH = 7


def pair(config: dict[str, Any]) -> tuple[PixArtTransformer, diffusers.PixArtTransformer2DModel]:
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(**config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.0, 0.3)
    ours = PixArtTransformer(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(config: dict[str, Any], batch: int = 2, size: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    torch.manual_seed(1)
    width = config["caption_channels"] or config["cross_attention_dim"]
    return {
        "hidden_states": torch.randn(batch, config.get("in_channels", 4), *size),
        "encoder_hidden_states": torch.randn(batch, LENGTH, width),
        "timestep": torch.full((batch,), 613),
        "added_cond_kwargs": {
            "resolution": torch.randint(256, 2048, (batch, 2)).float(),
            "aspect_ratio": torch.rand(batch, 1) + 0.5,
        },
    }


def text_mask(batch: int) -> Tensor:
    """The first tokens of each caption, and of the third one not the first."""
    mask = torch.zeros(batch, LENGTH, dtype=torch.long)
    for row, count in enumerate(KEPT[:batch]):
        mask[row, row // 2 : row // 2 + count] = 1
    return mask


MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda batch: None,
    "numbers": text_mask,
    "bool": lambda batch: text_mask(batch).bool(),
    "bias": lambda batch: (1 - text_mask(batch)[:, None].float()) * -10000.0,
    "finite bias": lambda batch: torch.linspace(-2, 1, batch * LENGTH).view(batch, 1, LENGTH),
    "every token": lambda batch: torch.ones(batch, LENGTH),
}


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def assert_same(models: tuple[PixArtTransformer, nn.Module], **arguments: Any) -> None:
    ours, theirs = models
    assert relative(ours(**arguments).sample, theirs(**arguments).sample) < 2e-6


# ---- the forward pass


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (3, (16, 4)), (2, (12, 20))])
def test_matches_diffusers(name: str, batch: int, size: tuple[int, int]) -> None:
    models, arguments = pair(CONFIGS[name]), inputs(CONFIGS[name], batch, size)
    assert_same(models, **arguments)
    assert_same(models, **arguments, encoder_attention_mask=text_mask(batch))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys_in_order(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.attn_processors) == list(theirs.attn_processors)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_text_masks(mask: str, batch: int) -> None:
    assert_same(pair(SMALL), **inputs(SMALL, batch), encoder_attention_mask=MASKS[mask](batch))


def test_patch_masks() -> None:
    models, arguments = pair(SMALL), inputs(SMALL)
    mask = (torch.rand(2, 24) > 0.4).long()
    assert_same(models, **arguments, attention_mask=mask)
    assert_same(models, **arguments, attention_mask=(1 - mask[:, None].float()) * -10000.0)
    assert_same(models, **arguments, attention_mask=mask.bool().float(), encoder_attention_mask=text_mask(2))


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep", [7, 7.25, torch.tensor(991), torch.tensor([3.0]).double(), torch.tensor([12.5, 0])]
)
def test_timestep_forms(timestep: Any) -> None:
    """diffusers takes a tensor of one number a sample only."""
    (ours, theirs), arguments = pair(SMALL), inputs(SMALL)
    want = theirs(**{**arguments, "timestep": torch.as_tensor(timestep).expand(2)}).sample
    assert relative(ours(**{**arguments, "timestep": timestep}).sample, want) < 2e-6


def test_sizes_count() -> None:
    config = CONFIGS["sizes, half the scale"]
    (ours, _), arguments = pair(config), inputs(config)
    with torch.no_grad():
        before = ours(**arguments).sample
        arguments["added_cond_kwargs"] = {**arguments["added_cond_kwargs"], "aspect_ratio": torch.tensor([1.5, 0.7])}
        assert relative(ours(**arguments).sample, before) > 1e-3  # and [B] is taken like [B, 1]


def test_return_forms() -> None:
    (ours, _), arguments = pair(SMALL), inputs(SMALL)
    with torch.no_grad():
        output, plain = ours(**arguments), ours(**arguments, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1
    assert torch.equal(output.sample, plain[0])
    assert torch.equal(output[0], plain[0])


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
def test_a_caption_without_tokens_adds_the_bias_of_the_output(grad: bool) -> None:
    """As if its keys had values of zero; with gradients no mask is read by the host."""
    (ours, _), arguments = pair(SMALL), inputs(SMALL)
    mask = torch.tensor([[0] * LENGTH, [1, 1, 0, 0, 0, 0, 1]])
    with torch.set_grad_enabled(grad):
        got = ours(**arguments, encoder_attention_mask=mask).sample
        bias = (1 - mask[:, None].float()) * -10000.0
        assert torch.equal(ours(**arguments, encoder_attention_mask=bias).sample, got)
        whole = ours(**arguments, encoder_attention_mask=torch.tensor([[1] * LENGTH, mask[1].tolist()])).sample
    assert got.isfinite().all()
    assert relative(got[1], whole[1]) < 1e-6
    assert relative(got[0], whole[0]) > 1e-3

    def without_attention(block: Any) -> None:
        block.attn2.to_out[0].weight.zero_()

    blind = copy.deepcopy(ours)
    for block in blind.transformer_blocks:
        without_attention(block)
    assert relative(got[0], blind(**arguments).sample[0]) < 1e-6


def gradients(model: nn.Module, arguments: dict[str, Any], dtype: torch.dtype, mask: Tensor) -> list[Tensor]:
    """Of the mean square of the prediction, in latent, captions and every parameter."""
    model = copy.deepcopy(model).to(dtype)
    sample, text = (
        arguments[k].detach().to(dtype).requires_grad_() for k in ("hidden_states", "encoder_hidden_states")
    )
    given = {**arguments, "hidden_states": sample, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    model(**given).sample.square().mean().backward()
    return [leaf.grad.double() for leaf in (sample, text, *model.parameters())]


def worst_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest error of any gradient relative to that gradient's largest value; keys' biases have none at all."""
    largest = max(float(w.abs().max()) for w in want)
    return max(
        ((g - w).abs().max() / w.abs().max().clamp(min=1e-6 * largest)).item() for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_match_diffusers(checkpointing: bool) -> None:
    config = CONFIGS["sizes, half the scale"]
    (ours, theirs), arguments = pair(config), inputs(config, batch=3)
    if checkpointing:
        ours.enable_gradient_checkpointing()
    truth = gradients(theirs, arguments, torch.float64, text_mask(3))
    assert worst_error(gradients(ours, arguments, torch.float64, text_mask(3)), truth) < 1e-8
    theirs_error = worst_error(gradients(theirs, arguments, torch.float32, text_mask(3)), truth)
    assert worst_error(gradients(ours, arguments, torch.float32, text_mask(3)), truth) < 2 * theirs_error


def test_checkpointing_keeps_one_tensor_of_each_block() -> None:
    ours, _ = pair({**SMALL, "num_layers": 6})
    arguments = inputs(SMALL)

    def kept() -> int:
        packed: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t, lambda t: t):
            ours(**arguments)
        return sum(packed)

    everything = kept()
    ours.enable_gradient_checkpointing()
    assert kept() < everything / 3
    ours.disable_gradient_checkpointing()
    assert kept() == everything


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "sizes, half the scale"])
def test_bfloat16_is_not_worse_than_diffusers(name: str) -> None:
    ours, theirs = pair({**CONFIGS[name], "num_layers": 6})
    for model in (ours, theirs):
        model.bfloat16()
    mask = text_mask(2)

    def given(dtype: torch.dtype) -> dict[str, Any]:
        arguments = inputs(CONFIGS[name], size=(16, 16))
        arguments.update({k: arguments[k].bfloat16().to(dtype) for k in ("hidden_states", "encoder_hidden_states")})
        return {**arguments, "encoder_attention_mask": mask}

    truth = copy.deepcopy(theirs).double()(**given(torch.float64)).sample

    def error(model: nn.Module) -> float:
        return float((model(**given(torch.bfloat16)).sample.double() - truth).square().mean().sqrt())

    assert error(ours) <= error(theirs)
