"""ChatGLM against diffusers' copy of the original ChatGLMModel, on random weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolors_fast.models.activations import activation_bytes
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.checkpoint import CheckpointError

SMALL = {
    "num_layers": 3,
    "padded_vocab_size": 71,
    "hidden_size": 48,
    "ffn_hidden_size": 68,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 64,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
}
CONFIGS = {
    "released-shape": {},
    "one-group": {"multi_query_group_num": 1},
    "no-qkv-bias": {"add_qkv_bias": False},
    "head-size-8": {"kv_channels": 8, "num_attention_heads": 6},
    "multi-head-all-biases": {"multi_query_attention": False, "add_bias_linear": True},
}


def pair(changes: dict[str, Any]) -> tuple[ChatGLM, ChatGLMModel]:
    """Ours and diffusers' with the same weights, large enough that every term matters."""
    torch.manual_seed(0)
    config = {**SMALL, **changes}
    ours = ChatGLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    # the two names that the released config.json has and the class does not default
    theirs = ChatGLMModel(ChatGLMConfig(**config, original_rope=True, use_cache=False), empty_init=False).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["output_layer.weight"] and not unexpected
    return ours, theirs


def prompts(lengths: list[int], total: int) -> dict[str, Tensor]:
    """Left-padded token batch, as the tokenizer makes it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), total, dtype=torch.int64)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, total - n :] = torch.randint(1, 71, (n,), generator=generator)
        mask[row, total - n :] = 1
        positions[row, total - n :] = torch.arange(n)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """fp32 rounding through a few layers: 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("lengths", [[13, 13], [2, 7], [1, 13, 5]], ids=["full", "padded", "mixed"])
