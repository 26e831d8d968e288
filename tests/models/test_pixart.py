"""PixArtTransformer against diffusers' PixArtTransformer2DModel, weights copied by state dict."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kolors_fast import PixArtTransformer
from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.models.dit_layers import position_table

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


def test_autocast_trains() -> None:
    (ours, theirs), arguments = pair({**SMALL, "num_layers": 6}), inputs(SMALL, size=(16, 16))
    ours.train().enable_gradient_checkpointing()
    mask = text_mask(2)
    truth = copy.deepcopy(theirs).double()
    wide = {k: arguments[k].double() for k in ("hidden_states", "encoder_hidden_states")}
    with torch.no_grad():
        want = truth(**{**arguments, **wide}, encoder_attention_mask=mask).sample
    with torch.autocast("cpu", torch.bfloat16):
        got, other = (model(**arguments, encoder_attention_mask=mask).sample.double() for model in (ours, theirs))
        got.square().mean().backward()
    assert (got - want).square().mean() <= 1.1 * (other - want).square().mean()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


# ---- positions


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (16, 2)])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_positions_are_diffusers(grid: tuple[int, int], scale: float) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    want = get_2d_sincos_pos_embed(24, grid, base_size=4, interpolation_scale=scale, output_type="pt").float()
    assert (position_table(24, grid, base_size=4, scale=scale) - want).abs().max() < 1e-6


def test_positions_are_made_once_and_never_stored(tmp_path: Path) -> None:
    (ours, theirs), arguments = pair(SMALL), inputs(SMALL)
    with torch.inference_mode():
        ours(**arguments)
    kept = dict(ours.pos_embed._tables)
    assert list(kept) == [((4, 6), torch.device("cpu"))]
    ours(**arguments).sample.sum().backward()  # a table made in inference mode serves training
    with torch.no_grad():
        ours(**arguments)
        assert ours.pos_embed._tables[(4, 6), torch.device("cpu")] is next(iter(kept.values()))
        ours(**inputs(SMALL, size=(4, 4)))
        assert len(ours.pos_embed._tables) == 2
    ours.save_pretrained(tmp_path)
    loaded = PixArtTransformer.from_pretrained(tmp_path, torch_dtype=torch.float64)
    wide = {k: arguments[k].double() for k in ("hidden_states", "encoder_hidden_states")}
    assert_same((loaded, theirs.double()), **{**arguments, **wide})


# ---- folders and configs


@pytest.mark.parametrize("name", ["small", "sizes, half the scale"])
def test_folders_travel_both_ways(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PixArtTransformer.from_pretrained(tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    back = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert_same((loaded, theirs), **inputs(CONFIGS[name]))
    assert_same((ours, back), **inputs(CONFIGS[name]))
    assert dict(back.config).items() >= CONFIGS[name].items()


def test_older_configs_load(tmp_path: Path) -> None:
    """As released with PixArt-alpha, when diffusers had one class for many transformers."""
    _, theirs = pair(SMALL)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    older = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False,
             "use_linear_projection": False}  # fmt: skip
    file.write_text(json.dumps({**config, **older, "_class_name": "Transformer2DModel"}))
    assert_same((PixArtTransformer.from_pretrained(tmp_path), theirs), **inputs(SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel, but PixArtTransformer needs"),
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel, but PixArtTransformer needs"),
        ({"num_layers": 3}, "lack 'transformer_blocks.2.scale_shift_table'"),
        ({"num_layers": 1}, "hold 'transformer_blocks.1.attn1.to_k.bias', .* unknown to PixArtTransformer"),
        ({"use_additional_conditions": True}, "lack 'adaln_single.emb.resolution_embedder.linear_1.weight'"),
        ({"caption_channels": 12}, r"caption_projection.linear_1.weight \(expected \(24, 12\), got \(24, 10\)\)"),
    ],
    ids=str,
)
def test_checkpoints_of_other_models_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair(SMALL)[1].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        PixArtTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm_zero"}, "norm_type: expected 'ada_norm_single', .* got 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn: expected 'gelu-approximate', .* got 'geglu'"),
        ({"double_self_attention": True}, "double_self_attention: expected None, .* got True"),
        ({"num_layers": 0}, "num_layers: expected a positive number, got 0"),
        ({"attention_head_dim": 9}, "attention_head_dim: expected heads that are 4n wide together, got 27"),
        ({"cross_attention_dim": 32}, "cross_attention_dim: expected 24, as wide as the heads, got 32"),
        (
            {"num_attention_heads": 2, "cross_attention_dim": 16, "use_additional_conditions": True},
            "attention_head_dim: expected heads that are 12n wide together, got 16",
        ),
    ],
    ids=str,
)
def test_other_architectures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixArtTransformer(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"sample_size": 32}, 610_856_096),
        ({"sample_size": 64}, 610_856_096),
        ({"sample_size": 128}, 611_349_152),
        ({"sample_size": 128, "use_additional_conditions": False}, 610_856_096),  # PixArt-Sigma
    ],
    ids=str,
)
def test_released_models(config: dict[str, Any], parameters: int) -> None:
    """Counts from the released checkpoints' shapes; defaults are diffusers'."""
    with torch.device("meta"):
        ours = PixArtTransformer(**config, caption_channels=4096)
        theirs = diffusers.PixArtTransformer2DModel(**config, caption_channels=4096)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.pos_embed.scale == theirs.pos_embed.interpolation_scale
    assert ours.pos_embed.base_size == theirs.pos_embed.base_size


# ---- arguments


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "odd side": (
        {"hidden_states": torch.zeros(2, 4, 8, 7)},
        "hidden_states: expected sides in multiples of 2, got 8x7",
    ),
    "caption width": ({"encoder_hidden_states": torch.zeros(2, 7, 9)}, r"captions \[B, S, 10\], got \[2, 7, 9\]"),
    "no captions": ({"encoder_hidden_states": None}, r"encoder_hidden_states: expected captions .*, got None"),
    "captions": ({"encoder_hidden_states": torch.zeros(1, 7, 10)}, "expected 2 captions, one a sample, got 1"),
    "timesteps": ({"timestep": torch.zeros(3)}, "timestep: expected 1 or 2 numbers, got 3"),
    "mask": ({"encoder_attention_mask": torch.ones(2, 6)}, r"expected \[2, 7\] or \[2, 1, 7\], got \[2, 6\]"),
    "bias": ({"encoder_attention_mask": torch.ones(2, 7, 7)}, r"expected \[2, 7\] or \[2, 1, 7\], got \[2, 7, 7\]"),
    "self mask": ({"attention_mask": torch.ones(2, 7)}, r"one value for each of 24 keys, got shape \[2, 7\]"),
    "self bias": ({"attention_mask": torch.ones(2, 24, 24)}, r"\[2, 24\] or \[2, 1, 24\], got \[2, 24, 24\]"),
    "gligen": ({"cross_attention_kwargs": {"gligen": 1}}, r"expected no key but 'scale', got \['gligen'\]"),
}
BAD_SIZES: dict[str, tuple[Any, str]] = {
    "none": (None, "added_cond_kwargs: expected resolution and aspect_ratio, got no resolution"),
    "no aspect": ({"resolution": torch.ones(2, 2), "aspect_ratio": None}, "got no aspect_ratio"),
    "resolution": ({"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(2)}, r"expected \[2, 2\], got \[1, 2\]"),
    "aspect": ({"resolution": torch.ones(2, 2), "aspect_ratio": torch.ones(3)}, r"expected \[2, 1\], got \[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        pair(SMALL)[0](**{**inputs(SMALL), **change})


@pytest.mark.parametrize("name", BAD_SIZES)
def test_bad_sizes_are_refused(name: str) -> None:
    config = CONFIGS["sizes, half the scale"]
    added, message = BAD_SIZES[name]
    with pytest.raises(ValueError, match=message):
        pair(config)[0](**{**inputs(config), "added_cond_kwargs": added})


def test_plain_attention_processors_are_accepted() -> None:
    ours, theirs = pair(SMALL)
    ours.set_attn_processor(theirs.attn_processors)
    with pytest.raises(ValueError, match="set_attn_processor: all: expected plain attention"):
        ours.set_attn_processor(object())


# ---- diffusers' pipelines


@pytest.mark.parametrize("sigma", [False, True])
def test_a_trajectory_inside_diffusers_pipeline(sigma: bool) -> None:
    models = pair(SMALL)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    torch.manual_seed(1)
    captions = {"prompt_embeds": torch.randn(2, 6, 10), "negative_prompt_embeds": torch.randn(2, 6, 10)}
    masks = {"prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]),
             "negative_prompt_attention_mask": torch.tensor([[1, 0, 0, 0, 0, 0]] * 2)}  # fmt: skip
    latents = []
    for model in models:
        kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
        pipeline = kind(tokenizer=None, text_encoder=None, vae=vae, transformer=model, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        latents.append(
            pipeline(
                prompt=None, negative_prompt=None, **captions, **masks, num_inference_steps=6, height=16, width=24,
                use_resolution_binning=False, output_type="latent", generator=torch.Generator().manual_seed(3),
            ).images
        )  # fmt: skip
    assert relative(*latents) < 1e-5
    assert len(models[0]._prompts._entries) <= 1  # read once, and dropped when the pipeline's captions are
