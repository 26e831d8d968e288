"""What PixArt keeps of prompts and steps: exactly as long as nothing it came from has changed."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import kolors_fast
from kolors_fast import PixArtTransformer, savings
from kolors_fast.models.pixart_conditioning import masked, trimmed

pytestmark = pytest.mark.usefixtures("every_product_of_ours")  # whose packed weights follow every edit too

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
    "use_additional_conditions": True,
}
LENGTH = 12


def inputs(batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.zeros(batch, LENGTH, dtype=torch.long)
    for row in range(batch):
        mask[row, : 5 - row] = 1
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, LENGTH, 10),
        "timestep": 613,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": torch.rand(batch, 2) * 900, "aspect_ratio": torch.rand(batch, 1)},
    }


def make(**config: Any) -> PixArtTransformer:
    torch.manual_seed(0)
    return PixArtTransformer(**{**CONFIG, **config}).eval()


def read(model: PixArtTransformer, arguments: dict[str, Any], **options: Any) -> Any:
    return model.read_prompt(
        arguments["encoder_hidden_states"], arguments["added_cond_kwargs"], arguments["hidden_states"].dtype,
        **{"mask": arguments["encoder_attention_mask"], **options},
    )  # fmt: skip


@torch.no_grad()
def assert_fresh(model: PixArtTransformer, arguments: dict[str, Any]) -> Tensor:
    """The result with everything kept is the one of plain code."""
    got: Tensor = model(**arguments).sample
    with kolors_fast.without(*savings.SAVINGS):
        want = model(**arguments).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    return got


def block(model: PixArtTransformer) -> Any:
    return model.transformer_blocks[1]


# ---- prompts


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_steps() -> None:
    model, arguments = make(), inputs()
    prompt = read(model, arguments)
    for step in range(3):
        assert_fresh(model, {**arguments, "timestep": 600 - step, "hidden_states": torch.randn(2, 4, 8, 8)})
        assert read(model, arguments) is prompt
    assert prompt.text.shape == (2, 5, 24)
    assert len(model._prompts._entries) == 1
    model.forget_prompts()
    assert not model._prompts._entries


EDITS: dict[str, Callable[[PixArtTransformer, dict[str, Any]], Any]] = {
    "captions in place": lambda m, a: a["encoder_hidden_states"].mul_(-1),
    "one token in place": lambda m, a: a["encoder_hidden_states"][0, 0].zero_(),
    "captions through data": lambda m, a: a["encoder_hidden_states"].data.mul_(-1),
    "mask in place": lambda m, a: a["encoder_attention_mask"][0, 0].zero_(),
    "mask through data": lambda m, a: a["encoder_attention_mask"].data.fill_(1),
    "no mask": lambda m, a: a.update(encoder_attention_mask=None),
    "another mask": lambda m, a: a.update(encoder_attention_mask=torch.ones(2, LENGTH)),
    "resolution": lambda m, a: a["added_cond_kwargs"]["resolution"].add_(512),
    "aspect ratio": lambda m, a: a["added_cond_kwargs"]["aspect_ratio"].mul_(3),
    "another batch": lambda m, a: a.update(inputs(batch=3)),
    "keys' weight": lambda m, a: block(m).attn2.to_k.weight.mul_(3),
    "keys' bias": lambda m, a: block(m).attn2.to_v.bias.add_(3),
    "values' weight through data": lambda m, a: block(m).attn2.to_v.weight.data.mul_(3),
    "queries' weight": lambda m, a: block(m).attn2.to_q.weight.mul_(3),
    "output's bias": lambda m, a: block(m).attn2.to_out[0].bias[3].add_(3),
    "a row of joined weights": lambda m, a: block(m).attn1.to_v.weight[3].mul_(-9),
    "a joined bias": lambda m, a: block(m).attn1.to_v.bias.add_(2),
    "feed-forward": lambda m, a: block(m).ff.net[0].proj.weight.mul_(2),
    "projection": lambda m, a: m.caption_projection.linear_2.bias.add_(1),
    "size embedding": lambda m, a: m.adaln_single.emb.aspect_ratio_embedder.linear_1.weight.mul_(4),
    "a block's table": lambda m, a: block(m).scale_shift_table.add_(0.5),
    "new layer": lambda m, a: setattr(block(m).attn2, "to_v", nn.Linear(24, 24)),
    "state dict": lambda m, a: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
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
def test_numbers_and_switches_make_another_prompt() -> None:
    model, arguments = make(), inputs()

    def keys(**options: Any) -> tuple[int, bool]:
        prompt = read(model, arguments, **options)
        return prompt.text.shape[1], prompt.bias is not None

    assert (keys(), keys(keys_multiple=8), keys()) == ((5, True), (8, True), (5, True))
    assert keys(mask=None) == (LENGTH, False)
    assert keys(mask=None, keys_multiple=8) == (LENGTH, False)
    same = torch.tensor([[1, 0, 1, 1] * 3] * 2)
    assert keys(mask=same) == (9, False)  # nothing is left to be masked
    assert keys(mask=same, keys_multiple=8) == (16, True)
    with kolors_fast.without("pad_collapse"):
        assert keys() == (LENGTH, True)


def test_gradients_keep_nothing() -> None:
    model, arguments = make(), inputs()
    arguments["encoder_hidden_states"].requires_grad_()
    model(**arguments).sample.sum().backward()
    grad = arguments["encoder_hidden_states"].grad
    assert ((grad != 0).any(-1) == arguments["encoder_attention_mask"].bool()).all()  # pads weigh exactly nothing
    assert not model._prompts._entries


@torch.no_grad()
def test_copies_and_moves_keep_nothing_foreign() -> None:
    model, arguments = make(), inputs()
    want = assert_fresh(model, arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._prompts._entries
        assert torch.equal(other(**arguments).sample, want)
        block(other).attn2.to_k.weight.mul_(2)
        assert not torch.equal(assert_fresh(other, arguments), want)
    assert torch.equal(model(**arguments).sample, want)


# ---- masks


@pytest.mark.parametrize("rows", [([1, 1, 0, 0],), ([0, 0, 1, 1], [1, 0, 0, 1]), ([1, 0, 1, 1], [0, 1, 0, 0])])
def test_dropped_keys_have_the_same_softmax(rows: tuple[list[int], ...]) -> None:
    torch.manual_seed(0)
    mask, states = torch.tensor(rows), torch.randn(len(rows), 4, 6, dtype=torch.float64)
    query = torch.randn(len(rows), 3, 6, dtype=torch.float64)
    logits = query @ states.mT
    want = logits.masked_fill(mask[:, None] == 0, -math.inf).softmax(-1) @ states
    for captions in (masked(states, mask), trimmed(masked(states, mask))):
        bias = 0 if captions.bias is None else captions.bias[:, None]
        got = (query @ captions.states.mT + bias).softmax(-1) @ captions.states
        assert (got - want).abs().max() < 1e-12
    assert captions.states.shape[1] == mask.sum(1).max()
    assert (captions.bias is None) == (len(set(mask.sum(1).tolist())) == 1)
    assert captions.alive is None


def test_what_counts_for_nothing_in_16_bit() -> None:
    """diffusers' -10000 is -9984 in bfloat16."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bias = ((1 - mask.to(dtype)) * -10000.0)[:, None]
        captions = trimmed(masked(torch.randn(2, 3, 4, dtype=dtype), bias))
        assert captions.bias is not None
        assert captions.bias.tolist() == [[0, 0], [0, -math.inf]]
        assert captions.bias.dtype == torch.float32


