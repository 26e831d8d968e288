"""Per-resblock gradient scaling of the library's models, against plain training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.layers import is_wrapped
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.models.pixart import PixArtTransformer
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.training.dit import DiT
from kolors_fast.training.gradient_scaling import BlockGradientScaler, residual_branches

# ---- models: a call that gives a loss, of texts whose gradient is looked at too


def unet():
    model = KolorsUNet(
        in_channels=4, out_channels=4, sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), cross_attention_dim=12, encoder_hid_dim=10,
        norm_num_groups=4, addition_time_embed_dim=6, projection_class_embeddings_input_dim=6 * 6 + 10,
    )  # fmt: skip
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randint(0, 2048, (2, 6)).float()}
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 10)
    return model, (sample, text), lambda: model(sample, 613, text, added_cond_kwargs=added).sample


def mmdit(**config):
    model = MMDiT(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0,), **config,
    )  # fmt: skip
    sample, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6), torch.randn(2, 6)
    return model, (sample, text, pooled), lambda: model(sample, text, pooled, 500.0).sample


def mmdit_checkpointed():
    model, inputs, call = mmdit()
    model.enable_gradient_checkpointing()
    return model, inputs, call


def pixart():
    model = PixArtTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=10,
        sample_size=16,
    )  # fmt: skip
    sample, text, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 10), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    return model, (sample, text), lambda: model(sample, text, 500.0, encoder_attention_mask=mask).sample


def dit():
    model = DiT(classes=3, heads=2, head_dim=8, depth=2, channels=4, patch_size=2, sample_size=8)
    for parameter in model.parameters():  # which starts as zero where the paper's does
        nn.init.normal_(parameter, std=0.1)
    sample, time, labels = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.tensor([0, 2])
    return model, (sample,), lambda: model(sample, time, labels)


MODELS = {
    # residual blocks down, mid and up 2 + 2 + 4; transformer blocks 2 + 2 + 4, of three branches each
    "unet": (unet, 8 + 8 * 3),
    # attn, ff, ff_context a block; one attn2; no ff_context in the last
    "mmdit": (mmdit, 3 * 3 + 1 - 1),
    "mmdit, checkpointed": (mmdit_checkpointed, 9),
    "pixart": (pixart, 2 * 3),
    "dit": (dit, 2 * 2),
}


def make(name):
    torch.manual_seed(0)
    model, inputs, call = MODELS[name][0]()
    return model.train(), [x.requires_grad_() for x in inputs], call


def gradients(model, inputs):
    return {**{n: p.grad for n, p in model.named_parameters()}, **{f"input {i}": x.grad for i, x in enumerate(inputs)}}


def backward(call):
    torch.manual_seed(2)
    out = call()
    (out * torch.randn_like(out)).mean().backward()


def spread(scaler, seed=3):
    """Scales from 2^7 to 2^24, no two alike."""
    state = scaler.state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["exponents"] = torch.randint(7000, 24001, state["exponents"].shape, generator=generator)
    scaler.load_state_dict(state)


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_nothing_but_rounding_differs(name):
    """Whatever enters a branch, text and modulations too, has the gradient it has without scales."""
    model, inputs, call = make(name)
    backward(call)
    expected = {key: None if g is None else g.clone() for key, g in gradients(model, inputs).items()}
    for value in (*model.parameters(), *inputs):
        value.grad = None
    scaler = BlockGradientScaler(model, dtype=torch.float32)
    spread(scaler)
    backward(call)
    norm, nonfinite = scaler.unscale_()
    assert not nonfinite
    actual = gradients(model, inputs)
    for key, truth in expected.items():
        assert (actual[key] is None) == (truth is None), key
        if truth is not None:
            assert (actual[key] - truth).abs().max() <= 3e-5 * truth.abs().max() + 1e-9, key
    truth = torch.stack([g.double().norm() for k, g in expected.items() if g is not None and "input" not in k]).norm()
    assert float(norm) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_float16_gradients_are_those_of_float32(name):
    model, inputs, call = make(name)
    backward(call)
    expected = {key: g.clone() for key, g in gradients(model, inputs).items() if g is not None}
    for value in (*model.parameters(), *inputs):
        value.grad = None
    scaler = BlockGradientScaler(model)
    backward(call)
    assert not scaler.unscale_()[1]
    actual = gradients(model, inputs)
    whole = torch.cat([g.flatten() for g in expected.values()])
    error = torch.cat([actual[key].flatten() for key in expected]) - whole
    assert 1e-6 * whole.norm() < error.norm() < 0.01 * whole.norm()  # half precision was at work


class Products(TorchFunctionMode):
    """Keeps the dtype of the result of each weight's product."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            self.dtypes[args[1]] = result.dtype
        return result


@pytest.mark.parametrize("name", MODELS)
def test_branches_compute_in_float16_between_ends_in_float32(name):
    model, _, call = make(name)
    scaler = BlockGradientScaler(model)
    leaves = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm)]
    assert not any(map(is_wrapped, leaves))  # or fused paths would not be taken
    outputs = []
    for branch in scaler.branches:
        if branch.method == "forward":
            branch.module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with Products() as products:
        assert call().dtype == torch.float32
    inside = {p for branch in scaler.branches for p in branch.parameters()} & set(products.dtypes)
    assert len(inside) >= 2 * len(scaler.branches)
    for weight, dtype in products.dtypes.items():
        assert dtype == (torch.float16 if weight in inside else torch.float32)
    flat = [y for output in outputs for y in (output if isinstance(output, tuple) else (output,)) if y is not None]
    assert flat and {y.dtype for y in flat} == {torch.float32}
    scaler.remove()
    with Products() as products:
        call()
    assert set(products.dtypes.values()) == {torch.float32}


# ---- which branches


def test_branches_of_the_models():
    for name, (_, count) in MODELS.items():
        model, *_ = make(name)
        branches = residual_branches(model)
        assert len(branches) == count, name
        assert len({branch.name for branch in branches}) == count
    model, _, _ = make("unet")
    inside = {p for branch in residual_branches(model) for p in branch.parameters()}
    outside = {name for name, p in model.named_parameters() if p not in inside}
    parts = {part for name in outside for part in name.split(".")[-3:] if not part.isdigit()}
    assert {"conv_shortcut", "time_emb_proj", "proj_in", "proj_out", "norm3", "conv_in"} < parts
    assert not {"conv1", "conv2", "to_q", "to_k", "ff"} & parts


def test_what_does_not_train_is_left_out():
    model, _, _ = make("pixart")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn2" in name)
    assert [branch.name for branch in residual_branches(model)] == [f"transformer_blocks.{i}.attn2" for i in range(2)]


def test_models_without_known_branches_are_refused():
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    for model in (vae, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"denoiser with residual branches that train, got {type(model).__name__}"):
            residual_branches(model)
