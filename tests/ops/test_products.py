"""The choice among libraries that multiply, and weights kept in another order."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kolors_fast
from kolors_fast.ops import _backends, _products, use_backend
from kolors_fast.ops._marks import Derived, Mark

MACHINE, INTEL = "AuthenticAMD avx512bf16", "GenuineIntel avx512bf16"


def test_the_nearest_measured_shape_decides() -> None:
    table = _products.measured(MACHINE)
    assert set(table) == {"linear", "gelu_linear", "conv2d", "attention"}
    for kind, rows in table.items():
        for shape, faster in rows.items():
            assert _products.choose(kind, *shape, machine=MACHINE) == faster
    assert _products.choose("linear", 3, 70, 60, machine=INTEL) == ()  # 2x64x64: the call costs more
    assert _products.choose("linear", 150, 250, 2048, machine=MACHINE) == ("kolors_fast", "onednn")
    assert _products.choose("conv2d", 128, 2304, 256, machine=MACHINE) == ("winograd", "packed")


def test_an_unmeasured_machine_gets_torchs_choice() -> None:
    assert _products.choose("linear", 128, 256, 256, machine="GenuineIntel avx2") == ()
    assert _products.choose("matmul", 128, 256, 256, machine=MACHINE) == ()


def test_gelu_is_an_epilogue_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, weight = torch.Size((2, 4, 384)), torch.Size((2, 256, 384)), torch.Size((1536, 384))
    choose = _products._for_gelu.__wrapped__
    for machine in (MACHINE, INTEL):
        monkeypatch.setattr(_products, "this_machine", lambda machine=machine: machine)
        assert choose(many, weight)[0] == choose(few, weight)[0] == "kolors_fast"
    monkeypatch.setattr(_products, "this_machine", lambda: "unknown")
    assert choose(many, weight) == ("onednn",) and choose(few, weight) == ()


def test_winograds_convolution_is_for_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "choose", lambda *_: ("winograd", "packed"))
    x, w = torch.Size((2, 3, 19, 20)), torch.Size((7, 3, 3, 3))
    assert _products._for_conv2d(x, w, 1, 1, 1, 1) == ("winograd", "packed")
    for other, steps in ((w, (2, 2, 1, 1)), (w, (1, 1, 0, 0)), (torch.Size((7, 3, 2, 2)), (1, 1, 1, 1))):
        assert _products._for_conv2d(x, other, *steps) == ("packed",)


def test_the_smallest_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "choose", lambda *_: ("kolors_fast",))
    choose = _products._for_linear.__wrapped__
    assert choose(torch.Size((1, 64)), torch.Size((80, 64))) == ()
    assert choose(torch.Size((1, 256)), torch.Size((64, 256))) == ("kolors_fast",)


def test_the_table_says_where_it_is_from() -> None:
    for machine in json.loads((Path(_products.__file__).parent / "products.json").read_text()).values():
        assert {"command", "commit", "torch", "threads", "rows"} <= set(machine)
        assert "dirty" not in machine["commit"]


LINEAR, CONV2D = ("kolors_fast", "onednn"), ("winograd", "packed")
OURS = pytest.mark.skipif(isinstance(_backends.extension("cpu"), str), reason="the C++ extension is not built")


@pytest.fixture(params=[pytest.param((LINEAR[:1], CONV2D[:1]), marks=OURS, id="ours"), (LINEAR[1:], CONV2D[1:])])
def others(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products by ours, then all by oneDNN."""
    of_linear, of_conv2d = request.param

    def for_conv2d(x: torch.Size, w: torch.Size, *steps: int) -> tuple[str, ...]:
        fits = of_conv2d == ("packed",) or (w[2:] == (3, 3) and steps == (1, 1, 1, 1))
        return of_conv2d if len(x) == 4 and fits else ()

    monkeypatch.setattr(_products, "_for_linear", lambda x, _: of_linear if len(x) > 1 else ())
    monkeypatch.setattr(_products, "_for_conv2d", for_conv2d)


