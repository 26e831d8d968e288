"""The LayerNorm ops beyond the generated tests: strided modulation, absent gradients, errors, threads, configs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kolors_fast.kernels._layer_norm_config import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    REGISTER_FILE,
    REGISTERS,
    configure,
    split,
)
from torch import Tensor

from kolors_fast.ops import (
    _backends,
    ada_layer_norm,
    gated_residual_ada_layer_norm,
    residual_layer_norm,
    use_backend,
)

BACKENDS = ["reference", *(name for name in ("cpu", "triton") if _backends.unavailable(name) is None)]
WIDTHS = (640, 1152, 1280, 1536, 2432)  # of Kolors, PixArt, Kolors, SD3-medium, SD3.5-large

backends = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(x: Tensor, y: Tensor | None, gate: Any, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """r and out in float64, for x [B, L, D] and modulations [B, D]."""
    r = x.double() if y is None else x.double() + (1 if gate is None else gate.double()[:, None]) * y.double()
    out = F.layer_norm(r, r.shape[-1:], eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    return r, out


# ---- strides


@backends
def test_modulations_are_read_where_they_lie(backend: str) -> None:
    """Chunks of one projection: no copy in the call that the launchers get, and the right rows."""
    op: Any = importlib.import_module("kolors_fast.ops.gated_residual_ada_layer_norm")
    x, y = normal(3, 5, 40), normal(3, 5, 40, seed=1)
    gate, scale, shift = normal(3, 6 * 40, seed=2).chunk(6, dim=1)[1:4]
    assert gate.stride() == (240, 1)
    call = op._dense(op._prepare(x, y, gate, scale, shift[:, None]))
    for dense, given in zip(call[2:5], (gate, scale, shift), strict=True):
        assert dense.data_ptr() == given.data_ptr() and dense.stride(0) == given.stride(0)
    r, out = truth(x, y, gate, scale, shift)
    with use_backend(backend):
        for ours, expected in zip(gated_residual_ada_layer_norm(x, y, gate, scale, shift), (r, out), strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        ours = ada_layer_norm(x, scale, shift[:, None])
    torch.testing.assert_close(ours.double(), truth(x, None, None, scale, shift)[1], rtol=1e-5, atol=1e-5)


@backends
def test_strided_and_expanded_modulations(backend: str) -> None:
    """One row for all samples (stride 0), and columns that are not contiguous."""
    x, grad = normal(4, 3, 24), normal(4, 3, 24, seed=1)
    scale, shift = normal(1, 24, seed=2).expand(4, 24), normal(24, 4, seed=3).T
    assert scale.stride(0) == 0 and shift.stride(1) == 4
    leaves = [t.detach().requires_grad_() for t in (x, scale, shift)]
    with use_backend(backend):
        out = ada_layer_norm(*leaves)
        ours = torch.autograd.grad(out, leaves, grad)
    doubles = [t.detach().double().requires_grad_() for t in (x, scale, shift)]
    true = truth(doubles[0], None, None, *doubles[1:])[1]
    expected = torch.autograd.grad(true, doubles, grad.double())
    for a, b in zip((out, *ours), (true, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# ---- gradients that do not arrive, or are not wanted


def _gated(x: Tensor, y: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
    return gated_residual_ada_layer_norm(x, y, *modulation)  # type: ignore[arg-type]


def _ungated(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return gated_residual_ada_layer_norm(x, y, None, scale, shift)


def _plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(x, y, weight, bias, 1e-6)


def _truth_plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, F.layer_norm(x + y, x.shape[-1:], weight, bias, 1e-6)


FUSED: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "gated": (_gated, truth, [(2, 3, 20), (2, 3, 20), (2, 20), (2, 20), (2, 20)]),
    "ungated": (_ungated, lambda x, y, *m: truth(x, y, None, *m), [(2, 3, 20), (2, 3, 20), (2, 20), (2, 20)]),
    "plain": (_plain, _truth_plain, [(2, 3, 20), (2, 3, 20), (20,), (20,)]),
}


@backends
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["r", "out", "both"])
def test_either_output_may_go_unused(name: str, used: tuple[int, ...], backend: str) -> None:
    function, expected, shapes = FUSED[name]
    leaves = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    seeds = [normal(2, 3, 20, seed=10 + i) for i in used]
    with use_backend(backend):
        outputs = function(*leaves)
        ours = torch.autograd.grad([outputs[i] for i in used], leaves, seeds)
    outputs = expected(*doubles)
    true = torch.autograd.grad(
        [outputs[i] for i in used], doubles, [s.double() for s in seeds], allow_unused=True, materialize_grads=True
    )
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("name", FUSED)
def test_each_gradient_alone_is_the_same(name: str, backend: str) -> None:
    """What is not wanted is not computed, and changes nothing else."""
    function, _, shapes = FUSED[name]
    values, seeds = [normal(*shape, seed=i) for i, shape in enumerate(shapes)], [normal(2, 3, 20, seed=9)] * 2
    with use_backend(backend):
        leaves = [value.clone().requires_grad_() for value in values]
        together = torch.autograd.grad(function(*leaves), leaves, seeds)
        for i, expected in enumerate(together):
            one = [value.clone().requires_grad_(k == i) for k, value in enumerate(values)]
            (alone,) = torch.autograd.grad(function(*one), [one[i]], seeds)
            torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)


def test_x_and_y_share_one_gradient_but_not_their_leaves() -> None:
    """The same memory for both on its way, and separate ones where it ends."""
    x, y = normal(2, 3, 20).requires_grad_(), normal(2, 3, 20, seed=1).requires_grad_()
    outputs = residual_layer_norm(x, y, torch.ones(20), torch.zeros(20))
    grad_x, grad_y = torch.autograd.grad(outputs, (x, y), [torch.ones(2, 3, 20)] * 2, retain_graph=True)
    assert grad_x.data_ptr() == grad_y.data_ptr()
    torch.autograd.backward(outputs, [torch.ones(2, 3, 20)] * 2)
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert x.grad.data_ptr() != y.grad.data_ptr()


@pytest.mark.parametrize("arrived", [(0,), (1,), (0, 1)], ids=["r", "out", "both"])
def test_the_registered_backward_returns_no_memory_twice(arrived: tuple[int, ...]) -> None:
    """A compiler may write into what a registered op returned: neither another result nor an argument may change."""
    x, y, weight, bias = (normal(*shape, seed=i) for i, shape in enumerate(FUSED["plain"][2]))
    op = torch.ops.kolors_fast
    r, _, statistics = op.residual_layer_norm(x, y, weight, bias, 1e-5)
    grads = [normal(2, 3, 20, seed=7 + i) if i in arrived else None for i in range(2)]
    found = op.residual_layer_norm_backward(r, r, weight, bias, 1e-5, *grads, statistics, [True] * 4)
    addresses = [t.data_ptr() for t in (*found, r, weight, bias, statistics, *grads) if t is not None]
    assert len(set(addresses)) == len(addresses)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_the_backward_pass_keeps_neither_x_nor_y() -> None:
    """r takes the place of both."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    x, y = normal(2, 3, 20).requires_grad_(), normal(2, 3, 20, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        r, _ = residual_layer_norm(x, y, torch.ones(20), torch.zeros(20))
    assert r.data_ptr() in kept and x.data_ptr() not in kept and y.data_ptr() not in kept


