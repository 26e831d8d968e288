"""What checkpointed blocks keep, beside diffusers and beside saved-tensor hooks; that gradients, state dicts, LoRA
layers, copies, compiled graphs and sharded models are as without it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import measure_activations

from kolors_fast import KolorsUNet, MMDiT, PixArtTransformer
from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.layers import ResnetBlock, store_convolutions
from kolors_fast.models.mmdit_blocks import JointBlock, Modulation, Stream
from kolors_fast.models.pixart_blocks import TransformerBlock as PixArtBlock
from kolors_fast.models.unet_blocks import TransformerBlock as UNetBlock
from kolors_fast.ops import _library, _products
from kolors_fast.training import activation_checkpointing
from kolors_fast.training.activation_checkpointing import (
    ATTENTION,
    PRODUCTS,
    checkpoint_activations,
    keep_activations,
)
from kolors_fast.training.trainer import computing_in

MODES = ("selective", "full")
# full adds residuals up by themselves, so it is another formulation: in float64 that cannot hide anything
EXACT = {"selective": (torch.float32, 0.0, 0.0), "full": (torch.float64, 1e-9, 1e-15)}
UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "encoder_hid_dim": 10,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
}
MMDIT: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
    "sample_size": 8,
}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "unet": (KolorsUNet, UNET),
    "mmdit": (MMDiT, MMDIT),
    "mmdit, dual and norms": (MMDiT, {**MMDIT, "dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}),
    "pixart": (PixArtTransformer, PIXART),
}


def model_of(name: str, mode: str = "selective") -> Any:
    """In the dtype in which `mode` is compared."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(**config).train().to(EXACT[mode][0])
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start out trivial
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def predict(model: Any, name: str) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(1), next(model.parameters()).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(dtype)

    sample, text, timestep = normal(4, 8, 8), normal(7, 10), torch.tensor([30, 613])
    if name == "unet":
        added = {"text_embeds": normal(10), "time_ids": 100 * normal(6)}
        return model(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
    if name == "pixart":
        mask = (torch.arange(7) < torch.tensor([[1], [5]])).long()
        return model(sample, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    return model(sample, text, normal(7), timestep, return_dict=False)[0]


def gradients(model: Any, name: str, precision: str = "fp32") -> dict[str, Tensor]:
    """As the trainer computes them: backward outside of autocast and of its function mode."""
    model.zero_grad(set_to_none=True)
    with computing_in(precision):
        loss = predict(model, name).to(next(model.parameters()).dtype).square().mean()
    loss.backward()
    found = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], mode: str = "selective") -> None:
    dtype, rtol, atol = EXACT[mode]
    assert got.keys() == want.keys() and len(want) > 20 and want["loss"].dtype == dtype
    for key, value in want.items():
        assert (got[key] - value).abs().max() <= atol + rtol * value.abs().max(), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_selective_changes_no_bit_of_a_gradient(name: str, precision: str) -> None:
    model = model_of(name)
    plain = gradients(model, name, precision)
    checkpoint_activations(model)
    assert_same(gradients(model, name, precision), plain)
    keep_activations(model)
    assert_same(gradients(model, name, precision), plain)


@pytest.mark.parametrize("name", MODELS)
def test_full_has_the_same_gradients(name: str) -> None:
    model = model_of(name, "full")
    plain = gradients(model, name)
    checkpoint_activations(model, "full")
    assert_same(gradients(model, name), plain, "full")


