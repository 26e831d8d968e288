"""The CUDA kernels, executed on the CPU by the SIMT machine of tests/simt, against float64 PyTorch.

The machine stands in for the extension `_cpu`, which has the same functions as `_cuda`, so that everything from the
public function to the kernel runs as it does on a GPU. Not covered: speed, the GPU's own exponential, and races
that a fixed order of threads cannot show (both orders are run).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import SPECS, OpSpec
from kolors_fast.ops._spec import Case, Inputs, cast, map_tensors, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def small_cases() -> list[Any]:
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in SPECS.values()
        for case in spec.cases
        if not case.model and "cuda" in spec.columns
    ]


def build(case: Case, dtype: torch.dtype) -> Inputs:
    return cast(case.make(torch.Generator().manual_seed(0)), dtype)


def double(inputs: Inputs) -> Inputs:
    def one(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    return {name: map_tensors(value, one) for name, value in inputs.items()}


def results(spec: OpSpec, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """All that a call computes: its results, and copies of what it writes in place."""
    inputs = {**inputs, **{name: map_tensors(inputs[name], Tensor.clone) for name in spec.mutated}}
    found = function(**inputs)
    found = [y for y in found if y is not None] if isinstance(found, tuple) else [found]
    return [*found, *(tensor for name in spec.mutated for tensor in tensors(inputs[name]))]


def gradients(spec: OpSpec, run: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Of every differentiable argument, for seeded gradients of all results that are rounded alike for all dtypes."""
    leaves = {n: map_tensors(inputs.get(n), lambda t: t.detach().requires_grad_()) for n in spec.gradients}
    outputs, generator = results(spec, run, {**inputs, **leaves}), torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, [leaf for value in leaves.values() for leaf in tensors(value)], seeds))


def check_outputs(spec: OpSpec, inputs: Inputs) -> None:
    ours, eager = results(spec, spec.function, inputs), results(spec, spec.eager, inputs)
    truth = results(spec, spec.eager, double(inputs))  # plain torch.nn.functional in float64
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert (broken := spec.tolerance.violation(o, e, t)) is None, broken


def check_gradients(spec: OpSpec, inputs: Inputs) -> None:
    ours, eager = gradients(spec, spec.function, inputs), gradients(spec, spec.eager, inputs)
    truth = gradients(spec, spec.eager, double(inputs))
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert (broken := spec.tolerance.violation(o, e, t, gradient=True)) is None, broken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), small_cases())
def test_forward_against_float64(spec: OpSpec, case: Case, dtype: torch.dtype, machine: Any) -> None:
    check_outputs(spec, build(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), [p for p in small_cases() if p.values[0].gradients])
def test_backward_against_float64(spec: OpSpec, case: Case, dtype: torch.dtype, machine: Any) -> None:
    check_gradients(spec, build(case, dtype))


# n, channels of x, of skip, positions, groups, multiprocessors: what each one exercises
GEOMETRIES = {
    "kolors_1920": (1, 1280, 640, 9, 32, 2),  # 60 per group, one group straddles the seam inside a 16-byte word's slice
    "kolors_960": (2, 640, 320, 16, 32, 2),  # 30 per group: slices of 120 channels
    "kolors_2560": (1, 1280, 1280, 4, 32, 2),  # 80 per group
    "kolors_320": (2, 320, 0, 35, 32, 2),  # 10 per group: words straddle groups
    "vae_128": (1, 128, 0, 300, 32, 8),  # 4 per group: two groups in a word
    "many_chunks": (1, 16, 0, 4096, 4, 132),  # more partials than a block merges for itself: the merging kernel runs
    "one_group": (1, 2504, 0, 5, 1, 2),  # wider than a block: the group is cut into parts
    "prime_group": (1, 1031, 0, 7, 1, 2),  # the same with single elements and a shorter last part
    "layer_norm_like": (2, 72, 0, 6, 1, 2),
    "instance_norm_like": (1, 331, 0, 11, 331, 2),  # one channel per group, a narrower last slice
    "narrow_last_slice": (1, 56, 0, 20, 7, 2),
    "seam_not_on_a_word": (2, 20, 12, 16, 4, 2),
    "one_position": (3, 64, 32, 1, 12, 2),
    "two_values": (1, 2, 0, 1, 1, 2),
}