# ---- steps


@torch.no_grad()
@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_planned_steps_are_those_of_forward(sizes: bool, fold: bool) -> None:
    model, arguments = make(use_additional_conditions=sizes), inputs()
    arguments["encoder_attention_mask"][1] = 0  # no token of the second caption
    with kolors_fast.without(*(() if fold else ("prompt_fold",))):
        check_plans(model, arguments)


def check_plans(model: PixArtTransformer, arguments: dict[str, Any]) -> None:
    timesteps = torch.tensor([999.0, 421.3, 0.0])
    prompt = read(model, arguments)
    steps = model.plan_steps(timesteps, prompt)
    sample = arguments["hidden_states"]
    copied = steps.fixed()
    for row, timestep in enumerate(timesteps):
        want = model(**{**arguments, "timestep": timestep}).sample
        for cond in (steps.at(row), steps.at(torch.tensor([row])), copied.at(row)):
            assert (model.denoise(sample, cond) - want).abs().max() < 1e-6 * want.abs().max()
    addresses = {t.data_ptr() for t in prompt.tensors() if t is not None}
    assert not addresses & {t.data_ptr() for t in copied.prompt.tensors() if t is not None}
    assert {one.shape for one in steps.at(0).modulations.values()} == {(2, 144), (2, 48)}
    arguments["encoder_hidden_states"] = -arguments["encoder_hidden_states"]
    other = model.plan_steps(timesteps.flip(0), read(model, arguments))
    assert copied.signature() == other.signature()
    copied.load(other)
    want = model(**{**arguments, "timestep": timesteps[2]}).sample
    assert (model.denoise(sample, copied.at(0)) - want).abs().max() < 1e-6 * want.abs().max()