@pytest.mark.parametrize("name", MODELS)
def test_full_under_the_trainers_precision(name: str) -> None:
    """Whose attention in float32 is a function mode, which torch does not bring back for the second forward pass."""
    model = model_of(name)
    checkpoint_activations(model, "full")
    wide, narrow = gradients(model, name), gradients(model, name, "bf16")
    error = sum((narrow[key] - value).norm() ** 2 for key, value in wide.items()) ** 0.5
    assert error < 0.1 * sum(value.norm() ** 2 for value in wide.values()) ** 0.5


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_selective_computes_norms_anew_and_no_product(name: str) -> None:
    def calls(model: Any) -> Counter[str]:
        loss = predict(model, name).square().mean()
        with Counted() as counted:
            loss.backward()
        return counted.calls

    model = model_of(name)
    plain = calls(model)
    checkpoint_activations(model)
    again = calls(model) - plain
    assert [op for op in again if "norm" in op]
    assert not [op for op in again if op in PRODUCTS or any(part in op for part in ATTENTION)]


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_that_onednn_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are its own under selective, too, and none is computed anew."""
    monkeypatch.setattr(_products, "_for_linear", lambda *shapes: ("onednn",))
    model = model_of(name)

    def run() -> tuple[dict[str, Tensor], Counter[str]]:
        with Counted() as counted, monkeypatch.context() as patch:
            patch.setattr(_library, "_CHECKPOINTING", (*_library._CHECKPOINTING, Counted))
            found = gradients(model, name)
        return found, counted.calls

    plain, calls = run()
    checkpoint_activations(model)
    found, again = run()
    assert_same(found, plain)
    assert calls["_linear_pointwise"] > 20 and again["_linear_pointwise"] == calls["_linear_pointwise"]


# ---- bytes

BLOCKS = measure_activations.BLOCKS


def hooked(provider: measure_activations.Provider) -> int:
    """What saved-tensor hooks see."""
    free = {t.untyped_storage()._cdata for t in (*provider.module.parameters(), *provider.inputs)}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in free:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        provider.forward()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("who", ["diffusers", "kolors_fast"])
def test_what_is_alive_is_what_hooks_see(case: str, who: str) -> None:
    provider = BLOCKS[case](torch.float32)[who]
    assert measure_activations.measure(provider).kept == hooked(provider)


# case -> what ours keeps of diffusers' bytes, and under "selective"
MOST = dict(
    zip(BLOCKS, ((0.81, 0.60), (0.51, 0.18), (0.35, 0.08), (0.91, 0.51), (0.85, 0.43), (0.92, 0.62)), strict=True)
)


@pytest.mark.parametrize("dtype", measure_activations.DTYPES, ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_bytes_of_blocks_beside_diffusers(case: str, dtype: torch.dtype) -> None:
    found = measure_activations.line_up(BLOCKS[case](dtype), dtype)
    kept = {name: one.kept / found["diffusers"].kept for name, one in found.items()}
    assert kept["kolors_fast"] <= MOST[case][0] and kept["selective"] <= MOST[case][1] and kept["full"] <= 0.01


@pytest.mark.parametrize("dtype", measure_activations.DTYPES, ids=str)
def test_bytes_of_a_unet_beside_diffusers(dtype: torch.dtype) -> None:
    """At the peak, too, of a model of many blocks."""
    small = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 3), "layers_per_block": 1}
    providers = measure_activations.unet(dtype, {**measure_activations.SMALL_UNET, **small}, side=16)
    found = measure_activations.line_up(providers, dtype)
    for bytes_of in (lambda one: one.kept, lambda one: one.peak):
        most = bytes_of(found["diffusers"])
        for name, share in (("kolors_fast", 0.6), ("selective", 0.45), ("full", 0.17)):
            assert bytes_of(found[name]) <= share * most, (name, bytes_of(found[name]) / most)


@pytest.mark.parametrize("kind", [UNetBlock, JointBlock, PixArtBlock])
def test_full_keeps_one_tensor_between_blocks(kind: type[nn.Module]) -> None:
    """Of three blocks the inputs of the last two; of an MM-DiT's two streams one each."""
    dim, joint = 64, kind is JointBlock
    blocks = nn.ModuleList(kind(dim, 2, **({"dual": True, "last": False} if joint else {"text_dim": 8})) for _ in "123")
    x, text = torch.randn(2, 256, dim, requires_grad=True), torch.randn(2, 128, dim if joint else 8)
    modulations = {m: torch.randn(2, m.parts * dim) for m in blocks.modules() if isinstance(m, Modulation)}
    modulations |= {block: torch.randn(2, 6 * dim) for block in blocks}
    cond = Conditioning(SimpleNamespace(of=lambda attention: attention.keys_values(text), bias=None), modulations)
    checkpoint_activations(blocks, "full")

    def forward() -> list[Tensor]:
        state: Any = (Stream(x), Stream(text)) if joint else (x, None)
        for block in blocks:
            state = block(*state, cond)
        return [one.x for one in state] if joint else [state[0]]

    provider = measure_activations.Provider(blocks, forward, [x, text, *modulations.values()])
    most = 2 * (x.nbytes + (text.nbytes if joint else 0))
    assert measure_activations.measure(provider).kept == pytest.approx(most, rel=0.1)