def geometry_inputs(name: str, dtype: torch.dtype, channels_last: bool, mean: float = 0.0) -> Inputs:
    n, c, c_skip, hw, groups, _ = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tokens(channels: int) -> Tensor:
        values = normal(n, channels, hw) + mean
        return values.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else values

    inputs: Inputs = {"x": tokens(c), "num_groups": groups, "eps": 1e-5}
    inputs |= {"weight": 1 + 0.2 * normal(c + c_skip), "bias": 0.2 * normal(c + c_skip)}
    inputs |= {"skip": tokens(c_skip) if c_skip else None, "channel_add": normal(n, c + c_skip)}
    return cast(inputs, dtype)


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, channels_last: bool, machine: Any) -> None:
    machine.configure(GEOMETRIES[name][-1])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = geometry_inputs(name, dtype, channels_last)
        check_outputs(SPECS["group_norm_silu"], inputs)
        check_gradients(SPECS["group_norm_silu"], inputs)


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("name", ("kolors_320", "vae_128", "many_chunks", "one_group"))
def test_a_large_mean_does_not_cancel(name: str, channels_last: bool, machine: Any) -> None:
    """Mean 1e4 with deviation 1 leaves three digits in fp32; E[x^2] - E[x]^2 would leave none."""
    machine.configure(GEOMETRIES[name][-1])
    inputs = geometry_inputs(name, torch.float32, channels_last, mean=1e4)
    check_outputs(SPECS["group_norm_silu"], inputs)
    inputs["activation"] = None
    y = F.group_norm((inputs["x"] + inputs["channel_add"][..., None]).double(), inputs["num_groups"])
    y = y * inputs["weight"][:, None] + inputs["bias"][:, None]
    # half a unit in the last place of 1e4, in the mean and in x + channel_add, times a weight of at most 2
    assert (SPECS["group_norm_silu"].function(**inputs) - y).abs().max() < 4 * 2**-11


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
def test_a_huge_constant_has_no_variance(channels_last: bool, machine: Any) -> None:
    """2^66 is exact in every sum here, and its square is not finite in fp32."""
    inputs = geometry_inputs("vae_128", torch.float32, channels_last) | {"channel_add": None, "activation": None}
    inputs["x"].fill_(2.0**66)
    y = SPECS["group_norm_silu"].function(**inputs)
    assert torch.equal(y, inputs["bias"][:, None].expand_as(y))


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("name", ("kolors_960", "vae_128", "many_chunks", "one_group", "instance_norm_like"))
def test_bits_do_not_depend_on_the_order_of_threads(name: str, channels_last: bool, machine: Any) -> None:
    """Twice forward, then with all threads and blocks in reverse: a missing barrier or an unordered sum shows."""
    spec, runs = SPECS["group_norm_silu"], []
    inputs = geometry_inputs(name, torch.float32, channels_last)
    for reverse in (False, False, True):
        machine.configure(GEOMETRIES[name][-1], reverse)
        runs.append([spec.function(**inputs), *gradients(spec, spec.function, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_every_offset(dtype: torch.dtype, channels_last: bool, machine: Any) -> None:
    """Every tensor, outputs included, starts 0 to 8 elements past an aligned address, between sentinels."""
    n, c, c_skip, hw, groups = 1, 16, 8, 16, 3
    total, code = c + c_skip, DTYPES.index(dtype)
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (n, c, hw), "skip": (n, c_skip, hw), "weight": (total,), "bias": (total,), "add": (n, total)}
    values = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    values["grad"] = torch.randn((n, total, hw), generator=generator).to(dtype)
    statistics = torch.empty(2, n, groups)
    workspace = torch.empty(
        max(machine.group_norm_silu_workspace(n, total, hw, groups, channels_last, b) for b in (0, 1))
    )
    expected: list[Tensor] = []
    for offset in range(9):
        outputs = [torch.full((k + 16,), 7.25, dtype=dtype) for k in (n * total * hw, n * c * hw, n * c_skip * hw)]
        kept = {k: at_offset(v, offset) for k, v in values.items()}
        p = {k: v.data_ptr() for k, v in kept.items()}
        y, grad_x, grad_skip = (o[offset:].data_ptr() for o in outputs)
        mean, rstd = statistics[0].data_ptr(), statistics[1].data_ptr()
        common = (p["x"], p["skip"], p["weight"], p["bias"], p["add"])
        sizes = (n, c, c_skip, hw, groups)
        machine.group_norm_silu_forward(
            *common, y, mean, rstd, workspace.data_ptr(), *sizes, 1e-5, True, channels_last, code, code, 0
        )
        machine.group_norm_silu_backward(
            p["grad"], *common, mean, rstd, grad_x, grad_skip, 0, 0, 0, workspace.data_ptr(), *sizes, True,
            channels_last, code, code, 0,
        )  # fmt: skip
        for output in outputs:
            assert (output[:offset] == 7.25).all() and (output[output.numel() - 16 + offset :] == 7.25).all()
        results = [o[offset : o.numel() - 16 + offset].float() for o in outputs]
        expected = expected or results
        for result, first in zip(results, expected, strict=True):
            torch.testing.assert_close(result, first, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def at_offset(value: Tensor, offset: int) -> Tensor:
    storage = torch.full((value.numel() + 16,), float("nan"), dtype=value.dtype)
    return storage[offset : offset + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_workspace_is_as_large_as_it_says(name: str, channels_last: bool, machine: Any) -> None:
    """Whatever vector width the addresses lead to, nothing past the announced bytes is written."""
    n, c, c_skip, hw, groups, multiprocessors = GEOMETRIES[name]
    machine.configure(multiprocessors)
    total = c + c_skip
    for dtype, offset in ((torch.float32, 0), (torch.float16, 0), (torch.float16, 1)):  # vectors of 4, 8 and 1
        code = DTYPES.index(dtype)
        tensors = [at_offset(torch.ones(n * k * hw, dtype=dtype), offset) for k in (c, c_skip, total)]
        statistics = torch.empty(2, n, groups)
        x, skip, y, mean, rstd = (t.data_ptr() for t in (*tensors, *statistics))
        for backward in (False, True):
            size = machine.group_norm_silu_workspace(n, total, hw, groups, channels_last, backward)
            work = torch.full((size + 4096,), 0xA5, dtype=torch.uint8)
            given = (work.data_ptr(), n, c, c_skip, hw, groups)
            flags = (True, channels_last, code, code, 0)
            if backward:
                machine.group_norm_silu_backward(y, x, skip, 0, 0, 0, mean, rstd, 0, 0, 0, 0, 0, *given, *flags)
            else:
                machine.group_norm_silu_forward(x, skip, 0, 0, 0, y, mean, rstd, *given, 1e-5, *flags)
            assert (work[size:] == 0xA5).all()


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "planes"))
def test_one_gradient_alone_has_the_bits_of_all(channels_last: bool, machine: Any) -> None:
    spec = SPECS["group_norm_silu"]
    inputs = geometry_inputs("seam_not_on_a_word", torch.float32, channels_last)
    together = dict(zip(spec.gradients, gradients(spec, spec.function, inputs), strict=True))
    for name in spec.gradients:
        alone = gradients(replace(spec, gradients=(name,)), spec.function, inputs)
        assert torch.equal(alone[0], together[name]), name


def test_absent_weight_and_bias_are_the_identity(machine: Any) -> None:
    x, grad = torch.randn(2, 12, 10), torch.randn(2, 12, 10)
    mean, rstd, y, grad_x = torch.empty(2, 3), torch.empty(2, 3), torch.empty(2, 12, 10), torch.empty(2, 12, 10)
    work = torch.empty(machine.group_norm_silu_workspace(2, 12, 10, 3, False, True))
    sizes = (2, 12, 0, 10, 3)
    p = [t.data_ptr() for t in (x, grad, mean, rstd, y, grad_x, work)]
    machine.group_norm_silu_forward(p[0], 0, 0, 0, 0, p[4], p[2], p[3], p[6], *sizes, 1e-5, False, False, 0, 0, 0)
    torch.testing.assert_close(y, F.group_norm(x, 3), rtol=1e-5, atol=1e-6)
    machine.group_norm_silu_backward(
        p[1], p[0], 0, 0, 0, 0, p[2], p[3], p[5], 0, 0, 0, 0, p[6], *sizes, False, False, 0, 0, 0
    )
    x.requires_grad_()
    torch.testing.assert_close(grad_x, torch.autograd.grad(F.group_norm(x, 3), x, grad)[0], rtol=1e-4, atol=1e-5)


def test_an_empty_batch_has_zero_parameter_gradients(machine: Any) -> None:
    grads = torch.full((2, 6), float("nan"))
    p = [g.data_ptr() for g in grads]
    machine.group_norm_silu_backward(*[0] * 10, p[0], p[1], 0, 0, 0, 6, 0, 4, 2, True, True, 0, 0, 0)
    assert (grads == 0).all()
    machine.group_norm_silu_forward(*[0] * 9, 0, 6, 0, 4, 2, 1e-5, True, True, 0, 0, 0)
    machine.guided_step(*[0] * 9, 0, 2, 0, 0)


@pytest.mark.parametrize(
    "change",
    ({"groups": 5}, {"groups": 0}, {"hw": 2**31}, {"dtype": 3, "weight_dtype": 3}, {"weight_dtype": 2}, {"c_skip": -1}),
)
def test_a_call_that_cannot_be_raises(change: dict[str, int], machine: Any) -> None:
    given = {"n": 1, "c": 12, "c_skip": 0, "hw": 4, "groups": 3, "dtype": 1, "weight_dtype": 1} | change
    sizes = [given[k] for k in ("n", "c", "c_skip", "hw", "groups")]
    with pytest.raises(RuntimeError, match="group_norm_silu_forward"):
        machine.group_norm_silu_forward(*[0] * 9, *sizes, 1e-5, True, True, given["dtype"], given["weight_dtype"], 0)
    with pytest.raises(RuntimeError, match="guided_step"):
        machine.guided_step(*[0] * 9, 8, 0, 0, 0)


# ---- the grid: pure functions, no kernel runs

# n, channels, positions: every GroupNorm of the UNet at 1024x1024, and the largest and smallest of the VAE
REAL_SHAPES = [
    (2, 320, 16384), (2, 640, 16384), (2, 960, 16384), (2, 320, 4096), (2, 640, 4096), (2, 960, 4096),
    (2, 1280, 4096), (2, 1920, 4096), (2, 640, 1024), (2, 1280, 1024), (2, 1920, 1024), (2, 2560, 1024),
    (1, 128, 1048576), (1, 256, 1048576), (1, 512, 16384),
]  # fmt: skip


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("last", (True, False), ids=("channels_last", "planes"))
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes_fill_the_gpu(shape: tuple[int, int, int], last: bool, backward: bool, machine: Any) -> None:
    """One wave of blocks, nearly full; only where a thread would get less than four loads may it be less."""
    n, c, hw = shape
    for sms in (108, 132, 148):
        resident = sms * (2 if backward else 4)
        for vector in (4, 8):
            plan = machine.plan(n, c, hw, 32, last, vector, backward, sms)
            assert plan["blocks"] >= sms
            if not last:  # a whole number of chunks per plane: more than half of what fits, in 8 warps a block
                assert plan["blocks"] > resident / 2 or plan["rows"] <= 4 * 32 * vector
                continue
            assert 0.8 * resident <= plan["blocks"] <= resident or plan["rows"] <= 4 * plan["row_lanes"]
            assert plan["columns"] * plan["row_lanes"] >= 0.9 * 256
            assert plan["columns"] * 16 >= 128  # bytes side by side


@pytest.mark.parametrize("last", (True, False), ids=("channels_last", "planes"))
def test_plans_cover_every_element_once(last: bool, machine: Any) -> None:
    shapes = [(n, c + s, hw, g) for n, c, s, hw, g, _ in GEOMETRIES.values()]
    for n, c, hw, groups in shapes + [(2, c, hw, 32) for _, c, hw in REAL_SHAPES]:
        for vector in (1, 4, 8):
            if (c if last else hw) % vector or (last and (c // groups) % vector and c // groups > 256):
                continue
            p = machine.plan(n, c, hw, groups, last, vector, False, 132)
            assert (p["chunks"] - 1) * p["rows"] < hw <= p["chunks"] * p["rows"]
            assert p["threads"] % 32 == 0 and p["threads"] <= 1024
            units = n * p["slices"] * p["chunks"]
            if not last:
                assert p["slices"] == c and p["rows"] % vector == 0 and (p["blocks"] - 1) * 8 < units <= p["blocks"] * 8
                continue
            assert p["blocks"] == units and p["slice_channels"] % vector == 0
            assert p["columns"] * vector == p["slice_channels"] and p["columns"] * p["row_lanes"] <= p["threads"]
            width, count = (c, p["slices"]) if p["parts"] == 1 else (c // groups, p["parts"])
            assert (count - 1) * p["slice_channels"] < width <= count * p["slice_channels"]


# ---- the machine itself


def address(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_machine_rounds_as_torch_does(library: ctypes.CDLL) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 6, 20000)
    between = (halves[1:30000] + halves[:29999]) / 2  # ties
    values = torch.cat([halves, noise, between, -between, torch.tensor([65519.9, 65520.0, 1e30, 0.0, -0.0])])
    half, bfloat = torch.empty_like(values, dtype=torch.half), torch.empty_like(values, dtype=torch.bfloat16)
    back = torch.empty_like(values)
    library.test_round(*map(address, (values, half, bfloat, back)), len(values))
    number = ~values.isnan()
    assert half.isnan().equal(~number) and bfloat.isnan().equal(~number)
    assert torch.equal(half.view(torch.int16)[number], values.half().view(torch.int16)[number])
    assert torch.equal(bfloat.view(torch.int16)[number], values.bfloat16().view(torch.int16)[number])
    assert torch.equal(back[number], values.half().float()[number])


def test_the_machine_sums_a_warp(library: ctypes.CDLL) -> None:
    values, sums = torch.arange(64.0), torch.empty(64)
    assert library.test_sum_warp(address(values), address(sums)) == 0
    assert (sums[:32] == 496).all() and (sums[32:] == 1520).all()


def test_the_machine_notices_what_is_wrong(library: ctypes.CDLL) -> None:
    out, four = torch.empty(64), torch.zeros(9)
    start = (-four.data_ptr() // 4) % 4  # elements to the next 16-byte boundary
    aligned = four[start:]
    library.configure(2, False)
    assert library.test_exchange(address(out), True) == 0
    assert torch.equal(out, torch.arange(1.0, 65.0) % 64)
    assert library.test_exchange(address(out), False) == 0
    assert out[:63].isnan().all()  # the neighbour had not written yet
    assert library.test_diverge(address(out)) == 719
    assert library.test_load_four(address(aligned), address(aligned)) == 0
    assert library.test_load_four(address(aligned[1:]), address(aligned)) == 716


# batch, queries, heads, head dim, added queries, multiprocessors: what each one exercises
ROWS = {
    "sd35": (1, 40, 3, 64, 9, 2),  # 16 blocks for more rows than they hold at once: each takes several
    "pixart": (2, 9, 2, 72, 0, 2),  # 9 packs of a row: 4 threads of 3
    "wide": (1, 5, 2, 256, 3, 2),  # 32 threads of 2 packs in fp32
    "odd": (2, 7, 3, 10, 2, 2),  # single elements
    "one_row": (1, 1, 1, 64, 0, 132),
}


def rows_inputs(name: str, dtype: torch.dtype) -> Inputs:
    batch, queries, heads, head_dim, added, _ = ROWS[name]
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def stream(tokens: int) -> list[Tensor]:
        return list(normal(batch, tokens, 3, heads, head_dim).unbind(2))  # views of a fused projection

    inputs: Inputs = dict(zip("qkv", stream(queries), strict=True))
    inputs |= {"q_weight": normal(head_dim), "k_weight": normal(head_dim)}
    inputs["added"] = (*stream(added), normal(head_dim), normal(head_dim)) if added else None
    return cast(inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_width(name: str, dtype: torch.dtype, machine: Any) -> None:
    machine.configure(ROWS[name][-1])
    inputs = rows_inputs(name, dtype)
    check_outputs(SPECS["qk_norm"], inputs)
    check_gradients(SPECS["qk_norm"], inputs)


def test_rows_do_not_depend_on_the_order_of_threads(machine: Any) -> None:
    spec, inputs, runs = SPECS["qk_norm"], rows_inputs("sd35", torch.float32), []
    for reverse in (False, False, True):
        machine.configure(2, reverse)
        runs.append([*results(spec, spec.function, inputs), *gradients(spec, spec.function, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("multiprocessors", (1, 2, 7))
def test_the_workspace_of_rows_is_as_large_as_it_says(multiprocessors: int, machine: Any) -> None:
    """The sums of all blocks lie in it, whatever the parts are and whichever of them have few rows."""
    machine.configure(multiprocessors)
    x, weight = torch.randn(1, 400, 2, 8), torch.ones(8)
    for tokens in ((400, 400, 400, 400), (400, 1, 1, 1), (3, 2, 1)):
        parts = array("q")
        kept = [(torch.empty(1, n, 2, 8), torch.empty(8)) for n in tokens]
        for n, (grad_x, grad_weight) in zip(tokens, kept, strict=True):
            for rows in (x[:, :n], grad_x, x[:, :n]):
                parts.extend((rows.data_ptr(), *rows.stride()[:3]))
            parts.extend((weight.data_ptr(), grad_weight.data_ptr(), n))
        size = machine.qk_norm_workspace(8)
        work = torch.full((size + 4096,), 0xA5, dtype=torch.uint8)
        machine.qk_norm_backward(parts.buffer_info()[0], work.data_ptr(), len(tokens), 1, 2, 8, 1e-6, 0, 0, 0)
        assert (work[size:] == 0xA5).all()
        assert not any(tensor.isnan().any() for pair in kept for tensor in pair)


def test_a_row_longer_than_a_warp_holds_is_refused(machine: Any) -> None:
    with pytest.raises(RuntimeError, match="qk_norm_forward: cudaError 1"):
        machine.qk_norm_forward(0, 0, 1, 1, 257, 1e-6, 0, 0, 0)
