"""The CUDA LayerNorms on the SIMT machine beyond their specs' cases: widths, orders, offsets, workspaces, plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast.ops import SPECS, ada_layer_norm, gated_residual_ada_layer_norm
from kolors_fast.ops._spec import Inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("ada_layer_norm", "gated_residual_ada_layer_norm")
REAL_WIDTHS = (640, 1152, 1280, 1536, 2432)  # of Kolors, PixArt, Kolors, SD3-medium, SD3.5-large
# columns: what each one exercises
WIDTHS = {
    **{str(width): width for width in REAL_WIDTHS},
    "768": 768,  # the most for 24 columns a lane
    "2560": 2560,  # the widest row that a warp holds, in 16 bits
    "2568": 2568,  # forward re-reads packs, backward does not
    "3080": 3080,  # backward re-reads too: the sums lie in the workspace
    "3077": 3077,  # the same in single elements
    "643": 643,  # single elements
}

ops = pytest.mark.parametrize("name", NAMES)
widths = pytest.mark.parametrize("width", WIDTHS.values(), ids=list(WIDTHS))


def inputs_of(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, parameters: torch.dtype | None = None
) -> Inputs:
    """x and, for the gated op, y; a modulation is the last chunk of a projection, so past its last row nothing is."""
    generator, (batch, _, d) = torch.Generator().manual_seed(0), shape

    def chunk() -> Tensor:
        return (0.2 * torch.randn(batch, 3 * d, generator=generator)).to(parameters or dtype).chunk(3, dim=1)[-1]

    inputs: Inputs = {"x": torch.randn(shape, generator=generator).to(dtype), "scale": chunk(), "shift": chunk()}
    if name == "gated_residual_ada_layer_norm":
        inputs |= {"y": torch.randn(shape, generator=generator).to(dtype), "gate": chunk()}
    return inputs


def run(name: str, function: Any, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> list[Tensor]:
    """Outputs, and the gradients of the tensors wanted."""
    wanted = wanted or tuple(inputs)
    leaves = {key: value.detach().requires_grad_(key in wanted) for key, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, [leaves[key] for key in wanted], seeds)
    return [*(y.detach() for y in outputs), *found]


def check(name: str, inputs: Inputs) -> None:
    """The contract of the spec, for outputs and gradients."""
    spec = SPECS[name]
    ours, eager = run(name, spec.function, inputs), run(name, spec.eager, inputs)
    truth = run(name, spec.eager, {key: value.double() for key, value in inputs.items()})
    for i, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        gradient = i >= len(ours) - len(inputs)
        assert (broken := spec.tolerance.violation(o, e, t, gradient=gradient)) is None, broken


@widths
@ops
def test_widths(name: str, width: int, machine: Any) -> None:
    """Few rows, so one or two chunks a sample on a large GPU, and one of all rows on the smallest."""
    for dtype, multiprocessors in ((torch.float32, 1), (torch.bfloat16, 132), (torch.float16, 2)):
        machine.configure(multiprocessors)
        check(name, inputs_of(name, (2, 5, width), dtype))
    check(name, inputs_of(name, (2, 5, width), torch.bfloat16, torch.float32))


@ops
def test_many_chunks(name: str, machine: Any) -> None:
    """The last chunk is short, and has a row less than a step; more chunks than the finishing block has lanes."""
    machine.configure(8)
    for dtype in DTYPES:
        check(name, inputs_of(name, (2, 4 * 19 + 3, 72), dtype))


@pytest.mark.parametrize("width", (640, 643, 1536, 2568, 3077, 3080))
@ops
def test_bits_do_not_depend_on_the_order_of_threads(name: str, width: int, machine: Any) -> None:
    """Twice, then with all threads and blocks in reverse: a missing barrier or an unordered sum shows."""
    inputs, runs = inputs_of(name, (2, 11, width), torch.bfloat16), []
    for reverse in (False, False, True):
        machine.configure(2, reverse)
        runs.append(run(name, SPECS[name].function, inputs))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("width", (96, 3080))
@ops
def test_one_gradient_alone_has_the_bits_of_all(name: str, width: int, machine: Any) -> None:
    inputs = inputs_of(name, (2, 7, width), torch.float32)
    together = dict(zip(inputs, run(name, SPECS[name].function, inputs)[-len(inputs) :], strict=True))
    for key in inputs:
        assert torch.equal(run(name, SPECS[name].function, inputs, (key,))[-1], together[key]), key


@pytest.mark.parametrize("width", (640, 1536, 2568, 643))
def test_out_is_the_norm_of_the_rounded_r(width: int, machine: Any) -> None:
    """Bit for bit what ada_layer_norm makes of r."""
    inputs = inputs_of("gated_residual_ada_layer_norm", (2, 5, width), torch.bfloat16)
    r, out = gated_residual_ada_layer_norm(**inputs)
    assert torch.equal(out, ada_layer_norm(r, inputs["scale"], inputs["shift"]))


@pytest.mark.parametrize("width", (640, 2568))
def test_a_large_mean_does_not_cancel(width: int, machine: Any) -> None:
    """1e4 + N(0, 1) in fp32: the error is that of the input's rounding; E[x^2] - E[x]^2 would leave nothing."""
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)) + 1e4
    zeros = torch.zeros(1, width)
    truth = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-6)
    assert (ada_layer_norm(x, zeros, zeros) - truth).abs().max() < 1e-3  # half a unit in the last place of 1e4, 2^-11