def test_out_is_the_norm_of_the_rounded_r() -> None:
    """As if the residual and the norm were two ops: bit for bit, in 16 bits too."""
    x, y = normal(2, 9, 64, dtype=torch.bfloat16), normal(2, 9, 64, dtype=torch.bfloat16, seed=1)
    gate, scale, shift = (normal(2, 64, dtype=torch.bfloat16, seed=i) for i in (2, 3, 4))
    for backend in BACKENDS:
        with use_backend(backend):
            r, out = gated_residual_ada_layer_norm(x, y, gate, scale, shift)
            assert torch.equal(out, ada_layer_norm(r, scale, shift)), backend


@backends
def test_a_large_mean_does_not_cancel(backend: str) -> None:
    """1e4 + N(0, 1) in fp32: the error is that of the input's rounding, not of E[x^2] - E[x]^2 (which loses it all)."""
    x = normal(1, 3, 1000) + 1e4
    with use_backend(backend):
        ours = ada_layer_norm(x, torch.zeros(1, 1000), torch.zeros(1, 1000))
    error = (ours.double() - F.layer_norm(x.double(), (1000,), eps=1e-6)).abs().max()
    assert error < 1e-3  # half an ulp of the mean, 2^-11


@backends
@pytest.mark.parametrize("value", [0.3, -7.7, 1000.1])
def test_a_constant_row_becomes_its_shift(value: float, backend: str) -> None:
    """Exactly: what rounding takes from the mean would be divided by sqrt(eps), a thousand times larger."""
    for d in (37, 333, 640):
        scale, shift = normal(1, d), normal(1, d, seed=1)
        with use_backend(backend):
            out = ada_layer_norm(torch.full((1, 2, d), value), scale, shift)
        assert torch.equal(out, shift.expand(1, 2, d)), d


