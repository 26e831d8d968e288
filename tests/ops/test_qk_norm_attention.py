"""Beyond the generated tests of `qk_norm` and `qk_norm_attention`: refusals, views, the choice of an attention."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import AddedStream, _attention, explain, qk_norm, qk_norm_attention, use_backend
from kolors_fast.ops._attention import ORDER, Request, choose, reasons

BF16 = Request("cuda", 90, torch.bfloat16, 64, False, False, True, 20, 4096)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs() -> dict[str, Any]:
    return {"q": rows(2, 5, 3, 8), "k": rows(2, 7, 3, 8), "v": rows(2, 7, 3, 8)}


def stream(**change: Any) -> AddedStream:
    return AddedStream(rows(2, 4, 3, 8), rows(2, 6, 3, 8), rows(2, 6, 3, 8))._replace(**change)


# ---- refusals


@pytest.mark.parametrize("op", [qk_norm, qk_norm_attention], ids=["qk_norm", "qk_norm_attention"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": rows(5, 8)}, ValueError, r"q: expected \[B, L, H, D\], got \[5, 8\]"),
        (
            {"q": torch.ones(2, 5, 3, 8, dtype=torch.int32)},
            TypeError,
            "q: expected a floating dtype of 16 to 64 bits, got torch.int32",
        ),
        ({"k": rows(1, 7, 3, 8)}, ValueError, r"k: expected \[2, S, 3, 8\], got \[1, 7, 3, 8\]"),
        ({"k": rows(2, 7, 1, 8)}, ValueError, r"k: expected \[2, S, 3, 8\], got \[2, 7, 1, 8\]"),
        ({"k": rows(2, 7, 3, 4)}, ValueError, r"k: expected \[2, S, 3, 8\], got \[2, 7, 3, 4\]"),
        ({"k": rows(2, 7, 3, 8).half()}, TypeError, "k: expected torch.float32, got torch.float16"),
        ({"k": torch.ones(2, 7, 3, 8, device="meta")}, ValueError, "k: expected a tensor on cpu, got meta"),
        ({"v": rows(2, 6, 3, 8)}, ValueError, r"v: expected \[2, 7, 3, 8\], got \[2, 6, 3, 8\]"),
        ({"q_weight": rows(4)}, ValueError, r"q_weight: expected \[8\], got \[4\]"),
        ({"k_weight": rows(8).half()}, TypeError, "k_weight: expected torch.float32, got torch.float16"),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
        ({"added": stream(q=rows(2, 4, 2, 8))}, ValueError, r"added.q: expected \[2, L2, 3, 8\], got \[2, 4, 2, 8\]"),
        ({"added": stream(k=rows(3, 6, 3, 8))}, ValueError, r"added.k: expected \[2, S2, 3, 8\], got \[3, 6, 3, 8\]"),
        ({"added": stream(v=rows(2, 5, 3, 8))}, ValueError, r"added.v: expected \[2, 6, 3, 8\], got \[2, 5, 3, 8\]"),
        ({"added": stream(v=None)}, ValueError, "added.v: expected a tensor if, and only if, v is one, got None"),
        ({"added": stream(k_weight=rows(3))}, ValueError, r"added.k_weight: expected \[8\], got \[3\]"),
    ],
)
def test_refusals_name_the_argument(op: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**(inputs() | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_bias": torch.zeros(2, 6)}, ValueError, r"key_bias: expected \[2, 7\], got \[2, 6\]"),
        ({"key_bias": torch.zeros(7)}, ValueError, r"key_bias: expected \[2, 7\], got \[7\]"),
        ({"key_bias": torch.zeros(2, 7), "added": stream()}, ValueError, r"key_bias: expected \[2, 13\], got \[2, 7\]"),
        ({"key_bias": torch.zeros(2, 7).half()}, TypeError, "key_bias: expected torch.float32, got torch.float16"),
        ({"scale": 0.0}, ValueError, "scale: expected a positive number, got 0.0"),
        ({"k": rows(2, 0, 3, 8), "v": rows(2, 0, 3, 8)}, ValueError, "k: expected at least one key, got none"),
    ],
)
def test_the_attention_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^qk_norm_attention: {message}"):
        qk_norm_attention(**(inputs() | change))


# ---- what passes through, and what is read in place


def test_what_is_neither_normalised_nor_joined_is_returned_as_it_came() -> None:
    given, weight = inputs(), torch.ones(8)
    assert all(a is b for a, b in zip(qk_norm(**given), given.values(), strict=True))
    q, k, v = qk_norm(**given, q_weight=weight)
    assert q is not given["q"] and k is given["k"] and v is given["v"]
    q, k, v = qk_norm(**given, added=stream(q=None))
    assert q is given["q"] and k.shape == v.shape == (2, 13, 3, 8)  # type: ignore[union-attr]


def test_a_gradient_reaches_what_passes_through_once() -> None:
    given = {name: x.requires_grad_() for name, x in inputs().items()}
    q, k, v = qk_norm(**given, k_weight=torch.ones(8))
    assert q is given["q"] and v is given["v"]
    grads = torch.autograd.grad((q.sum() + k.sum() + v.sum()), (given["q"], given["v"]))
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_views_of_a_fused_projection_are_read_in_place(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    projected = rows(2, 5, 3 * 3 * 16).view(2, 5, 3, 3, 16)
    q, k, v = projected.unbind(2)
    weight = rows(16)
    expected = qk_norm_attention(q.contiguous(), k.contiguous(), v.contiguous(), q_weight=weight, k_weight=weight)
    monkeypatch.setattr(Tensor, "contiguous", _refuse_rows(Tensor.contiguous))
    with use_backend(backend):
        out = qk_norm_attention(q, k, v, q_weight=weight, k_weight=weight)
    torch.testing.assert_close(out, expected)


def _refuse_rows(contiguous: Any) -> Any:
    def checked(x: Tensor) -> Tensor:
        assert x.is_contiguous() or x.dim() != 4, "copied"
        result: Tensor = contiguous(x)
        return result

    return checked


@pytest.mark.parametrize("batch", [1, 2])
def test_results_are_contiguous_per_stream(batch: int) -> None:
    given = {name: x[:batch] for name, x in inputs().items()}
    added = AddedStream(*(x[:batch] for x in stream()[:3]))  # type: ignore[index]
    out, added_out = qk_norm_attention(**given, added=added)
    assert out.is_contiguous() and added_out.is_contiguous()
    out, added_out = qk_norm_attention(**given, added=added._replace(q=None))
    assert out.is_contiguous() and added_out is None


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_two_streams_attend_as_one_sequence(backend: str) -> None:
    """Without weights, the joint attention is torch's attention over the concatenated sequences."""
    given, added = inputs(), stream()
    bias = rows(2, 13)
    q, k, v = (torch.cat([x, y], dim=1).double().transpose(1, 2) for x, y in zip(given.values(), added, strict=False))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.double()[:, None, None], scale=0.3)
    with use_backend(backend):
        both = qk_norm_attention(**given, added=tuple(added), key_bias=bias, scale=0.3)
    torch.testing.assert_close(torch.cat(both, dim=1).double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_compiled_calls_see_torchs_own_attention() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    given = inputs() | {"q_weight": torch.ones(8), "k_weight": torch.ones(8)}
    torch.compile(qk_norm_attention, fullgraph=True, backend=backend)(**given)
    with use_backend("triton"):
        torch.compile(qk_norm_attention, fullgraph=True, backend=backend)(**given)
    assert "kolors_fast.qk_norm.default" in graphs[0] and "scaled_dot_product_attention" in graphs[0]
    assert "kolors_fast.qk_norm_attention.default" in graphs[1]


# ---- the choice of an attention


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Stand-ins for flash_attn, FlashAttention-3 and xformers that keep their calls and answer with SDPA."""
    calls: dict[str, list[dict[str, Any]]] = {"flash_attn": [], "flash_attn_interface": [], "xformers.ops": []}

    def attention(name: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
            calls[name].append({"bias": bias, **options})
            scale = options.get("softmax_scale", options.get("scale"))
            heads = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=scale).transpose(1, 2)
            return (out, None) if name == "flash_attn_interface" else out

        return run

    for name in calls:
        module = ModuleType(name)
        function = "memory_efficient_attention" if name == "xformers.ops" else "flash_attn_func"
        setattr(module, function, attention(name))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setattr(_attention, "missing", _attention.missing.__wrapped__)  # asked anew each time
    monkeypatch.setattr(_attention, "_flash_in_torch", lambda: True)
    monkeypatch.setattr(_attention._backends, "unavailable", lambda backend: None)
    monkeypatch.setattr(_attention._products, "choose", lambda *_: ("kolors_fast",))
    return calls


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (BF16, "flash_attn_3"),
        (BF16._replace(architecture=80), "sdpa"),
        (BF16._replace(architecture=100), "sdpa"),
        (BF16._replace(biased=True), "sdpa"),
        (BF16._replace(keys=64), "triton_few_keys"),
        (BF16._replace(keys=65), "flash_attn_3"),
        (BF16._replace(keys=128, biased=True), "triton_few_keys"),
        (BF16._replace(keys=129, biased=True), "sdpa"),
        (BF16._replace(keys=65, biased=True, head_dim=72), "sdpa"),
        (BF16._replace(keys=64, plain=False), "flash_attn_3"),
        (BF16._replace(keys=64, architecture=80), "sdpa"),
        (BF16._replace(dtype=torch.float32), "sdpa"),
        (BF16._replace(head_dim=512), "sdpa"),
        (Request("cpu", 0, torch.float32, 64, False, False, True, 8, 64), "kolors_fast"),
        (Request("cpu", 0, torch.float32, 64, False, False, False), "math"),
        (Request("cpu", 0, torch.bfloat16, 64, False, False, True), "math"),
        (Request("mps", 0, torch.float32, 64, False, False, True), "math"),
    ],
)
def test_the_first_that_can_is_chosen(installed: Any, request_: Request, chosen: str) -> None:
    assert choose(request_) == chosen
    table = reasons(request_)
    assert list(table) == list(ORDER.get(request_.device, ("math",)))
    assert [name for name, verdict in table.items() if verdict == "runs"] == [chosen]
    before = list(table.values())[: list(table).index(chosen)]
    assert all(verdict.startswith("declines: ") for verdict in before)


def test_whoever_packed_gets_another_attention_than_tritons(installed: Any) -> None:
    assert choose(BF16._replace(keys=64), packed=True) == "flash_attn_3"
    odd = BF16._replace(head_dim=10, biased=True)
    assert choose(odd) == "triton" and choose(odd, packed=True) == "math"


def test_a_torch_without_flash_attention_leaves_it_to_packages(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_flash_in_torch", lambda: False)
    ampere = BF16._replace(architecture=80)
    assert choose(ampere) == "flash_attn"
    assert reasons(ampere)["sdpa"] == "declines: torch was built without flash attention"
    assert choose(ampere._replace(biased=True)) == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose(ampere) == "xformers"
    assert "flash_attn does not import" in reasons(ampere)["flash_attn"]


def test_without_a_fused_kernel_the_triton_one_comes_before_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = BF16._replace(head_dim=10, biased=True)
    monkeypatch.setattr(_attention._backends, "unavailable", lambda backend: None)
    assert choose(odd) == "triton"
    monkeypatch.setattr(_attention._backends, "unavailable", lambda backend: "no triton here")
    assert choose(odd) == "math"
    assert reasons(odd)["triton"] == "declines: no triton here"
    assert reasons(odd)["xformers"].startswith("declines: ")


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn", "xformers", "sdpa"])
def test_every_provider_computes_the_attention(installed: dict[str, list[dict[str, Any]]], name: str) -> None:
    q, k, v = inputs().values()
    out = _attention.PROVIDERS[name].run(q, k, v, None, 0.3)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), scale=0.3)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert sum(map(len, installed.values())) == (name != "sdpa")


def test_xformers_gets_a_bias_whose_rows_are_aligned(installed: dict[str, list[dict[str, Any]]]) -> None:
    q, k, v = inputs().values()
    bias = rows(2, 7)
    out = _attention.PROVIDERS["xformers"].run(q, k, v, bias, 0.3)
    torch.testing.assert_close(out, _attention.PROVIDERS["sdpa"].run(q, k, v, bias, 0.3))
    given = installed["xformers.ops"][0]["bias"]
    assert given.shape == (2, 3, 5, 7) and given.stride(0) % 8 == 0 and given.stride(3) == 1
    assert reasons(BF16._replace(biased=True, bias_needs_gradient=True))["xformers"].startswith("declines: ")


def test_explain_shows_both_choices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention._products, "choose", lambda *_: ("kolors_fast",))
    table = explain(qk_norm_attention, **inputs())
    assert table["attention kolors_fast"] == "runs" and table["cpu"] == "runs"
    assert table["attention math"] == "could run, but 'kolors_fast' comes first"
    assert "qk_norm_attention on attention kolors_fast: runs" in capsys.readouterr().out