# ---- what stays as it was


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_modules_and_copies(name: str, mode: str) -> None:
    model = model_of(name, mode)
    keys, modules = list(model.state_dict()), [path for path, _ in model.named_modules()]
    checkpoint_activations(model, mode)
    assert list(model.state_dict()) == keys
    assert [path for path, _ in model.named_modules()] == modules
    want = gradients(model, name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # which a copy that ran the blocks of the other one would feel
        assert_same(gradients(other, name), want, mode)
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("first", ["lora", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["unet", "mmdit", "pixart"])
def test_lora_layers(name: str, mode: str, first: str) -> None:
    """Injected by path, before or after; the base's weights have no gradient."""
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "net.0.proj", "net.2"], init_lora_weights=False)

    def adapted(*steps: Callable[[Any], Any]) -> Any:
        model = model_of(name, mode)
        torch.manual_seed(2)
        for step in steps:
            step(model)
        return model

    def inject(model: Any) -> None:
        peft.inject_adapter_in_model(config, model).to(EXACT[mode][0])

    def checkpointed(model: Any) -> None:
        checkpoint_activations(model, mode)

    plain = adapted(inject)
    steps = (inject, checkpointed) if first == "lora" else (checkpointed, inject)
    model = adapted(*steps)
    assert list(model.state_dict()) == list(plain.state_dict())
    want = gradients(plain, name)
    assert "lora_A" in "".join(want) and not any("base_layer" in key for key in want)
    assert_same(gradients(model, name), want, mode)


def test_undone() -> None:
    model = model_of("unet")
    before = {path: set(module.__dict__) for path, module in model.named_modules()}
    for mode in MODES:
        checkpoint_activations(model, mode)
    keep_activations(model)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == before


def test_nothing_is_checkpointed_where_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("unet")
    checkpoint_activations(model)
    monkeypatch.delattr(activation_checkpointing, "checkpoint")
    with torch.no_grad():
        predict(model, "unet")
    with pytest.raises(NameError):
        predict(model, "unet")


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_transformer_is_one_graph(mode: str) -> None:
    model = model_of("pixart")
    checkpoint_activations(model, mode)
    plain = gradients(model, "pixart")
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, "pixart"), plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_residual_block_is_one_graph(mode: str) -> None:
    torch.manual_seed(0)
    block = ResnetBlock(12, 8, time_dim=None, num_groups=4, eps=1e-5)
    x, skip = (torch.randn(2, c, 6, 6).to(memory_format=torch.channels_last) for c in (8, 4))
    checkpoint_activations(block, mode)

    def weights() -> list[Tensor]:
        return list(torch.autograd.grad(block(x, None, skip).square().mean(), list(block.parameters())))

    plain = weights()
    torch.compiler.reset()
    block.compile(backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, weights(), plain))


# ---- several processes


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["unet", "mmdit", "pixart"])
def test_under_ddp(name: str, mode: str, one_process: None) -> None:
    model = model_of(name, mode)
    plain = gradients(model, name)
    checkpoint_activations(model, mode)
    found = gradients(DistributedDataParallel(model), name)
    assert_same({k.removeprefix("module."): v for k, v in found.items()}, plain, mode)


@pytest.mark.parametrize("first", ["sharding", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
def test_under_fsdp2(mode: str, first: str, one_process: None) -> None:
    """Each transformer block a group of its own, whose weights are gathered for the second forward pass too."""
    model = model_of("unet", mode)
    plain = gradients(model, "unet")
    store_convolutions(model, torch.contiguous_format)  # FSDP2 shards no other layout
    if first == "checkpointing":
        checkpoint_activations(model, mode)
    for block in [module for module in model.modules() if isinstance(module, UNetBlock)]:
        fully_shard(block)
    fully_shard(model)
    if first == "sharding":
        checkpoint_activations(model, mode)
    found = {key: value.full_tensor() if key != "loss" else value for key, value in gradients(model, "unet").items()}
    assert_same(found, plain, mode)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mode: expected one of selective, full, got 'some'"):
        checkpoint_activations(model_of("pixart"), "some")
    with pytest.raises(
        ValueError, match=r"model: expected one with blocks \(TransformerBlock, JointBlock, .*got Linear"
    ):
        checkpoint_activations(nn.Linear(2, 2))