@pytest.mark.parametrize("width", (640, 643, 2568))
def test_a_huge_constant_has_no_variance(width: int, machine: Any) -> None:
    """2^66 is exact in every sum, and its square is not finite in fp32."""
    x, scale = torch.full((1, 3, width), 2.0**66), torch.zeros(1, width)
    shift = torch.randn(1, width)
    assert torch.equal(ada_layer_norm(x, scale, shift), shift.expand(1, 3, width))


# ---- straight through the launchers

SENTINEL = 7.25


def placed(value: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements past an aligned address, between NaNs."""
    storage = torch.full((value.numel() + 16,), float("nan"), dtype=value.dtype)
    return storage[offset : offset + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("shifted", ("all", "x", "parameters", "outputs"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_every_offset(dtype: torch.dtype, shifted: str, machine: Any) -> None:
    """Tensors start 0 to 8 elements past an aligned address, outputs between sentinels."""
    batch, rows, d, code = 2, 3, 48, DTYPES.index(dtype)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    values = {key: normal(batch, rows, d) for key in ("x", "y", "grad_r", "grad_out")}
    parameters = {key: normal(batch, d) for key in ("gate", "scale", "shift")}
    sizes, count = (batch, rows, d), batch * rows * d
    workspace = torch.empty(machine.gated_residual_ada_layer_norm_workspace(*sizes), dtype=torch.uint8)
    expected: list[Tensor] = []
    for offset in range(9):
        x_at, parameters_at, out_at = (
            offset if shifted in ("all", kind) else 0 for kind in ("x", "parameters", "outputs")
        )
        kept = {key: placed(v, x_at) for key, v in values.items()}
        kept |= {key: placed(v, parameters_at) for key, v in parameters.items()}
        p = {key: value.data_ptr() for key, value in kept.items()}
        outputs = [torch.full((count + 16,), SENTINEL, dtype=dtype) for _ in range(6)]
        statistics, sums = torch.empty(2, batch * rows), torch.empty(5, batch, d)
        stats, out, r, gated_out, grad_x, grad_y, ada_grad = (
            statistics.data_ptr(),
            *(o[out_at:].data_ptr() for o in outputs),
        )
        codes, s = (code, code, 0), [total.data_ptr() for total in sums]
        machine.ada_layer_norm_forward(p["x"], p["scale"], p["shift"], out, stats, *sizes, d, d, 1e-6, *codes)
        machine.ada_layer_norm_backward(
            p["grad_out"], p["x"], p["scale"], stats, ada_grad, s[0], s[1], workspace.data_ptr(), *sizes, d, *codes
        )
        machine.gated_residual_ada_layer_norm_forward(
            p["x"], p["y"], p["gate"], p["scale"], p["shift"], r, gated_out, stats, *sizes, d, d, d, 1e-6, *codes
        )
        machine.gated_residual_ada_layer_norm_backward(
            p["grad_r"], p["grad_out"], r, p["y"], p["gate"], p["scale"], stats, grad_x, grad_y, s[2], s[3], s[4],
            workspace.data_ptr(), *sizes, d, d, *codes,
        )  # fmt: skip
        for output in outputs:
            assert (output[:out_at] == SENTINEL).all() and (output[count + out_at :] == SENTINEL).all()
        results = [*(o[out_at : count + out_at].float() for o in outputs), *sums]
        expected = expected or results
        for result, first in zip(results, expected, strict=True):
            torch.testing.assert_close(result, first, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@widths
def test_the_workspace_is_as_large_as_it_says(width: int, machine: Any) -> None:
    batch, rows = 2, 9
    x, parameter = torch.ones(batch, rows, width), torch.ones(batch, width)
    statistics, sums = torch.ones(2, batch * rows), torch.empty(3, batch, width)
    p = [t.data_ptr() for t in (x, parameter, statistics, *sums)]
    for multiprocessors in (1, 132):
        machine.configure(multiprocessors)
        for name in NAMES:
            size = getattr(machine, f"{name}_workspace")(batch, rows, width)
            work = torch.full((size + 4096,), 0xA5, dtype=torch.uint8)
            end = (batch, rows, width)
            if name == "ada_layer_norm":
                machine.ada_layer_norm_backward(
                    p[0], p[0], p[1], p[2], 0, p[3], p[4], work.data_ptr(), *end, width, 0, 0, 0
                )
            else:
                machine.gated_residual_ada_layer_norm_backward(
                    0, p[0], p[0], p[0], p[1], p[1], p[2], 0, 0, *p[3:], work.data_ptr(), *end, width, width, 0, 0, 0
                )
            assert (work[size:] == 0xA5).all() and not (work[:size] == 0xA5).all()


def test_nothing_to_do(machine: Any) -> None:
    """No rows: the sums over them are zero. No samples or columns: nothing is touched."""
    sums, y = torch.full((3, 2, 8), float("nan")), torch.empty(1)
    p = [total.data_ptr() for total in sums]
    machine.gated_residual_ada_layer_norm_backward(0, 0, 0, y.data_ptr(), *[0] * 5, *p, 0, 2, 0, 8, 0, 0, 0, 0, 0)
    assert (sums == 0).all()
    for sizes in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        machine.ada_layer_norm_forward(*[0] * 5, *sizes, 0, 0, 1e-6, 0, 0, 0)
        machine.ada_layer_norm_backward(*[0] * 8, *sizes, 0, 0, 0, 0)
        assert machine.ada_layer_norm_workspace(*sizes) == 0


@pytest.mark.parametrize(
    "change",
    ({"batch": -1}, {"rows": -1}, {"d": -1}, {"d": 2**31}, {"rows": 2**40}, {"dtype": 3}, {"parameter_dtype": 2}),
    ids=str,
)
def test_a_call_that_cannot_be_raises(change: dict[str, int], machine: Any) -> None:
    given = {"batch": 1, "rows": 4, "d": 8, "dtype": 1, "parameter_dtype": 1} | change
    sizes, codes = [given[key] for key in ("batch", "rows", "d")], (given["dtype"], given["parameter_dtype"], 0)
    for name, tensors, strides in (("ada_layer_norm", 5, 2), ("gated_residual_ada_layer_norm", 8, 3)):
        with pytest.raises(RuntimeError, match=f"{name}_forward"):
            getattr(machine, f"{name}_forward")(*[0] * tensors, *sizes, *[0] * strides, 1e-6, *codes)


def test_a_gradient_of_what_is_absent_raises(machine: Any) -> None:
    """grad_y without a gate is grad_x; grad_gate takes a y."""
    for wanted in ((0, 1, 0), (0, 0, 1)):
        with pytest.raises(RuntimeError, match="gated_residual_ada_layer_norm_backward"):
            machine.gated_residual_ada_layer_norm_backward(*[0] * 7, *wanted, 0, 0, 0, 1, 4, 8, 0, 0, 0, 0, 0)


# ---- the grid: pure functions, no kernel runs


@pytest.mark.parametrize("multiprocessors", (108, 132, 148))  # A100, H100, B200
@pytest.mark.parametrize("rows", (333, 4096))
@pytest.mark.parametrize("d", REAL_WIDTHS)
def test_real_shapes_fill_the_gpu(d: int, rows: int, multiprocessors: int, machine: Any) -> None:
    """One wave of blocks, nearly full, of rows that outweigh their partial sums."""
    plan = machine.layer_norm_plan(2, rows, d, multiprocessors)
    blocks, resident = 2 * plan["chunks"], multiprocessors * (768 // plan["threads"])
    assert plan["threads"] % 32 == 0 and d / 8 <= plan["threads"] < d / 8 + 32
    assert multiprocessors <= blocks <= resident
    assert blocks > 0.8 * resident or plan["rows"] <= 8


def test_plans_cover_every_row_once(machine: Any) -> None:
    for batch in (1, 2, 7, 4096):
        for rows in (1, 2, 3, 5, 64, 333, 4096, 2**33):
            for d in (1, 8, 37, 640, 1536, 3072, 3073, 10**6):
                plan = machine.layer_norm_plan(batch, rows, d, 132)
                assert (plan["chunks"] - 1) * plan["rows"] < rows <= plan["chunks"] * plan["rows"]
                assert 32 <= plan["threads"] <= 384 and plan["threads"] % 32 == 0
                assert d > 3072 or 8 * plan["threads"] >= d