# ---- errors

X, Y, M, W = normal(2, 3, 8), normal(2, 3, 8), normal(2, 8), normal(8)
BAD: dict[str, tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = {
    "rank": (ada_layer_norm, (W, M, M), ValueError, r"ada_layer_norm: x: expected \[B, \*, D\], got \[8\]"),
    "integer": (ada_layer_norm, (X.int(), M, M), TypeError, "x: expected a floating dtype of .* bits, got torch.int32"),
    "width": (ada_layer_norm, (X, M[:, :7], M), ValueError, r"scale: expected \[2, 8\] or \[2, 1, 8\], got \[2, 7\]"),
    "batch": (ada_layer_norm, (X, M, M[:1]), ValueError, r"shift: expected \[2, 8\] or \[2, 1, 8\], got \[1, 8\]"),
    "middle": (ada_layer_norm, (X, X, M), ValueError, r"scale: expected .* got \[2, 3, 8\]"),
    "dtype": (ada_layer_norm, (X, M.half(), M), TypeError, "scale: expected torch.float32, got torch.float16"),
    "mixed": (ada_layer_norm, (X.half(), M.half(), M), TypeError, "shift: expected torch.float16, got torch.float32"),
    "device": (ada_layer_norm, (X, M.to("meta"), M), ValueError, "scale: expected a tensor on cpu, got meta"),
    "eps": (ada_layer_norm, (X, M, M, -1e-6), ValueError, "eps: expected a number >= 0, got -1e-06"),
    "nan_eps": (ada_layer_norm, (X, M, M, float("nan")), ValueError, "eps: expected a number >= 0, got nan"),
    "gated_y": (gated_residual_ada_layer_norm, (X, Y[:, :2], M, M, M), ValueError, r"y: expected \[2, 3, 8\], got"),
    "gated_y_dtype": (gated_residual_ada_layer_norm, (X, Y.half(), M, M, M), TypeError, "y: expected torch.float32"),
    "gated_y_device": (gated_residual_ada_layer_norm, (X, Y.to("meta"), M, M, M), ValueError, "y: .* on cpu, got meta"),
    "gated_gate": (gated_residual_ada_layer_norm, (X, Y, W, M, M), ValueError, r"gate: expected .* got \[8\]"),
    "gated_eps": (gated_residual_ada_layer_norm, (X, Y, M, M, M, -1), ValueError, "eps: expected .*, got -1"),
    "residual_y": (residual_layer_norm, (X, M, W, W), ValueError, r"y: expected \[2, 3, 8\], got \[2, 8\]"),
    "residual_weight": (residual_layer_norm, (X, Y, M, W), ValueError, r"weight: expected \[8\], got \[2, 8\]"),
    "residual_bias": (residual_layer_norm, (X, Y, W, W[:7]), ValueError, r"bias: expected \[8\], got \[7\]"),
    "residual_dtype": (residual_layer_norm, (X, Y, W, W.half()), TypeError, "bias: expected torch.float32"),
    "residual_eps": (residual_layer_norm, (X, Y, W, W, -1), ValueError, "residual_layer_norm: eps: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    function, arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        function(*arguments)


# ---- what only the C++ column promises


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _all_results(dtype: torch.dtype, backend: str = "cpu") -> list[Tensor]:
    """Outputs and gradients of shapes that are shared out among threads, with and without whole vectors."""
    results = []
    for b, rows, d in ((2, 333, 96), (1, 700, 61), (3, 130, 131)):
        x, y = normal(b, rows, d, dtype=dtype), normal(b, rows, d, dtype=dtype, seed=1)
        tensors = [x, y, *(normal(b, d, dtype=dtype, seed=i) for i in (2, 3, 4))]
        leaves = [t.requires_grad_() for t in tensors]
        with use_backend(backend):
            outputs = gated_residual_ada_layer_norm(*leaves)
            grads = torch.autograd.grad(outputs, leaves, [normal(b, rows, d, dtype=dtype, seed=5)] * 2)
        results += [*outputs, *grads]
    return [result.detach() for result in results]


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="the C++ extension is not built")
def test_same_bits_for_any_number_of_threads(threads: None) -> None:
    torch.set_num_threads(1)
    serial = _all_results(torch.float32)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(_all_results(torch.float32), serial, strict=True)), count


def _check_against_reference() -> None:
    """Run in a process of its own for each instruction set."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        for a, b in zip(_all_results(dtype), _all_results(dtype, "reference"), strict=True):
            assert (a.double() - b.double()).abs().max() <= bound * b.abs().max(), dtype


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "generic"])
def test_every_instruction_set_agrees(isa: str) -> None:
    environment = {**os.environ, "KOLORS_FAST_CPU_ISA": isa}
    run = [sys.executable, __file__]
    done = subprocess.run(run, env=environment, cwd=Path(sys.prefix), capture_output=True, text=True)
    if "which this CPU does not have" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr


# ---- the configs of the Triton kernels


@pytest.mark.parametrize("elements", [FORWARD_ELEMENTS, BACKWARD_ELEMENTS])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [1, 8, 37, 64, 333, *WIDTHS, 4096, 8192])
def test_pieces_cover_a_row_and_fit_registers(d: int, itemsize: int, elements: int) -> None:
    config = configure(d, itemsize, True, elements)
    assert (config.pieces - 1) * config.width < d <= config.pieces * config.width
    assert config.width & (config.width - 1) == 0
    assert config.vector == (16 // itemsize if d * itemsize % 16 == 0 else 1)
    lanes = config.num_warps * 32 // config.rows  # of one row
    assert config.pieces * config.width <= max(elements, 16 // itemsize) * lanes
    assert configure(d, itemsize, False, elements).vector == 1


@pytest.mark.parametrize("d", WIDTHS)
def test_real_widths_leave_few_lanes_idle(d: int) -> None:
    """And up to 1536 columns a row is one warp's: as many rows as warps."""
    for itemsize in (2, 4):
        config = configure(d, itemsize, True, FORWARD_ELEMENTS)
        assert config.pieces * config.width <= 1.2 * d
        assert config.rows == config.num_warps or d > 1536


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])  # A100, H100, B200
@pytest.mark.parametrize("rows", [333, 1024, 4096])
@pytest.mark.parametrize("d", WIDTHS)
def test_grids_fill_the_gpu_and_cover_every_row_once(d: int, rows: int, multiprocessors: int) -> None:
    forward = configure(d, 2, True, FORWARD_ELEMENTS)
    assert (forward.blocks(rows) - 1) * forward.rows < rows <= forward.blocks(rows) * forward.rows
    assert 2 * forward.blocks(rows) >= multiprocessors
    backward = configure(d, 2, True, BACKWARD_ELEMENTS)
    blocks = backward.blocks(rows)
    for sums in REGISTERS:
        chunks, steps = split(2, blocks, backward.num_warps, sums, multiprocessors)
        assert (chunks - 1) * steps < blocks <= chunks * steps
        registers = 2 * chunks * backward.num_warps * 32 * REGISTERS[sums]
        assert registers <= multiprocessors * REGISTER_FILE  # in one wave
        assert 2 * chunks >= 0.8 * multiprocessors


if __name__ == "__main__":
    _check_against_reference()
