"""MMDiT against diffusers' SD3Transformer2DModel, weights copied by state dict."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import Tensor, nn

from kolors_fast import MMDiT
from kolors_fast.models import mmdit_blocks
from kolors_fast.models.mmdit_blocks import JointBlock, Stream

SMALL: dict[str, Any] = {
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
THREE_LAYERS: dict[str, Any] = {**SMALL, "num_layers": 3, "dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "norms": {**SMALL, "qk_norm": "rms_norm"},
    "dual": {**SMALL, "dual_attention_layers": [0], "num_layers": 3},
    "dual and norms": THREE_LAYERS,
    "one block": {**SMALL, "num_layers": 1, "dual_attention_layers": (0,)},
    "other sizes": {
        **SMALL,
        "patch_size": 1,
        "in_channels": 5,
        "out_channels": 3,
        "attention_head_dim": 20,
        "num_attention_heads": 1,
        "caption_projection_dim": 20,
        "pos_embed_max_size": 19,
    },
}
RELEASED = {
    "SD3 medium": ({"num_layers": 24, "pos_embed_max_size": 192}, 2_028_328_000),
    "SD3.5 medium": (
        {"num_layers": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2_243_171_520,
    ),
    "SD3.5 large": ({"num_layers": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, 8_056_627_520),
}
SKIPS = [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2), (0, 1, 2)]


def pair(config: dict[str, Any]) -> tuple[MMDiT, diffusers.SD3Transformer2DModel]:
    torch.manual_seed(0)
    theirs = diffusers.SD3Transformer2DModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            torch.nn.init.normal_(parameter, 1.0 if ".norm_" in name else 0.0, 0.3)
    ours = MMDiT(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(config: dict[str, Any], batch: int = 2, size: tuple[int, int] = (8, 8), text: int = 5) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], *size),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.linspace(30.5, 990, batch),
    }


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


@torch.no_grad()
def assert_same(models: tuple[MMDiT, diffusers.SD3Transformer2DModel], **arguments: Any) -> None:
    ours, theirs = models
    assert_close(ours(**arguments).sample, theirs(**arguments).sample)


def in_float64(theirs: nn.Module) -> nn.Module:
    """Their model in float64, in which their RMSNorm would round the mean of squares to float32."""
    exact = copy.deepcopy(theirs).double()
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, diffusers.models.normalization.RMSNorm):
                norm = nn.RMSNorm(len(child.weight), child.eps).double()
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return exact


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint attention as on a GPU: projections write where it reads."""
    monkeypatch.setattr(mmdit_blocks, "JOINT_QKV_ON", ("cpu",))
    monkeypatch.setattr(mmdit_blocks, "JOINT_QKV_FROM", 1)


# ---- forward


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "size"), [(2, (8, 8)), (3, (10, 14)), (1, (4, 18))])
def test_matches_diffusers(name: str, batch: int, size: tuple[int, int]) -> None:
    assert_same(pair(CONFIGS[name]), **inputs(CONFIGS[name], batch, size))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.usefixtures("in_place")
def test_matches_diffusers_where_projections_write_in_place(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    attend = mmdit_blocks.qk_norm_attention
    monkeypatch.setattr(
        mmdit_blocks, "qk_norm_attention", lambda *a, **k: seen.append("added" in k) or attend(*a, **k)
    )  # fmt: skip
    assert_same(pair(CONFIGS[name]), **inputs(CONFIGS[name], batch, (10, 14)))
    assert seen
    assert not any(seen)  # one stream, for what was two lies together


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
        torch.tensor([1, 999]),
        torch.tensor([3.0], dtype=torch.float64),
    ],
    ids=str,
)
@torch.no_grad()
def test_timestep_forms(timestep: Any) -> None:
    (ours, theirs), arguments = pair(SMALL), inputs(SMALL)
    expanded = torch.as_tensor(timestep).reshape(-1).expand(2)
    want = theirs(**{**arguments, "timestep": expanded}).sample
    assert_close(ours(**{**arguments, "timestep": timestep}).sample, want)


