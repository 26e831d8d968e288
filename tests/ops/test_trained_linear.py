"""The linear layer that trains by oneDNN: outputs and gradients against float64, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kolors_fast import without
from kolors_fast.ops import _products, use_backend
from kolors_fast.ops._products import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where it was measured to be faster than MKL."""
    monkeypatch.setattr(_products, "_for_linear", lambda x, weight: ("onednn",))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def name_of(y: Tensor) -> str:
    assert y.grad_fn is not None
    return y.grad_fn.name()


INPUTS = {
    "wide": lambda: normal(3, 50, 24),
    "one row": lambda: normal(1, 24),
    "tokens of a map": lambda: normal(2, 24, 5, 7).permute(0, 2, 3, 1).flatten(1, 2),
    "a part of wider rows": lambda: normal(37, 60)[:, 11:35],
    "four axes": lambda: normal(2, 3, 4, 24),
}


@pytest.mark.parametrize("features", [5, 24, 96])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_against_float64(name: str, biased: bool, features: int) -> None:
    x, weight = INPUTS[name](), normal(features, 24, seed=1)
    leaves = [x, weight, normal(features, seed=2)] if biased else [x, weight]
    seed = normal(*x.shape[:-1], features, seed=3)

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*given)
        return y, *torch.autograd.grad(y, given, seed.to(dtype))

    ours, truth = gradients(linear, torch.float32), gradients(F.linear, torch.float64)
    assert name_of(ours[0]) == "_TrainedLinearBackward"
    for one, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted_has_a_gradient(frozen: tuple[int, ...]) -> None:
    leaves = [normal(6, 24), normal(8, 24, seed=1), normal(8, seed=2)]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number not in frozen)
    linear(*leaves).sum().backward()  # whose gradient is one number, expanded
    for number, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (number in frozen)
    if 1 not in frozen:
        torch.testing.assert_close(leaves[1].grad, leaves[0].detach().sum(0).expand(8, -1))


def test_where_it_is_not_used() -> None:
    x, weight, bias = normal(6, 24), normal(8, 24, seed=1).requires_grad_(), normal(8, seed=2)
    assert name_of(linear(x, weight, bias)) == "_TrainedLinearBackward"
    with without("products"):
        assert name_of(linear(x, weight, bias)) == "AddmmBackward0"
    with use_backend("reference"):
        assert name_of(linear(x, weight, bias)) == "AddmmBackward0"
    assert name_of(linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())) == "AddmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.no_grad():
        assert linear(x, weight, bias).grad_fn is None
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), weight))


def test_the_choice_is_that_of_the_measured_table(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(6, 24), normal(8, 24, seed=1).requires_grad_()
    for providers, name in ((("kolors_fast", "onednn"), "_TrainedLinearBackward"), (("kolors_fast",), "MmBackward0")):
        monkeypatch.setattr(_products, "_for_linear", lambda x, weight, providers=providers: providers)
        assert name_of(linear(x, weight)) in (name, name.replace("Mm", "T"))


def test_a_graph_keeps_torchs_own() -> None:
    weight = normal(8, 24, seed=1).requires_grad_()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(normal(6, 24), weight), F.linear(normal(6, 24), weight))
