"""What is kept of a prompt: exactly as long as nothing it came from has changed."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import kolors_fast
from kolors_fast import KolorsUNet, savings
from kolors_fast.models.unet_conditioning import balanced, collapse_pads

pytestmark = pytest.mark.usefixtures("every_product_of_ours")  # whose packed weights follow every edit too

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
}
LENGTH = 24


def inputs(batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    text = torch.randn(batch, LENGTH, 10)
    for row in range(batch):
        text[row, : LENGTH - 5 + row] = text[row, 0]  # pads on the left, of another number in each row
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": 613,
        "encoder_hidden_states": text,
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 10),
            "time_ids": torch.randint(0, 2048, (batch, 6)).float(),
        },
    }


def make() -> KolorsUNet:
    torch.manual_seed(0)
    return KolorsUNet(**CONFIG).eval()


@torch.no_grad()
def plain(model: KolorsUNet, arguments: dict[str, Any]) -> Tensor:
    with kolors_fast.without(*savings.SAVINGS):
        return model(**arguments).sample


@torch.no_grad()
def assert_fresh(model: KolorsUNet, arguments: dict[str, Any]) -> Tensor:
    """The result with everything kept is the one of plain code."""
    got, want = model(**arguments).sample, plain(model, arguments)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    return got


def kept(model: KolorsUNet) -> int:
    return len(model._prompts._entries)


def block(model: KolorsUNet) -> Any:
    return model.mid_block.attentions[0].transformer_blocks[0]


# ---- hits


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_steps() -> None:
    model, arguments = make(), inputs()
    prompts = [model.read_prompt(arguments["encoder_hidden_states"], arguments["added_cond_kwargs"], torch.float32)]
    for step in range(3):
        assert_fresh(model, {**arguments, "timestep": 600 - step, "sample": torch.randn(2, 4, 8, 8)})
        prompts.append(
            model.read_prompt(arguments["encoder_hidden_states"], arguments["added_cond_kwargs"], torch.float32)
        )
    assert all(prompt is prompts[0] for prompt in prompts)
    assert prompts[0].text.shape[1] == 6  # five tokens and one pad, the longest of the batch


@torch.no_grad()
def test_prompts_take_turns() -> None:
    """As with callers that give every guidance term a call of its own."""
    model, a, b = make(), inputs(), inputs(batch=1)
    for _ in range(3):
        assert_fresh(model, a)
        assert_fresh(model, b)
    assert kept(model) == 2


# ---- misses


EDITS: dict[str, Callable[[KolorsUNet, dict[str, Any]], Any]] = {
    "text in place": lambda m, a: a["encoder_hidden_states"].mul_(-1),
    "one token in place": lambda m, a: a["encoder_hidden_states"][0, -1].zero_(),
    "text through data": lambda m, a: a["encoder_hidden_states"].data.mul_(-1),
    "pooled text": lambda m, a: a["added_cond_kwargs"]["text_embeds"].add_(1),
    "sizes": lambda m, a: a["added_cond_kwargs"]["time_ids"].add_(512),
    "another text": lambda m, a: a.update(encoder_hidden_states=torch.randn(2, LENGTH, 10)),
    "another batch": lambda m, a: a.update(inputs(batch=3)),
    "a mask": lambda m, a: a.update(encoder_attention_mask=torch.ones(2, LENGTH).index_fill(1, torch.tensor([3]), 0)),
    "a bias": lambda m, a: a.update(encoder_key_bias=torch.arange(2.0 * LENGTH).view(2, LENGTH) / 10),
    "keys' weight": lambda m, a: block(m).attn2.to_k.weight.mul_(3),
    "values' weight through data": lambda m, a: block(m).attn2.to_v.weight.data.mul_(3),
    "queries' weight": lambda m, a: block(m).attn2.to_q.weight.mul_(3),
    "output's bias": lambda m, a: block(m).attn2.to_out[0].bias.add_(3),
    "a row of joined weights": lambda m, a: block(m).attn1.to_v.weight[3].mul_(-9),
    "feed-forward": lambda m, a: block(m).ff.net[0].proj.weight.mul_(2),
    "one number of a convolution": lambda m, a: m.conv_in.weight[1, 2, 1, 1].add_(9),
    "projection": lambda m, a: m.encoder_hid_proj.bias.add_(1),
    "size embedding": lambda m, a: m.add_embedding.linear_1.weight.mul_(2),
    "new parameter": lambda m, a: setattr(block(m).attn2.to_k, "weight", nn.Parameter(torch.randn(16, 12))),
    "new layer": lambda m, a: setattr(block(m).attn2, "to_v", nn.Linear(12, 16, bias=False)),
    "state dict": lambda m, a: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "assigned state dict": lambda m, a: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "hook": lambda m, a: block(m).attn2.to_k.register_forward_hook(lambda _m, _a, out: out * 2),
}


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_nothing_stale_is_served(name: str) -> None:
    model, arguments = make(), inputs()
    before = assert_fresh(model, arguments)
    assert torch.equal(before, model(**arguments).sample)
    EDITS[name](model, arguments)
    after = assert_fresh(model, arguments)
    assert after.shape != before.shape or (after - before).abs().max() > 1e-4
    assert_fresh(model, arguments)


@torch.no_grad()
def test_switches_and_numbers_make_another_prompt() -> None:
    model, arguments = make(), inputs()
    text, added = arguments["encoder_hidden_states"], arguments["added_cond_kwargs"]

    def width(**options: Any) -> int:
        return model.read_prompt(text, added, torch.float32, **options).text.shape[1]

    assert (width(), width(keys_multiple=16), width()) == (6, 16, 6)
    with kolors_fast.without("pad_collapse"):
        assert width() == LENGTH
    folds = block(model).attn2.folds
    prompts = [model.read_prompt(text, added, torch.float32)]
    with kolors_fast.use_backend("reference"):  # pure PyTorch multiplies as the model is written
        prompts.append(model.read_prompt(text, added, torch.float32))
        assert not folds(1)
    assert prompts[0] is not prompts[1]
    assert folds(1)


@torch.no_grad()
def test_a_tensor_in_the_place_of_a_dead_one_is_another() -> None:
    model, arguments = make(), inputs()
    for seed in range(4):  # of the same shape: often at the same address, with the same id
        arguments.pop("encoder_hidden_states")
        torch.manual_seed(seed)
        arguments["encoder_hidden_states"] = torch.randn(2, LENGTH, 10)
        assert_fresh(model, arguments)


@torch.no_grad()
def test_what_nobody_can_ask_for_is_dropped() -> None:
    model = make()
    for _ in range(3):
        arguments = inputs()
        model(**arguments)
        assert kept(model) == 1
        del arguments
        gc.collect()
        assert kept(model) == 0
    arguments = inputs()
    model(**arguments)
    model.forget_prompts()
    assert kept(model) == 0


def test_gradients_and_inference_tensors_keep_nothing() -> None:
    model, arguments = make(), inputs()
    arguments["encoder_hidden_states"].requires_grad_()
    model(**arguments).sample.sum().backward()
    assert arguments["encoder_hidden_states"].grad is not None
    assert kept(model) == 0
    with torch.inference_mode():
        unversioned = inputs()
        first = model(**unversioned).sample
        unversioned["encoder_hidden_states"].mul_(-1)
        assert not torch.equal(first, model(**unversioned).sample)
    assert kept(model) == 0


@pytest.mark.parametrize(
    "name",
    ["conv1.weight", "conv2.bias", "conv_shortcut.weight", "attn1.to_v.weight", "attn2.to_k.weight",
     "attn2.to_out.0.bias", "norm3.weight", "ff.net.0.proj.bias"],
)  # fmt: skip
def test_a_single_parameter_trains_amid_frozen_ones(name: str) -> None:
    """Kernels without a gradient stand back as soon as one of their tensors wants it, be it only the addend."""
    arguments, model = inputs(), make().requires_grad_(False)
    arguments["encoder_hidden_states"] = 5 * arguments["encoder_hidden_states"][:, -3:]
    found = {**dict(block(model).named_parameters()), **dict(model.up_blocks[0].resnets[0].named_parameters())}
    parameter = found[name].requires_grad_()
    grads = []
    for switched_off in ((), tuple(savings.SAVINGS)):
        with kolors_fast.without(*switched_off):
            grads += torch.autograd.grad(model(**arguments).sample.square().sum(), parameter)
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()


@torch.no_grad()
def test_copies_and_moves_keep_nothing_foreign() -> None:
    model, arguments = make(), inputs()
    want = assert_fresh(model, arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(other) == 0
        assert torch.equal(other(**arguments).sample, want)
        other.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)
        assert not torch.equal(assert_fresh(other, arguments), want)
    assert torch.equal(model(**arguments).sample, want)
    double = {
        **arguments,
        "sample": arguments["sample"].double(),
        "encoder_hidden_states": arguments["encoder_hidden_states"].double(),
    }
    assert (model.double()(**double).sample - want).abs().max() < 1e-5


# ---- LoRA, as PEFT injects it


def inject(model: KolorsUNet) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    peft.inject_adapter_in_model(config, model)
    model.eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


def lora(model: KolorsUNet, act: Callable[[Any], Any]) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            act(module)


LORA_EDITS: dict[str, Callable[[KolorsUNet], Any]] = {
    "weights": lambda m: lora(m, lambda layer: layer.lora_A["default"].weight.mul_(2)),
    "weights through data": lambda m: lora(m, lambda layer: layer.lora_B["default"].weight.data.neg_()),
    "strength": lambda m: lora(m, lambda layer: layer.scale_layer(0.3)),
    "another adapter": lambda m: lora(m, lambda layer: layer.set_adapter([])),
    "off": lambda m: lora(m, lambda layer: layer.enable_adapters(False)),
}


@pytest.mark.parametrize("name", LORA_EDITS)
@torch.no_grad()
def test_lora_edits_are_seen(name: str) -> None:
    model, arguments = make(), inputs()
    plain_result = assert_fresh(model, arguments)
    inject(model)
    before = assert_fresh(model, arguments)
    assert (before - plain_result).abs().max() > 1e-3
    assert kept(model) > 0  # the layers are known: they are kept too
    LORA_EDITS[name](model)
    after = assert_fresh(model, arguments)
    assert (after - before).abs().max() > 1e-4


@torch.no_grad()
def test_lora_merged_and_unmerged() -> None:
    """PEFT merges through `.data`, into weights that are views of joined ones."""
    model, arguments = make(), inputs()
    plain_result = assert_fresh(model, arguments)
    inject(model)
    before = assert_fresh(model, arguments)
    lora(model, lambda layer: layer.merge())
    assert (assert_fresh(model, arguments) - before).abs().max() < 1e-5 * before.abs().max()
    lora(model, lambda layer: layer.unmerge())
    assert (assert_fresh(model, arguments) - before).abs().max() < 1e-4 * before.abs().max()
    scaled = model(**arguments, cross_attention_kwargs={"scale": 0.0}).sample
    assert (scaled - plain_result).abs().max() < 1e-5 * before.abs().max()
    assert_fresh(model, arguments)


# ---- pads


@pytest.mark.parametrize("real", [(5, 2), (1, 1), (0, 3), (23, 22)])
def test_collapsed_pads_have_the_same_softmax(real: tuple[int, int]) -> None:
    torch.manual_seed(0)
    text = torch.randn(2, LENGTH, 6, dtype=torch.float64)
    for row, n in enumerate(real):
        text[row, : LENGTH - n] = text[row, 0]
    query = torch.randn(2, 3, 6, dtype=torch.float64)
    want = (query @ text.transpose(1, 2)).softmax(-1) @ text
    found = collapse_pads(text)
    assert (found is None) == (max(real) > LENGTH - 2)
    if found is not None:
        short, bias = found
        assert short.shape[1] == max(real) + 1
        got = (query @ short.transpose(1, 2) + bias[:, None].double()).softmax(-1) @ short
        assert (got - want).abs().max() < 1e-6


def test_what_is_not_padded_is_not_collapsed() -> None:
    assert collapse_pads(torch.randn(2, LENGTH, 6)) is None
    text = torch.zeros(1, LENGTH, 6)
    text[0, 0, 0] = math.nan  # no equal of itself
    assert collapse_pads(text) is None
    assert collapse_pads(torch.zeros(1, 2, 6)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_balanced_bias_survives_half_precision(dtype: torch.dtype) -> None:
    bias = torch.zeros(2, 5)
    bias[:, 0] = torch.tensor([math.log(239), -math.inf])
    bias[0, 4] = -math.inf
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    want = (logits + bias).softmax(-1)
    got = (logits + balanced(bias, dtype).to(dtype).double()).softmax(-1)
    assert (got - want).abs().max() < 3e-5
    rounded = (logits + bias.to(dtype).double()).softmax(-1)
    assert (rounded - want).abs().max() > 10 * (got - want).abs().max()