@pytest.mark.parametrize("size", [(8, 8), (6, 14)])
def test_positions_are_those_of_the_checkpoint(size: tuple[int, int]) -> None:
    fresh, theirs = MMDiT(**SMALL), diffusers.SD3Transformer2DModel(**SMALL)
    assert torch.equal(fresh.pos_embed.pos_embed, theirs.pos_embed.pos_embed)
    models = pair(SMALL)
    table = torch.randn_like(models[1].pos_embed.pos_embed)
    models[1].pos_embed.pos_embed.copy_(table)
    models[0].load_state_dict(models[1].state_dict())
    assert torch.equal(models[0].pos_embed.pos_embed, table)
    assert_same(models, **inputs(SMALL, size=size))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_controlnet_residuals(count: int) -> None:
    residuals = [torch.randn(2, 16, 36) for _ in range(count)]
    models = pair(THREE_LAYERS)
    assert_same(models, **inputs(THREE_LAYERS), block_controlnet_hidden_states=residuals)
    assert_same(models, **inputs(THREE_LAYERS), block_controlnet_hidden_states=residuals, skip_layers=[0])


@pytest.mark.parametrize("layers", SKIPS, ids=str)
@pytest.mark.parametrize("name", ["dual", "dual and norms"])
def test_skipped_layers(name: str, layers: tuple[int, ...]) -> None:
    assert_same(pair(CONFIGS[name]), **inputs(CONFIGS[name]), skip_layers=list(layers))


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


@pytest.mark.parametrize("name", ["plain", "dual and norms"])
@torch.no_grad()
def test_bfloat16_is_not_worse_than_diffusers(name: str) -> None:
    (ours, theirs), arguments = pair(CONFIGS[name]), inputs(CONFIGS[name], batch=3, size=(10, 14))
    narrow = {k: v if k == "timestep" else v.bfloat16() for k, v in arguments.items()}
    theirs.bfloat16()
    ours.bfloat16()
    wide = {k: v if k == "timestep" else v.double() for k, v in narrow.items()}
    truth = in_float64(theirs)(**wide).sample
    errors = [(model(**narrow).sample.double() - truth).square().mean() for model in (ours, theirs)]
    assert errors[0] <= errors[1]


# ---- gradients


def gradients(model: nn.Module, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the mean square of the prediction, in sample, text, pooled text and every parameter; 0 where there is none."""
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    leaves = {name: arguments[name].detach().to(dtype).requires_grad_() for name in names}
    model(**{**arguments, **leaves}).sample.square().mean().backward()
    leaves |= dict(model.named_parameters())
    return {k: torch.zeros_like(v).double() if v.grad is None else v.grad.double() for k, v in leaves.items()}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest error of any gradient relative to that gradient's largest value."""
    assert got.keys() == want.keys()
    return max(float((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)) for k in want)


@pytest.mark.parametrize("name", ["plain", "dual and norms"])
def test_gradients_match_diffusers(name: str) -> None:
    (ours, theirs), arguments = pair(CONFIGS[name]), inputs(CONFIGS[name], size=(8, 6))
    truth = gradients(in_float64(theirs), arguments, torch.float64)
    # a bias of keys moves all logits of a query alike: its gradient is rounding and nothing else
    real = {k: v for k, v in truth.items() if v.abs().max() > 1e-12 or v.abs().max() == 0}
    assert sum(k.endswith("bias") for k in truth.keys() - real.keys()) == len(truth.keys() - real.keys())

    def error(model: nn.Module, dtype: torch.dtype) -> float:
        found = gradients(model, arguments, dtype)
        return worst_error({k: found[k] for k in real}, real)

    assert error(ours, torch.float64) < 1e-9
    assert error(ours, torch.float32) < 2 * error(theirs, torch.float32)


@pytest.mark.parametrize("name", ["plain", "dual and norms"])
def test_autocast_trains_as_well_as_in_diffusers(name: str) -> None:
    (ours, theirs), arguments = pair(CONFIGS[name]), inputs(CONFIGS[name])
    residuals = [torch.randn(2, 16, 36)]  # in float32, as a ControlNet outside of autocast gives them
    truth = gradients(in_float64(theirs), arguments, torch.float64)
    errors = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, arguments, torch.float32)
            assert model(**arguments, block_controlnet_hidden_states=residuals).sample.dtype == torch.bfloat16
        errors.append(sum(float((found[k] - truth[k]).square().sum()) for k in truth) ** 0.5)
    assert errors[0] < 1.2 * errors[1]


