"""Each saving that the MM-DiT makes: what it replaces is gone, the result is the same up to rounding, and nothing stale
is served."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kolors_fast
from kolors_fast import MMDiT, savings
from kolors_fast.models import mmdit_blocks
from kolors_fast.ops import _attention, _products

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
    "dual_attention_layers": (0,),
}


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmdit_blocks, "JOINT_QKV_ON", ("cpu",))
    monkeypatch.setattr(mmdit_blocks, "JOINT_QKV_FROM", 1)


@pytest.fixture
def every_product_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where oneDNN for linear layers and torch's attention (a profile does not see ours) are fastest at any size,
    and projections write in place, as on a GPU."""
    monkeypatch.setattr(_attention, "ORDER", {"cpu": ("math",)})
    monkeypatch.setattr(_products, "_for_linear", lambda *_: ("onednn",))
    monkeypatch.setattr(_products, "_for_gelu", lambda *_: ("onednn",))
    in_place(monkeypatch)


def pair() -> tuple[MMDiT, diffusers.SD3Transformer2DModel]:
    torch.manual_seed(0)
    theirs = diffusers.SD3Transformer2DModel(**CONFIG).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    ours = MMDiT(**CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make() -> MMDiT:
    return pair()[0]


def inputs(batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "encoder_hidden_states": torch.randn(batch, 5, 10),
        "pooled_projections": torch.randn(batch, 7),
        "timestep": torch.full((batch,), 613.0),
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def calls(model: MMDiT, arguments: dict[str, Any]) -> Counter[str]:
    """How often each of torch's functions runs in the second step of a prompt."""
    with torch.no_grad():
        model(**arguments)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(**arguments)
    return Counter(event.name for event in profiled.events())


# what a saving does away with: torch's function that runs more often without it
REPLACED = {
    "prompt_cache": "mkldnn::_linear_pointwise",
    "fused_qkv": "mkldnn::_linear_pointwise",
    "joint_qkv": "mkldnn::_linear_pointwise",
    "residual_norm": "aten::layer_norm",
    "gelu": "aten::gelu",
    "products": "aten::linear",
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.usefixtures("every_product_of_onednn")
def test_each_saving_replaces_something_and_changes_nothing_else(name: str) -> None:
    (ours, theirs), arguments = pair(), inputs()
    with torch.no_grad():
        wide = {key: value.double() for key, value in arguments.items()}
        truth = copy.deepcopy(theirs).double()(**wide).sample
        eager = relative(theirs(**arguments).sample.double(), truth)
        on = ours(**arguments).sample
    with_saving = calls(ours, arguments)
    with kolors_fast.without(name):
        without_saving = calls(ours, arguments)
        with torch.no_grad():
            off = ours(**arguments).sample
    assert without_saving[REPLACED[name]] > with_saving[REPLACED[name]]
    for result in (on, off):
        assert relative(result.double(), truth) < 2 * eager + 1e-7


@pytest.mark.usefixtures("every_product_of_onednn")
def test_all_savings_off_is_plain_code() -> None:
    (ours, theirs), arguments = pair(), inputs()
    with kolors_fast.without(*savings.SAVINGS), torch.no_grad():
        assert relative(ours(**arguments).sample, theirs(**arguments).sample) < 2e-6


@torch.no_grad()
def test_what_two_streams_project_lies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads views of one buffer, and the output projection a view of its result."""
    in_place(monkeypatch)
    seen: list[tuple[Tensor, ...]] = []
    attend = mmdit_blocks.qk_norm_attention

    def watched(*qkv: Tensor, **options: Any) -> Any:
        seen.append(qkv)
        return attend(*qkv, **options)

    monkeypatch.setattr(mmdit_blocks, "qk_norm_attention", watched)
    ours = make()
    ours(**inputs())
    joint = [qkv for qkv in seen if qkv[1].shape[1] == 35 + 5]
    assert len(joint) == 3
    for q, k, v in joint:
        assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == 32 * q.element_size()
        assert q.stride() == k.stride() == v.stride()
    assert [q.shape[1] for q, *_ in joint] == [40, 40, 35]  # no queries of the text in the last block
    with kolors_fast.without("joint_qkv"):
        seen.clear()
        ours(**inputs())
    assert all(qkv[1].shape[1] == 35 for qkv in seen)


@torch.no_grad()
def test_only_large_samples_are_projected_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch)
    attention = make().transformer_blocks[0].attn
    x = torch.randn(2, 35, 32)
    assert attention._writes_in_place(x)
    monkeypatch.setattr(mmdit_blocks, "JOINT_QKV_FROM", 36)
    assert not attention._writes_in_place(x)
    assert attention._writes_in_place(x[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention._writes_in_place(x[:1])
    attention.to_out[0].register_forward_hook(lambda *_: None)
    assert not attention._writes_in_place(x[:1])


# ---- what is kept of prompts and steps


@torch.no_grad()
def plain(model: MMDiT, arguments: dict[str, Any]) -> Tensor:
    with kolors_fast.without(*savings.SAVINGS):
        return model(**arguments).sample


@torch.no_grad()
def assert_fresh(model: MMDiT, arguments: dict[str, Any]) -> Tensor:
    """The result with everything kept is the one of plain code."""
    got, want = model(**arguments).sample, plain(model, arguments)
    assert relative(got, want) < 1e-5
    return got


def kept(model: MMDiT) -> int:
    return len(model._prompts._entries)


def read(model: MMDiT, arguments: dict[str, Any]) -> Any:
    return model.read_prompt(arguments["encoder_hidden_states"], arguments["pooled_projections"], torch.float32)


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_steps() -> None:
    model, arguments = make(), inputs()
    prompts = [read(model, arguments)]
    for step in range(3):
        assert_fresh(model, {**arguments, "timestep": 600 - step, "hidden_states": torch.randn(2, 4, 8, 8)})
        prompts.append(read(model, arguments))
    assert all(prompt is prompts[0] for prompt in prompts)
    assert kept(model) == 1
    del arguments
    gc.collect()
    assert kept(model) == 0  # nobody can ask for it any more


EDITS: dict[str, Callable[[MMDiT, dict[str, Any]], Any]] = {
    "text in place": lambda m, a: a["encoder_hidden_states"].mul_(-1),
    "one token in place": lambda m, a: a["encoder_hidden_states"][0, -1].zero_(),
    "text through data": lambda m, a: a["encoder_hidden_states"].data.mul_(-1),
    "pooled text": lambda m, a: a["pooled_projections"].add_(1),
    "another text": lambda m, a: a.update(encoder_hidden_states=torch.randn(2, 6, 10)),
    "another batch": lambda m, a: a.update(inputs(batch=3)),
    "text projection": lambda m, a: m.context_embedder.bias[3].add_(9),
    "text projection through data": lambda m, a: m.context_embedder.weight.data.mul_(2),
    "pooled embedding": lambda m, a: m.time_text_embed.text_embedder.linear_1.weight.mul_(2),
    "time embedding": lambda m, a: m.time_text_embed.timestep_embedder.linear_2.weight.mul_(2),
    "modulation": lambda m, a: m.transformer_blocks[1].norm1_context.linear.weight.mul_(3),
    "last modulation": lambda m, a: m.norm_out.linear.bias.add_(1),
    "keys of the text": lambda m, a: m.transformer_blocks[2].attn.add_k_proj.weight.mul_(9),
    "a row of joined weights": lambda m, a: m.transformer_blocks[0].attn2.to_v.weight[3].mul_(-9),
    "joined weights through data": lambda m, a: m.transformer_blocks[0].attn.to_v.weight.data.mul_(-9),
    "new layer": lambda m, a: setattr(m, "context_embedder", nn.Linear(10, 32)),
    "state dict": lambda m, a: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "assigned state dict": lambda m, a: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "hook": lambda m, a: m.context_embedder.register_forward_hook(lambda _m, _a, out: out * 2),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("where", ["apart", "in place"])
@torch.no_grad()
def test_nothing_stale_is_served(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "in place":
        in_place(monkeypatch)
    model, arguments = make(), inputs()
    before = assert_fresh(model, arguments)
    assert torch.equal(before, model(**arguments).sample)
    EDITS[name](model, arguments)
    after = assert_fresh(model, arguments)
    assert after.shape != before.shape or relative(after, before) > 1e-4
    assert_fresh(model, arguments)


PLAN_EDITS: dict[str, Callable[[MMDiT, dict[str, Any], Tensor], Any]] = {
    "a timestep": lambda m, a, t: t[1].add_(1),
    "pooled text": lambda m, a, t: a["pooled_projections"].add_(1),
    "time embedding": lambda m, a, t: m.time_text_embed.timestep_embedder.linear_1.bias.add_(1),
    "modulation": lambda m, a, t: m.transformer_blocks[0].norm1.linear.weight.mul_(2),
    "last modulation": lambda m, a, t: m.norm_out.linear.weight.mul_(2),
}


@pytest.mark.parametrize("name", PLAN_EDITS)
@torch.no_grad()
def test_a_plan_is_followed_until_something_changes(name: str) -> None:
    model, arguments, times = make(), inputs(), torch.tensor([900.0, 613.0, 20.0])
    plan = model.plan_steps(times, read(model, arguments))
    assert relative(model.denoise(arguments["hidden_states"], plan.at(1)), plain(model, arguments)) < 1e-5
    at_device = plan.at(torch.tensor([1]))
    assert torch.equal(*(model.denoise(arguments["hidden_states"], cond) for cond in (plan.at(1), at_device)))
    assert model.follows(plan, read(model, arguments))
    PLAN_EDITS[name](model, arguments, times)
    assert not model.follows(plan, read(model, arguments))


@torch.no_grad()
def test_a_fixed_plan_takes_over_another() -> None:
    """As a captured graph does: its memory stays, its values change."""
    model, one, other = make(), inputs(), inputs()
    other["encoder_hidden_states"], other["pooled_projections"] = torch.randn(2, 5, 10), torch.randn(2, 7)
    times = torch.tensor([613.0, 20.0])
    plans = [model.plan_steps(times, read(model, arguments)) for arguments in (one, other)]
    assert plans[0].signature() == plans[1].signature()
    fixed = plans[0].fixed()
    fixed.load(plans[1])
    assert torch.equal(*(model.denoise(one["hidden_states"], plan.at(0)) for plan in (fixed, plans[1])))
    assert relative(model.denoise(one["hidden_states"], plans[0].at(0)), plain(model, one)) < 1e-5


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


@pytest.mark.parametrize("where", ["apart", "in place"])
@torch.no_grad()
def test_copies_and_moves_keep_nothing_foreign(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "in place":
        in_place(monkeypatch)
    model, arguments = make(), inputs()
    want = assert_fresh(model, arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(other) == 0
        assert torch.equal(other(**arguments).sample, want)
        other.transformer_blocks[0].attn.to_k.weight.mul_(2)
        assert not torch.equal(assert_fresh(other, arguments), want)
    assert torch.equal(model(**arguments).sample, want)
    double = {key: value.double() for key, value in arguments.items()}
    model.double()
    attention = model.transformer_blocks[0].attn
    assert attention._joined.weight is attention._joined_added.weight is None  # or the old weights would stay in memory
    assert relative(model(**double).sample, want.double()) < 1e-5


def test_training_leaves_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch)
    model, arguments = make(), inputs()
    attention = model.transformer_blocks[0].attn
    addresses = [attention.to_q.weight.data_ptr(), attention.to_k.weight.data_ptr(), attention.to_v.weight.data_ptr()]
    model(**arguments).sample.sum().backward()
    model.train()
    with torch.no_grad():
        model(**arguments)
    assert addresses == [getattr(attention, name).weight.data_ptr() for name in ("to_q", "to_k", "to_v")]


# ---- LoRA, as PEFT injects it


def inject(model: MMDiT) -> None:
    targets = ["to_q", "add_v_proj", "to_out.0", "context_embedder", "linear_1", "norm1.linear", "ff.net.0.proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    model.eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


def lora(model: MMDiT, act: Callable[[Any], Any]) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            act(module)


LORA_EDITS: dict[str, Callable[[MMDiT], Any]] = {
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
    assert relative(before, plain_result) > 1e-3
    assert kept(model) > 0  # the layers are known: they are kept too
    LORA_EDITS[name](model)
    assert relative(assert_fresh(model, arguments), before) > 1e-4


# ---- torch.compile


@torch.no_grad()
def test_a_compiled_denoiser_keeps_what_is_kept_of_prompts() -> None:
    """After `model.denoise = torch.compile(model.denoise)` no step and no prompt compiles again."""
    (ours, theirs), arguments = pair(), inputs()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ours.denoise = torch.compile(ours.denoise, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for change in ({}, {"timestep": torch.full((2,), 3.0)}, {"encoder_hidden_states": torch.randn(2, 5, 10)}):
        given = {**arguments, **change}
        assert relative(ours(**given).sample, theirs(**given).sample) < 2e-6
    assert counters["stats"]["unique_graphs"] == 1
