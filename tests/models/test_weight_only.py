"""Weight-only linear layers against float64 sums of the integers they hold, and against the bound of their rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kolors_fast.models import weight_only
from kolors_fast.models.weight_only import GROUP, WeightOnlyLinear, quantize

SIZES = [(3, 1), (5, 63), (7, 64), (9, 200)]  # outputs, inputs: less than a group, one, several and a rest


def linear(outputs: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(outputs)
    return nn.Linear(inputs, outputs, bias=bias)


def integers(layer: WeightOnlyLinear) -> tuple[Tensor, Tensor]:
    """Integers and scales of every weight, taken apart byte by byte as the class describes it."""
    scale = layer.scale_bits.view(torch.float32)
    if layer.bits == 8:
        return layer.weight.clone(), scale.expand(-1, layer.in_features)
    rows = []
    for packed in layer.weight.tolist():
        rows.append([byte % 16 - 8 for byte in packed] + [byte // 16 - 8 for byte in packed])
    return torch.tensor(rows)[:, : layer.in_features], scale.repeat_interleave(GROUP, dim=1)[:, : layer.in_features]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_every_weight_is_met_within_half_a_step(bits: int, outputs: int, inputs: int) -> None:
    """In int4 the values beyond 7 steps, on the side where the largest is not, are cut: up to a whole step."""
    plain = linear(outputs, inputs)
    layer = WeightOnlyLinear.from_linear(plain, bits)
    q, scale = integers(layer)
    assert (q.abs().amax(1) == 127).all() if bits == 8 else (q.amin(1) == -8).all()
    error = (q * scale - plain.weight).abs()
    cut = (plain.weight / scale > 7.5) if bits == 4 else torch.zeros_like(q, dtype=torch.bool)
    assert (error[~cut] <= scale.abs()[~cut] * 0.5001).all() and (error[cut] <= scale.abs()[cut] * 1.0001).all()
    extreme = plain.weight.abs().argmax(1)  # the largest of each row is met exactly
    assert (error[torch.arange(outputs), extreme] <= 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_forward(bits: int, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    layer = WeightOnlyLinear.from_linear(linear(outputs, inputs, bias=True), bits).to(dtype)
    q, scale = integers(layer)
    x = torch.randn(2, 4, inputs).to(dtype)
    products = x.double()[..., None, :] * (q * scale.double())  # [2, 4, out, in]
    truth = products.sum(-1) + layer.bias.double()
    # the weight and the sum are each rounded once; sums of a CPU's fp32 and fp64 products add their own
    allowed = torch.finfo(dtype).eps * (products.abs().sum(-1) + truth.abs()) + 1e-7 * products.abs().sum(-1)
    got = layer(x)
    assert got.dtype == dtype and got.shape == (2, 4, outputs)
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_chunks_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = linear(9, 200, bias=True), torch.randn(3, 200)
    layer = WeightOnlyLinear.from_linear(plain, bits)
    once = layer(x)
    for chunk in (1, 400, 1000):
        monkeypatch.setattr(weight_only, "CHUNK", chunk)
        again = WeightOnlyLinear.from_linear(plain, bits)
        assert torch.equal(again.weight, layer.weight) and torch.equal(again.scale_bits, layer.scale_bits)
        torch.testing.assert_close(again(x), once, rtol=1e-6, atol=1e-7)  # the product of fewer rows, elsewhere summed


def test_groups_beat_one_scale_per_row() -> None:
    """What the original code does in 4 bits, max |w| / 7 of a row, errs more: normal weights, one outlier per row."""
    plain = linear(64, 512)
    nn.init.normal_(plain.weight)
    plain.weight.data[:, 0] = 8.0
    step = plain.weight.detach().abs().amax(1, keepdim=True) / 7
    per_row = ((plain.weight / step).round() * step - plain.weight).square().mean().sqrt()
    layer = WeightOnlyLinear.from_linear(plain, 4)
    grouped = (layer.dequantized(slice(None), torch.float32) - plain.weight).square().mean().sqrt()
    assert grouped < 0.5 * per_row


@pytest.mark.parametrize("bits", [8, 4])
def test_casts_leave_the_scales_alone(bits: int) -> None:
    layer = WeightOnlyLinear.from_linear(linear(7, 64, bias=True), bits)
    there_and_back = copy.deepcopy(layer).half().bfloat16().float()
    assert torch.equal(there_and_back.scale_bits, layer.scale_bits)
    assert layer.half().bias.dtype == torch.float16


def test_gradients_reach_the_input() -> None:
    layer = WeightOnlyLinear.from_linear(linear(9, 200), 4)
    x = torch.randn(3, 200, requires_grad=True)
    layer(x).sum().backward()
    q, scale = integers(layer)
    torch.testing.assert_close(x.grad, (q * scale).sum(0).expand(3, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits: int) -> None:
    plain = linear(4, 130)
    nn.init.zeros_(plain.weight)
    layer = WeightOnlyLinear.from_linear(plain, bits)
    assert (integers(layer)[0] == 0).all() and (layer(torch.ones(1, 130)) == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(bits: int, value: float) -> None:
    weight = torch.zeros(3, 130)
    weight[1, 100] = value
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity"):
        quantize(weight, bits)


def test_bytes() -> None:
    """One byte a weight, and half a byte with four bytes per group."""
    sizes = {}
    for bits in (8, 4):
        layer = WeightOnlyLinear.from_linear(nn.Linear(4096, 100, bias=False, device="meta"), bits)
        sizes[bits] = sum(buffer.nbytes for buffer in layer.buffers())
    assert sizes == {8: 100 * (4096 + 4), 4: 100 * (2048 + 4 * 64)}