@torch.no_grad()
def test_forward_matches_diffusers(changes: dict[str, Any], lengths: list[int]) -> None:
    ours, theirs = pair(changes)
    inputs = prompts(lengths, 13)
    expected = theirs(**inputs, output_hidden_states=True, return_dict=True)
    got = ours(**inputs)
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine, other)
    assert_close(got.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_forward_without_mask_and_positions_matches_diffusers() -> None:
    ours, theirs = pair({})
    ids = prompts([13, 13], 13)["input_ids"]
    expected = theirs(ids, output_hidden_states=True, return_dict=False)
    got = ours(ids, return_dict=False)
    assert_close(got[0], expected[0])
    assert_close(got[1][-1], expected[1][-1])


@torch.no_grad()
def test_positions_beyond_seq_length() -> None:
    """Rotary attention sees differences of positions only, so a shift of all of them changes nothing."""
    ours, _ = pair({})
    inputs = prompts([13], 13)
    near = ours(**inputs).last_hidden_state
    inputs["position_ids"] += 5 * SMALL["seq_length"]
    assert_close(ours(**inputs).last_hidden_state, near)


@torch.no_grad()
def test_text_features_are_what_the_diffusers_pipeline_takes() -> None:
    ours, theirs = pair({})
    inputs = prompts([2, 7], 13)
    expected = theirs(**inputs, output_hidden_states=True, return_dict=True)
    embeds, pooled = ours.text_features(**inputs)
    assert_close(embeds, expected.hidden_states[-2].permute(1, 0, 2))
    assert_close(pooled, expected.hidden_states[-1][-1])


@pytest.mark.parametrize("lengths", [[2, 31], [12], [256, 2], [256], [1, 5, 200]], ids=str)
@torch.no_grad()
def test_collapsed_pads_are_exact(lengths: list[int]) -> None:
    """Against the full run over 256 positions: every real token, the pad, and what an attention reads from them."""
    ours, _ = pair({})
    inputs = prompts(lengths, 256)
    full, full_pooled = ours.text_features(**inputs)
    embeds, key_bias, pooled = ours.text_features_collapsed(**inputs)
    assert embeds.shape == (len(lengths), max(lengths) + 1, 48) and key_bias.dtype == torch.float32
    assert_close(pooled, full_pooled)
    for row, n in enumerate(lengths):
        assert_close(embeds[row, 1 : n + 1], full[row, 256 - n :])
        if n < 256:
            assert_close(embeds[row, :1].expand(256 - n, -1), full[row, : 256 - n])
        assert key_bias[row, 0].item() == pytest.approx(math.log(256 - n) if n < 256 else -math.inf)
        assert (key_bias[row, 1 : n + 1] == 0).all() and (key_bias[row, n + 1 :] == -math.inf).all()
        assert (embeds[row, n + 1 :] == 0).all()
    query = torch.randn(len(lengths), 5, 48)
    read_full = (query @ full.mT).softmax(-1) @ full
    read_collapsed = (query @ embeds.mT + key_bias[:, None]).softmax(-1) @ embeds
    assert_close(read_collapsed, read_full)


@torch.no_grad()
def test_collapsed_pads_without_position_ids() -> None:
    ours, _ = pair({})
    inputs = prompts([2, 7], 13)
    expected = ours.text_features_collapsed(**inputs)
    del inputs["position_ids"]
    for got, wanted in zip(ours.text_features_collapsed(**inputs), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_errs_no_more_than_diffusers(dtype: torch.dtype) -> None:
    ours, theirs = pair({})
    inputs = prompts([2, 7, 13], 13)
    truth = ours.double().text_features(**inputs)[0]
    theirs = theirs.to(dtype)
    reference = theirs(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-2].permute(1, 0, 2)
    ours = ours.to(dtype)
    got = ours.text_features(**inputs)[0]
    allowed = (reference.double() - truth).abs().mean()
    assert got.dtype == dtype
    assert (got.double() - truth).abs().mean() <= 1.1 * allowed
    collapsed, _, _ = ours.text_features_collapsed(**inputs)
    assert (collapsed[1, :8].double() - truth[1, 5:]).abs().mean() <= 1.1 * allowed


def test_language_model_learns() -> None:
    """A few steps on one repeating sentence bring the loss near zero, so gradients reach every parameter."""
    torch.manual_seed(0)
    model = ChatGLM(**SMALL, add_lm_head=True)
    ids = torch.arange(1, 13).repeat(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        logits = model.logits(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(71), rel=0.1)
    assert losses[-1] < 0.1 * losses[0]


def test_gradients_match_diffusers() -> None:
    ours, theirs = pair({})
    inputs = prompts([2, 7], 13)
    ours(**inputs).hidden_states[-1].square().sum().backward()
    theirs(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1].square().sum().backward()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "final_layernorm" in name:
            continue  # no hidden state passes through it
        assert (parameter.grad - others[name].grad).abs().max() <= 1e-4 * others[name].grad.abs().max(), name


def test_save_and_load(tmp_path: Path) -> None:
    model = ChatGLM.from_config({**SMALL, "eos_token_id": 2}).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["ChatGLMModel"] and config["eos_token_id"] == 2
    assert "_class_name" not in config and "add_lm_head" not in config
    again = ChatGLM.from_pretrained(tmp_path, subfolder="text_encoder")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_diffusers_loads_what_we_save(tmp_path: Path) -> None:
    model = ChatGLM.from_config({**SMALL, "use_cache": False}, add_lm_head=True)
    model.save_pretrained(tmp_path)
    state = ChatGLMModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_loads_what_diffusers_saves(tmp_path: Path) -> None:
    """Its files hold the output layer, which is skipped."""
    ours, theirs = pair({})
    theirs.save_pretrained(tmp_path)
    assert "output_layer.weight" in load_file(tmp_path / "model.safetensors")
    loaded = ChatGLM.from_pretrained(tmp_path)
    assert loaded.output_layer is None
    inputs = prompts([2, 7], 13)
    with torch.no_grad():
        assert torch.equal(loaded.text_features(**inputs)[0], ours.text_features(**inputs)[0])


def test_loads_prefixed_keys_without_the_buffer(tmp_path: Path) -> None:
    """The layout of chat checkpoints."""
    model = ChatGLM.from_config(SMALL)
    model.save_pretrained(tmp_path)
    state = {f"transformer.{k}": v for k, v in model.state_dict().items() if "inv_freq" not in k}
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ChatGLMForConditionalGeneration"]}))
    loaded = ChatGLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_quantised_while_loading_is_quantised_afterwards(tmp_path: Path, quantization: str) -> None:
    """From a file of fp16 weights with an output layer; all but the four projections is loaded as ever."""
    pair({})[1].half().save_pretrained(tmp_path)
    plain = ChatGLM.from_pretrained(tmp_path, torch_dtype=torch.float16)
    other = ChatGLM.from_pretrained(tmp_path, torch_dtype=torch.float16).quantize_(quantization)
    loaded = ChatGLM.from_pretrained(tmp_path, torch_dtype=torch.float16, quantization=quantization)
    assert plain.quantization is None and loaded.quantization == other.quantization == quantization
    assert not loaded.training and loaded.dtype == torch.float16
    state = loaded.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    changed = {key for key, value in plain.state_dict().items() if state[key].dtype != value.dtype}
    assert len(changed) == 4 * SMALL["num_layers"] and all(key.endswith(".weight") for key in changed)
    inputs = prompts([2, 7], 13)
    assert torch.equal(loaded.text_features(**inputs)[0], other.text_features(**inputs)[0])


@torch.no_grad()
def test_error_of_quantisation() -> None:
    """int8 errs like bf16, which rounds everything, to a few times; int4 less than with one scale per row."""
    torch.manual_seed(0)
    config = {**SMALL, "hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64}
    model = ChatGLM.from_config(config).eval()
    inputs = prompts([2, 7, 13], 13)
    truth = copy.deepcopy(model).double().text_features(**inputs)[0]

    def error(other: ChatGLM) -> float:
        return (other.text_features(**inputs)[0].double() - truth).square().mean().sqrt().item()

    rough = copy.deepcopy(model)
    for name, module in rough.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert name.endswith(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"))
            step = module.weight.abs().amax(1, keepdim=True) / 7
            module.weight.copy_((module.weight / step).round() * step)
    bf16, int8, int4 = (
        error(copy.deepcopy(model).bfloat16()),
        error(copy.deepcopy(model).quantize_("int8")),
        error(copy.deepcopy(model).quantize_("int4")),
    )
    assert int8 < 4 * bf16 and int8 < int4 < 0.9 * error(rough)


def test_the_output_layer_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair({})[1].save_pretrained(tmp_path)
    touched = []
    load = ChatGLM._load_tensor

    def record(self: ChatGLM, key: str, *others: Any) -> dict[str, Tensor]:
        touched.append(key)
        return load(self, key, *others)

    monkeypatch.setattr(ChatGLM, "_load_tensor", record)
    ChatGLM.from_pretrained(tmp_path)
    assert len(touched) == len(ChatGLM.from_config(SMALL).state_dict())
    assert not any("output_layer" in key for key in touched)


@torch.no_grad()
def test_states_that_nobody_asked_for_are_freed() -> None:
    """The peak of reading a prompt does not grow with the number of layers."""

    def read(model: ChatGLM) -> Any:
        ids = torch.zeros(2, 13, dtype=torch.int64)
        return model.text_features(ids, torch.ones_like(ids))

    def peak(layers: int) -> int:
        return activation_bytes(ChatGLM.empty({**SMALL, "num_layers": layers}), read)

    assert peak(2) == peak(6)


def test_released_size() -> None:
    """The released config gives the released parameter count, less the unused output layer."""
    released = {
        "ffn_hidden_size": 13696,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
    }
    with torch.device("meta"):
        model = ChatGLM.from_config(released)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000 - 266_338_304
    assert len(model.state_dict()) == 199


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="supports only rmsnorm=True, got False"):
        ChatGLM(**SMALL, rmsnorm=False)
    with pytest.raises(ValueError, match="multiple of multi_query_group_num=3, got 4"):
        ChatGLM.from_config(SMALL, multi_query_group_num=3)
    with pytest.raises(ValueError, match="quantization: expected 'int8' or 'int4', got 'int3'"):
        ChatGLM.from_config(SMALL).quantize_("int3")
    quantised = ChatGLM.from_config(SMALL).quantize_("int8")
    with pytest.raises(ValueError, match="expected a model that is not quantised, got int8"):
        quantised.quantize_("int4")
    with pytest.raises(ValueError, match="save_pretrained: expected a model that is not quantised, got int8"):
        quantised.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kv_channels must be a multiple of 4"):
        ChatGLM.from_config(SMALL, kv_channels=6)
    model = ChatGLM.from_config(SMALL)
    inputs = prompts([2, 7], 13)
    with pytest.raises(ValueError, match="add_lm_head=True"):
        model.logits(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"\(2, 13\), got \(2, 12\)"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, 1:])
    with pytest.raises(ValueError, match="padding on the left"):
        model.text_features_collapsed(inputs["input_ids"], inputs["attention_mask"].flip(1))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "architectures": ["T5EncoderModel"]}))
    with pytest.raises(CheckpointError, match="describes a T5EncoderModel"):
        ChatGLM.from_pretrained(tmp_path)