def convolution() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    return torch.randn(2, 5, 9, 7).contiguous(**last), torch.randn(6, 5, 3, 3).contiguous(**last), torch.randn(6)


@pytest.mark.usefixtures("others")
@torch.no_grad()
def test_products_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 7, 33), torch.randn(12, 33), torch.randn(12)
    for bias in (b, None):
        truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        error = (F.linear(x, w, bias) - truth).abs().max()
        assert (_products.linear(x, w, bias) - truth).abs().max() <= 2 * error + 1e-6
        strided = x.transpose(0, 1)
        assert torch.allclose(_products.linear(strided, w, bias), F.linear(strided, w, bias), rtol=1e-5, atol=1e-5)
    x, w, b = convolution()
    for stride, padding in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (0, 0)), ((2, 2), (0, 0))):
        for bias in (b, None):
            got = _products.conv2d(x, w, bias, stride=stride, padding=padding)
            truth = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), stride, padding)
            assert (got - truth).abs().max() < 2e-5
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ours", [pytest.param(True, marks=OURS), False])
@torch.no_grad()
def test_parts_and_pixels_are_rows_of_a_linear_layer(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = LINEAR[:1] if ours else ()
    monkeypatch.setattr(_products, "choose", lambda *_: found)
    monkeypatch.setattr(_products, "_for_linear", lambda *_: found)
    _products._for_conv2d.cache_clear()
    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    x, skip, h = (torch.randn(2, c, 5, 6).contiguous(**last) for c in (7, 40, 33))
    w, b = torch.randn(33, 47, 1, 1).contiguous(**last), torch.randn(33)
    parts = [t.permute(0, 2, 3, 1) for t in (x, skip)]
    for bias in (b, None):
        truth = F.conv2d(torch.cat([x, skip], 1).double(), w.double(), None if bias is None else bias.double())
        got = _products.linear_of_parts(parts, w, bias, h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (got - (truth + h)).abs().max() < 2e-5
        got = _products.conv2d(torch.cat([x, skip], 1).contiguous(**last), w, bias)
        assert (got - truth).abs().max() < 2e-5
        assert got.is_contiguous(**last)
    w.mul_(2)
    got = _products.linear_of_parts(parts, w, None, h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (got - h - 2 * truth).abs().max() < 4e-5
    _products._for_conv2d.cache_clear()


@pytest.mark.usefixtures("others")
@torch.no_grad()
def test_sizes_that_do_not_fit_are_torchs_to_refuse() -> None:
    x, w, _ = convolution()
    for wrong in (torch.randn(4, 9), torch.randn(4, 7)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            _products.linear(wrong, torch.randn(6, 8))
        assert _products.geglu_linear(wrong, torch.randn(6, 8)) is None
    with pytest.raises(RuntimeError, match="expected input"):
        _products.conv2d(x, w[:, :4].contiguous(memory_format=torch.channels_last), padding=(1, 1))
    with pytest.raises(RuntimeError, match=r"shape|size"):
        _products.linear(torch.randn(4, 8), torch.randn(6, 8), torch.randn(5))
    with pytest.raises(RuntimeError, match="split"):
        _products.linear_of_parts([torch.randn(4, 3), torch.randn(4, 4)], torch.randn(6, 8), None, torch.randn(4, 6))


@pytest.mark.usefixtures("others")
@torch.no_grad()
def test_torch_alone_multiplies_under_a_transform() -> None:
    x, w = torch.randn(3, 4, 8), torch.randn(6, 8)
    assert torch.allclose(torch.func.vmap(lambda one: _products.linear(one, w))(x), F.linear(x, w), atol=1e-5)
    with torch.enable_grad():
        _, tangent = torch.func.jvp(lambda one: _products.linear(one, w), (x,), (x,))
    assert torch.allclose(tangent, F.linear(x, w), atol=1e-5)
    xc, wc, _ = convolution()
    _, tangent = torch.func.jvp(lambda one: _products.conv2d(one, wc, padding=(1, 1)), (xc,), (xc,))
    assert torch.allclose(tangent, F.conv2d(xc, wc, padding=1), atol=1e-4)


PACKED = {"linear": "linear", "geglu": "gated", "conv2d": "conv2d", "winograd": "winograd"}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=OURS if kind != "conv2d" else ()) for kind in PACKED])
@torch.no_grad()
def test_packed_weights_follow_their_source(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Derived()
    monkeypatch.setattr(_products, "_packed", store)
    monkeypatch.setattr(_products, "_for_linear", lambda *_: ("kolors_fast",))
    monkeypatch.setattr(_products, "_for_conv2d", lambda *_: ("winograd" if kind == "winograd" else "packed",))
    if kind in ("conv2d", "winograd"):
        x, w, _ = convolution()
    else:
        x, w = torch.randn(7, 9), torch.randn(10, 9)

    def same(w: Tensor) -> bool:
        if kind == "geglu":
            value, gate = F.linear(x, w).chunk(2, dim=-1)
            got, want = _products.geglu_linear(x, w), value * F.gelu(gate)
        elif kind == "linear":
            got, want = _products.linear(x, w), F.linear(x, w)
        else:
            got, want = _products.conv2d(x, w, padding=(1, 1)), F.conv2d(x, w, padding=1)
        return got is not None and bool((got - want).abs().max() < 1e-5 * want.abs().max())

    assert same(w)
    size = store.bytes
    assert size >= w.nbytes
    w.mul_(2)
    assert same(w)
    w.data.mul_(2)
    assert same(w)
    w.data = w.data.clone(memory_format=torch.preserve_format) * 3
    assert same(w)
    assert store.bytes == size
    store.limit = size
    other = w.clone(memory_format=torch.preserve_format)  # no room for a second one: read in place
    assert kind == "geglu" or same(other)
    assert kind != "geglu" or _products.geglu_linear(x, other) is None
    assert store.bytes == size
    del w
    gc.collect()
    assert store.bytes == 0


@pytest.mark.usefixtures("others")
def test_where_torch_alone_multiplies() -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    _products.linear(x, w).sum().backward()  # with gradients
    assert w.grad is not None
    with torch.no_grad():
        for other in (torch.bfloat16, torch.float64):
            assert _products.linear(x.to(other), w.to(other)).dtype == other
        with use_backend("reference"):
            assert torch.equal(_products.linear(x, w), F.linear(x, w))
        with kolors_fast.without("products"):
            assert torch.equal(_products.linear(x, w), F.linear(x, w))
        with torch.autocast("cpu", torch.bfloat16):
            assert _products.linear(x, w).dtype == torch.bfloat16
        assert _products.linear(x[:0], w).shape == (0, 6)
        assert _products.linear(x[0], w).shape == (6,)
        xc, wc, bc = convolution()
        assert torch.equal(_products.conv2d(xc, wc, bc, padding="same"), F.conv2d(xc, wc, bc, padding="same"))
        assert torch.equal(_products.conv2d(xc.contiguous(), wc, bc), F.conv2d(xc.contiguous(), wc, bc))
        assert _products.conv2d(xc[:0], wc, bc).shape == (0, 6, 7, 5)
    compiled = torch.compile(_products.linear, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, w), F.linear(x, w))
    with torch.inference_mode():
        xc, wc, bc = convolution()  # whose edits are not counted
        first = _products.conv2d(xc, wc, bc)
        assert torch.allclose(_products.conv2d(xc, wc.mul_(2), None) + bc[:, None, None], 2 * first - bc[:, None, None])


def test_a_mark_holds_until_an_edit() -> None:
    x = torch.zeros(1000)
    mark = Mark(x)
    assert mark.holds(x)
    assert not mark.holds(x.clone())
    assert not mark.holds(x.view(1000))
    x[1] = 5  # between the words that a sample of the content looks at: the version tells
    assert not mark.holds(x)
    mark = Mark(x)
    x.data.add_(1)  # no version tells: the sample does
    assert not mark.holds(x)
    strided = torch.zeros(8, 8)[:, ::2]
    assert Mark(strided).holds(strided)
    mark = Mark(x)
    del x
    assert mark.of() is None  # it keeps nothing alive