@torch.no_grad()
def test_a_plan_holds_until_something_changes() -> None:
    edits: list[Callable[[PixArtTransformer, Tensor], Any]] = [
        lambda m, t: t.add_(1),
        lambda m, t: m.scale_shift_table.add_(1),
        lambda m, t: block(m).scale_shift_table.data.mul_(2),
        lambda m, t: m.adaln_single.linear.bias.add_(1),
        lambda m, t: m.adaln_single.emb.timestep_embedder.linear_1.weight.mul_(2),
    ]
    for edit in edits:
        model, timesteps = make(), torch.tensor([7.0, 3.0])
        arguments = inputs()
        prompt = read(model, arguments)
        steps = model.plan_steps(timesteps, prompt)
        assert model.follows(steps, prompt)
        assert not model.follows(steps, read(model, arguments, keys_multiple=8))
        edit(model, timesteps)
        assert not model.follows(steps, prompt)


# ---- LoRA, as PEFT injects it


def inject(model: PixArtTransformer) -> None:
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2", "linear",
             "proj_out", "pos_embed.proj"]  # fmt: skip
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=names), model)
    model.eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def lora(model: PixArtTransformer, act: Callable[[Any], Any]) -> int:
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        act(layer)
    return len(layers)


LORA_EDITS: dict[str, Callable[[PixArtTransformer], Any]] = {
    "weights": lambda m: lora(m, lambda layer: layer.lora_A["default"].weight.mul_(2)),
    "weights through data": lambda m: lora(m, lambda layer: layer.lora_B["default"].weight.data.neg_()),
    "strength": lambda m: lora(m, lambda layer: layer.scale_layer(0.3)),
    "off": lambda m: lora(m, lambda layer: layer.enable_adapters(False)),
}


@pytest.mark.parametrize("name", LORA_EDITS)
@torch.no_grad()
def test_lora_edits_are_seen(name: str) -> None:
    model, arguments = make(), inputs()
    plain = assert_fresh(model, arguments)
    inject(model)
    assert lora(model, lambda layer: None) == 2 * 10 + 1 + 2 * 4 + 1 + 1
    before = assert_fresh(model, arguments)
    assert (before - plain).abs().max() > 1e-3
    assert model._prompts._entries  # the layers are known: they are kept too
    LORA_EDITS[name](model)
    assert (assert_fresh(model, arguments) - before).abs().max() > 1e-4
    if name == "off":
        assert (model(**arguments).sample - plain).abs().max() < 1e-5 * plain.abs().max()


@torch.no_grad()
def test_lora_is_merged_and_scaled() -> None:
    model, arguments = make(), inputs()
    plain = assert_fresh(model, arguments)
    inject(model)
    strong = assert_fresh(model, arguments)
    weak = model(**arguments, cross_attention_kwargs={"scale": 0.0}).sample
    assert (weak - plain).abs().max() < 1e-5 * plain.abs().max()
    lora(model, lambda layer: layer.merge())
    assert (assert_fresh(model, arguments) - strong).abs().max() < 1e-4 * strong.abs().max()
