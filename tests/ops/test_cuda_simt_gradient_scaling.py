"""The CUDA kernels of gradient scaling on the SIMT machine beyond their specs' cases: offsets, lists, orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def at_offset(value: Tensor, offset: int) -> Tensor:
    storage = torch.full((value.numel() + 16,), float("nan"), dtype=value.dtype)
    return storage[offset : offset + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_scaling_at_every_offset(source: torch.dtype, target: torch.dtype, machine: Any) -> None:
    """Whole words, the elements after the last, and tensors that start between words; with sentinels around."""
    codes, scale = (DTYPES.index(source), DTYPES.index(target)), torch.tensor(2.0**3.5)
    for size in (1, 8, 2 * 2048 + 13):
        x, add = torch.randn(2, size, generator=torch.Generator().manual_seed(4)).to(source)
        x[size // 2] = float("inf")
        scaled, unscaled = x.float() * scale, x.float() / scale
        scaled[size // 2] = unscaled[size // 2] = 0
        wanted = scaled, unscaled, unscaled + add.float()
        for offset in range(9):
            given, other = at_offset(x, offset), at_offset(add, 8 - offset)
            outputs = [torch.full((size + 16,), 7.25, dtype=target) for _ in wanted]
            a, b, s = given.data_ptr(), other.data_ptr(), scale.data_ptr()
            y = [output[offset:].data_ptr() for output in outputs]
            machine.scale_and_filter(a, s, y[0], size, *codes, 0)
            machine.unscale_and_filter(a, s, 0, y[1], size, codes[0], 0, codes[1], 0)
            machine.unscale_and_filter(a, s, b, y[2], size, codes[0], codes[0], codes[1], 0)
            for output, want in zip(outputs, wanted, strict=True):
                assert (output[:offset] == 7.25).all() and (output[offset + size :] == 7.25).all()
                assert torch.equal(output[offset : offset + size], want.to(target))


def unscale_on(machine: Any, grads: list[Tensor], scales: Tensor) -> tuple[Tensor, Tensor]:
    """Straight through the launcher, with sentinels after the workspace."""
    table = torch.tensor([[g.data_ptr(), g.numel(), DTYPES.index(g.dtype)] for g in grads])
    size = machine.unscale_grads_workspace(table.data_ptr(), len(grads))
    work = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
    norm, nonfinite = torch.empty(()), torch.ones(len(grads), dtype=torch.bool)
    pointers = [t.data_ptr() for t in (table, scales, norm, nonfinite, work)]
    machine.unscale_grads(*pointers, len(grads), scales.stride(0), 0)
    assert (work[size:] == 0xA5).all()
    return norm, nonfinite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscaled_lists_at_every_offset(dtype: torch.dtype, machine: Any) -> None:
    """A full chunk and a rest, wherever they start: the sum has one order, so one result."""
    size, norms = 16384 + 2048 + 13, set()
    values = torch.randn(size, generator=torch.Generator().manual_seed(5)).to(dtype)
    for offset in range(9):
        storage = torch.full((size + 16,), 7.25, dtype=dtype)
        view = storage[offset : offset + size].copy_(values)
        norm, nonfinite = unscale_on(machine, [view], torch.tensor([3.0]))
        assert (storage[:offset] == 7.25).all() and (storage[offset + size :] == 7.25).all()
        assert torch.equal(view, (values.float() / 3).to(dtype)) and not nonfinite.any()
        norms.add(norm.item())
    truth = (values.float() / 3).double().norm().item()
    assert len(norms) == 1 and abs(norms.pop() - truth) <= 20 * 2**-24 * truth


def test_unscaled_lists_do_not_depend_on_the_order_of_threads(machine: Any) -> None:
    """Three launches of up to 160 tensors; blocks find theirs among empty ones, forwards and in reverse."""
    generator, runs = torch.Generator().manual_seed(6), []
    sizes = [0, *((11 * i) % 40 for i in range(400)), 0]
    sizes[7], sizes[159], sizes[160], sizes[333] = 2 * 16384 + 1, 16384, 16385, 16383
    values = [torch.randn(n, generator=generator).to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    scales = (torch.rand(2 * len(sizes), generator=generator) + 1)[::2]
    quotients = [value.float() / scale for value, scale in zip(values, scales, strict=True)]
    truth = torch.cat(quotients).double().norm().item()
    for reverse in (False, False, True):
        machine.configure(2, reverse)
        grads = [value.clone() for value in values]
        norm, nonfinite = unscale_on(machine, grads, scales)
        assert abs(norm.item() - truth) <= 20 * 2**-24 * truth and not nonfinite.any()
        assert all(torch.equal(g, q.to(g.dtype)) for g, q in zip(grads, quotients, strict=True))
        runs.append(norm)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    values[160][16384], values[333][0] = float("nan"), float("-inf")
    norm, nonfinite = unscale_on(machine, values, scales)
    assert nonfinite.nonzero().flatten().tolist() == [160, 333] and not norm.isfinite()


def test_scaling_calls_that_cannot_be_raise(machine: Any) -> None:
    for numel, source, target in ((-1, 0, 0), (8, 3, 0), (8, 0, -1)):
        with pytest.raises(RuntimeError, match="scale_and_filter"):
            machine.scale_and_filter(0, 0, 0, numel, source, target, 0)
        with pytest.raises(RuntimeError, match="unscale_and_filter"):
            machine.unscale_and_filter(0, 0, 0, 0, numel, source, 0, target, 0)
    with pytest.raises(RuntimeError, match="unscale_and_filter"):
        machine.unscale_and_filter(0, 0, 0, 0, 8, 1, 2, 0, 0)  # add is neither float32 nor like x
    for entry in ([0, -1, 0], [0, 8, 3]):
        table = torch.tensor(entry)
        with pytest.raises(RuntimeError, match="unscale_grads"):
            machine.unscale_grads(table.data_ptr(), 0, 0, 0, 0, 1, 0, 0)