def test_gradient_checkpointing_computes_blocks_again() -> None:
    ours, _ = pair(THREE_LAYERS)
    arguments = inputs(THREE_LAYERS)
    want = gradients(ours, arguments, torch.float32)
    calls: list[int] = []
    ours.enable_gradient_checkpointing()
    forward = JointBlock.forward

    def counted(self: JointBlock, *args: Any) -> Any:
        calls.append(1)
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointBlock, "forward", counted)
        got = gradients(ours, arguments, torch.float32)
    assert len(calls) == 2 * 3
    assert all(torch.equal(got[key], want[key]) for key in want)
    ours.disable_gradient_checkpointing()
    assert not ours.gradient_checkpointing


# ---- what is not computed


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["plain", "norms"])
def test_text_queries_of_the_last_block_are_skipped(name: str, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(CONFIGS[name])
    queries: list[int | None] = []
    attend = mmdit_blocks.qk_norm_attention

    def watched(*qkv: Tensor, added: Any = None, **options: Any) -> Any:
        if added is None:  # both streams lie in one tensor
            queries.append((qkv[0].shape[1] - (qkv[1].shape[1] - 5)) or None)
            return attend(*qkv, **options)
        queries.append(None if added.q is None else added.q.shape[1])
        return attend(*qkv, added=added, **options)

    monkeypatch.setattr(mmdit_blocks, "qk_norm_attention", watched)
    last = ours.transformer_blocks[-1].attn
    with torch.set_grad_enabled(trains):
        ours(**inputs(CONFIGS[name]))
        assert queries == [5, None]
        last.add_q_proj.register_forward_hook(lambda *_: pytest.fail("queries were computed"))
        ours(**inputs(CONFIGS[name]))


@pytest.mark.parametrize("layers", SKIPS, ids=str)
@pytest.mark.parametrize("pictures", [1, 2])
@torch.no_grad()
def test_skip_layer_guidance_shares_what_is_equal(
    layers: tuple[int, ...], pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three predictions (negative, positive, positive with layers bypassed) of two prompts."""
    ours, theirs = pair(THREE_LAYERS)
    arguments = inputs(THREE_LAYERS, batch=2 * pictures)
    text, pooled, time = (arguments[k] for k in ("encoder_hidden_states", "pooled_projections", "timestep"))
    time = time[:1].expand(2 * pictures)
    sample = torch.cat([torch.randn(pictures, 4, 8, 6)] * 3)
    rows: list[int] = []
    forward = JointBlock.forward

    def counted(self: JointBlock, image: Stream, *args: Any) -> Any:
        rows.append(len(image.x) // pictures)
        return forward(self, image, *args)

    monkeypatch.setattr(JointBlock, "forward", counted)
    prompt = ours.read_prompt(text, pooled, torch.float32)
    steps = ours.plan_steps(time[:1], prompt)
    got = ours.denoise(sample, steps.at(0), skip_layers=layers, skipped=pictures)
    both = theirs(sample[: 2 * pictures], text, pooled, time).sample
    last = theirs(sample[:pictures], text[pictures:], pooled[pictures:], time[pictures:], skip_layers=layers).sample
    assert_close(got, torch.cat([both, last]))
    assert rows == [3 if i > layers[0] and i not in layers else 2 for i in range(3)]


# ---- in the place of diffusers' model


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(name: str) -> None:
    changes, parameters = RELEASED[name]
    heads = changes["num_layers"]
    config = {**changes, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    with torch.device("meta"):
        ours, theirs = MMDiT(**config), diffusers.SD3Transformer2DModel(**config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    for key, value in theirs.config.items():
        assert key.startswith("_") or ours.config[key] == value, key


def test_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        ours, theirs = MMDiT(), diffusers.SD3Transformer2DModel()
    assert dict(ours.config) == {k: v for k, v in theirs.config.items() if not k.startswith("_")}


def test_folders_travel_both_ways(tmp_path: Path) -> None:
    _, theirs = pair(THREE_LAYERS)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = MMDiT.from_pretrained(tmp_path / "theirs")
    assert loaded.config.dual_attention_layers == [0, 2]
    loaded.save_pretrained(tmp_path / "ours")
    back = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert_same((loaded, theirs), **inputs(THREE_LAYERS))
    assert_same((loaded, back), **inputs(THREE_LAYERS))


@torch.no_grad()
def test_a_whole_trajectory_inside_of_diffusers_pipeline() -> None:
    models = pair(THREE_LAYERS)
    torch.manual_seed(3)
    text = {
        "prompt_embeds": torch.randn(2, 5, 10),
        "negative_prompt_embeds": torch.randn(2, 5, 10),
        "pooled_prompt_embeds": torch.randn(2, 7),
        "negative_pooled_prompt_embeds": torch.randn(2, 7),
    }
    latents, results = torch.randn(2, 4, 12, 16), []
    for model in models:
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
            tokenizer_3=None,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline(
            **text, latents=latents, height=96, width=128, num_inference_steps=6,
            guidance_scale=4.0, skip_guidance_layers=[1], skip_layer_guidance_stop=0.6, output_type="latent",
            joint_attention_kwargs={"scale": 1.0},
        )  # fmt: skip
        results.append(found.images)
    assert_close(results[0], results[1], rtol=2e-5)
    assert (results[0] - latents).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@torch.no_grad()
def test_lora_layers_are_injected_by_path_and_scaled(scale: float) -> None:
    models, arguments = pair(THREE_LAYERS), inputs(THREE_LAYERS)
    before = models[0](**arguments).sample
    targets = ["to_q", "add_k_proj", "to_v", "to_out.0", "to_add_out", "ff.net.0.proj", "ff_context.net.2", "proj_out",
               "context_embedder", "linear_1", "norm1.linear", "norm_out.linear"]  # fmt: skip
    for model in models:
        torch.manual_seed(2)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    ours, theirs = models
    got = ours(**arguments, joint_attention_kwargs={"scale": scale}).sample
    for layer in theirs.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(scale)
    assert_close(got, theirs(**arguments).sample)
    moved = (got - before).abs().max() / before.abs().max()
    assert moved < 1e-5 if scale == 0 else moved > 1e-2


@torch.no_grad()
def test_norms_can_be_added(tmp_path: Path) -> None:
    _, theirs = pair({**THREE_LAYERS, "qk_norm": None})
    with_norms = diffusers.SD3Transformer2DModel(**THREE_LAYERS).eval()  # whose norms start with weights of one
    with_norms.load_state_dict(theirs.state_dict(), strict=False)
    ours = MMDiT(**{**THREE_LAYERS, "qk_norm": None}).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.add_qk_norm_() is ours
    assert ours.transformer_blocks[0].attn.norm_q.weight.dtype == torch.float64
    ours.float()
    assert list(ours.state_dict()) == list(with_norms.state_dict())
    assert_same((ours, with_norms), **inputs(THREE_LAYERS))
    ours.save_pretrained(tmp_path)
    assert_same((MMDiT.from_pretrained(tmp_path), with_norms), **inputs(THREE_LAYERS))
    with pytest.raises(ValueError, match="qk_norm: expected None, to which norms can be added, got 'rms_norm'"):
        ours.add_qk_norm_()


def test_attention_processors() -> None:
    from diffusers.models import attention_processor

    ours, _ = pair(SMALL)
    ours.set_attn_processor(attention_processor.JointAttnProcessor2_0())
    ours.set_attn_processor(ours.attn_processors)
    foreign = attention_processor.PAGJointAttnProcessor2_0()
    with pytest.raises(ValueError, match=r"set_attn_processor: .* got PAGJointAttnProcessor2_0"):
        ours.set_attn_processor(foreign)


def test_compiles_whole() -> None:
    ours, _ = pair(THREE_LAYERS)
    arguments = inputs(THREE_LAYERS)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**arguments).sample, ours(**arguments).sample, rtol=2e-6)


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 8, 20)}, "hidden_states: expected sides up to 18, .* got 8x20"),
        ({"hidden_states": torch.zeros(2, 4, 7, 8)}, "hidden_states: expected sides in multiples of 2, got 7x8"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 11)}, r"encoder_hidden_states: expected \[B, L, 10\], got \[2, "),
        ({"encoder_hidden_states": None}, r"encoder_hidden_states: expected \[B, L, 10\], got None"),
        ({"pooled_projections": torch.zeros(2, 5, 7)}, r"pooled_projections: expected \[B, 7\], got \[2, 5, 7\]"),
        ({"pooled_projections": torch.zeros(3, 7)}, "pooled_projections: expected 2 rows, .* got 3"),
        ({"hidden_states": torch.zeros(3, 4, 8, 8)}, "encoder_hidden_states: expected 3 rows, got 2"),
        ({"timestep": torch.zeros(3)}, "timestep: expected 1 or 2 numbers, got 3"),
        ({"skip_layers": [2]}, r"skip_layers: expected numbers from 0 to 1, got \[2\]"),
        ({"joint_attention_kwargs": {"gligen": 1}}, r"joint_attention_kwargs: expected no key but 'scale', got \['gl"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    ours, _ = pair(SMALL)
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs(SMALL), **change})


@torch.no_grad()
def test_bad_skips_are_refused() -> None:
    ours, _ = pair(SMALL)
    arguments = inputs(SMALL)
    prompt = ours.read_prompt(arguments["encoder_hidden_states"], arguments["pooled_projections"], torch.float32)
    cond = ours.plan_steps(torch.tensor([3.0]), prompt).at(0)
    with pytest.raises(ValueError, match="skip_layers: expected those that 1 samples bypass, got none"):
        ours.denoise(torch.zeros(3, 4, 8, 8), cond, skipped=1)
    with pytest.raises(ValueError, match="control: expected None beside samples that bypass layers"):
        ours.denoise(torch.zeros(3, 4, 8, 8), cond, [torch.zeros(2, 16, 36)], skip_layers=[0], skipped=1)
    for skipped in (0, 2):
        with pytest.raises(ValueError, match=f"skipped: expected 1 to 1 of 3 samples, got {skipped}"):
            ours.denoise(torch.zeros(3, 4, 8, 8), cond, skip_layers=[0], skipped=skipped)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected 3 rows, got 2"):
        ours.denoise(torch.zeros(4, 4, 8, 8), cond, skip_layers=[0], skipped=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected a positive number, got 0"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size: expected a positive number, got None"),
        ({"caption_projection_dim": 40}, "caption_projection_dim: expected 36, the width of all heads, got 40"),
        ({"dual_attention_layers": (0, 2)}, r"dual_attention_layers: expected numbers from 0 to 1, got \[0, 2\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm: expected None or 'rms_norm', got 'layer_norm'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_outside_the_family_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiT(**{**SMALL, **change})
