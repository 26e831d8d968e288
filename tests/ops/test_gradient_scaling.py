"""Per-resblock gradient scaling: bits against plain PyTorch, what overflows where, what a list of tensors may hold."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast.ops import SPECS, _backends, scale_and_filter, unscale_and_filter, unscale_grads_, use_backend
from kolors_fast.ops._spec import cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT, HALF, BF16)
BACKENDS = ["reference", *(name for name in ("cpu", "triton", "cuda") if _backends.unavailable(name) is None)]
# zeros, subnormals, what overflows fp16, bf16 and fp32 when scaled, and what is not finite; 37 of them, for a tail
VALUES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 6e-8, -6e-5, 1.0, -1.5, math.pi, 65504.0, -65520.0, 1e30, -3.38e38]
VALUES += [math.inf, -math.inf, math.nan, *torch.linspace(-20, 20, 20).tolist()]
SCALES = [2.0**13, 2.0**24, 2.0**13.5, 2.0**-17, 1e-38, 3e38, math.inf, 0.0]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a backend, which is forced."""
    with use_backend(request.param):
        yield "cpu" if request.param in ("cpu", "reference") else DEVICE


def plain(z: Tensor, dtype: torch.dtype, add: Tensor | None = None) -> Tensor:
    z[~torch.isfinite(z)] = 0
    return (z if add is None else z + add.float()).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu().nan_to_num(7.0), b.cpu().nan_to_num(7.0))


def check_bits(device: str) -> None:
    """Every pair of dtypes on special values; also run in a process of its own for each instruction set."""
    for scale in SCALES:
        s = torch.tensor([scale], device=device)
        for source in DTYPES:
            x = torch.tensor(VALUES, device=device).to(source)
            add = torch.linspace(-1, 1, len(VALUES), device=device)
            add[3], add[4] = math.nan, -math.inf
            for target in DTYPES:
                what = (scale, source, target)
                assert same_bits(scale_and_filter(x, s, dtype=target), plain(x.float() * s, target)), what
                assert same_bits(unscale_and_filter(x, s, dtype=target), plain(x.float() / s, target)), what
                for a in (add, add.to(source)):
                    ours = unscale_and_filter(x, s, add=a, dtype=target)
                    assert same_bits(ours, plain(x.float() / s, target, a)), (*what, a.dtype)
            grad = x.clone()
            unscale_grads_([grad], s)
            assert same_bits(grad, (x.float() / s).to(source)), (scale, source)


def test_bits_are_those_of_plain_pytorch(device: str) -> None:
    check_bits(device)


def test_every_instruction_set_has_the_same_bits() -> None:
    for isa in ("avx512bf16", "avx512", "avx2", "generic"):
        environment = {**os.environ, "KOLORS_FAST_CPU_ISA": isa, "KOLORS_FAST_BACKEND": "cpu"}
        done = subprocess.run([sys.executable, __file__], env=environment, cwd=Path(sys.prefix), capture_output=True)
        error = done.stderr.decode()
        assert done.returncode == 0 or "which this CPU does not have" in error, (isa, error)


@pytest.mark.parametrize("name", ["scale_and_filter", "unscale_and_filter"])
def test_cases_have_the_bits_of_plain_pytorch(name: str, device: str) -> None:
    """The generated tests allow what eager PyTorch errs."""
    for case in [case for case in SPECS[name].cases if not case.model]:
        for dtype in DTYPES:
            inputs = cast(case.make(torch.Generator().manual_seed(0)), dtype, device)
            x, scale, add = inputs["x"].float(), inputs["scale"], inputs.get("add")
            target = inputs["dtype"] or (inputs["x"] if add is None else add).dtype
            expected = plain(x * scale if name == "scale_and_filter" else x / scale, target, add)
            assert same_bits(SPECS[name].function(**inputs), expected), (case.name, dtype)


def test_subnormals_are_kept(device: str) -> None:
    x, scale = torch.tensor([2.0**-140, -(2.0**-149)], device=device), torch.tensor(2.0, device=device)
    assert scale_and_filter(x, scale).tolist() == [2.0**-139, -(2.0**-148)]
    assert unscale_and_filter(x * 4, scale).tolist() == [2.0**-139, -(2.0**-148)]
    assert scale_and_filter(x, torch.tensor(2.0**120, device=device), dtype=HALF).tolist() == [2.0**-20, 0.0]


def test_an_overflow_of_the_branch_is_seen_and_one_of_fp32_is_not(device: str) -> None:
    x = torch.tensor([1.0, 9.0, 1e38], device=device)
    y = scale_and_filter(x, torch.tensor(2.0**13, device=device), dtype=HALF)
    assert y.tolist() == [2.0**13, math.inf, 0.0]
    z = unscale_and_filter(y, torch.tensor(2.0**13, device=device), add=torch.ones(3, device=device))
    assert z.tolist() == [2.0, 1.0, 1.0] and z.dtype == FLOAT


# ---- lists of tensors


def grads_of(sizes: list[int], device: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(device, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


def check_list(grads: list[Tensor], scales: Tensor) -> None:
    """In place, one rounding, the norm within its stated bound, and no flag."""
    quotients = [grad.float() / scale for grad, scale in zip(grads, scales, strict=True)]
    pointers = [grad.data_ptr() for grad in grads]
    norm, nonfinite = unscale_grads_(grads, scales)
    truth = math.sqrt(sum(q.double().square().sum().item() for q in quotients))
    assert norm.dtype == FLOAT and norm.shape == () and abs(norm.item() - truth) <= 20 * 2**-24 * truth
    assert nonfinite.dtype == torch.bool and nonfinite.shape == (len(grads),) and not nonfinite.any()
    for grad, quotient, pointer in zip(grads, quotients, pointers, strict=True):
        assert grad.data_ptr() == pointer and torch.equal(grad, quotient.to(grad.dtype))


def test_three_four_five(device: str) -> None:
    grads = [torch.tensor([6.0], device=device), torch.tensor([[0.0, -1.0]], device=device, dtype=HALF)]
    norm, nonfinite = unscale_grads_(grads, torch.tensor([2.0, 0.25], device=device))
    assert norm.item() == 5.0 and nonfinite.tolist() == [False, False]
    assert grads[0].tolist() == [3.0] and grads[1].tolist() == [[0.0, -4.0]]


def test_many_tensors_of_all_dtypes(device: str) -> None:
    """More than one launch takes, with empty ones, and one of several chunks."""
    sizes = [(7 * i) % 23 for i in range(300)]
    sizes[160] = 3 * 16384 + 5
    check_list(grads_of(sizes, device), torch.linspace(2**7, 2**15, 300, device=device))


def test_large_tensors_on_all_threads(device: str) -> None:
    slow = _backends._forced == "triton" and _backends.interpreted()
    sizes = [3 * 16384 + 1] if slow else [200_003, 0, 65_536, 31]
    check_list(grads_of(sizes, device), torch.full((), 2.0**13.5, device=device).expand(len(sizes)))


def test_an_empty_list(device: str) -> None:
    for grads in ([], [torch.empty(0, 3, device=device)]):
        norm, nonfinite = unscale_grads_(grads, torch.ones(len(grads), device=device))
        assert norm.item() == 0.0 and nonfinite.tolist() == [False] * len(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 41, 16383, 16400])
def test_the_tensor_with_a_nonfinite_is_named(wrong: float, at: int, dtype: torch.dtype, device: str) -> None:
    grads = grads_of([5, 16401, 0, 9], device, (dtype,))
    grads[1][at] = wrong
    norm, nonfinite = unscale_grads_(grads, torch.full((4,), 4.0, device=device))
    assert nonfinite.tolist() == [False, True, False, False] and not norm.isfinite()


def test_what_overflows_when_stored_counts_as_nonfinite(device: str) -> None:
    """Their fp32 quotients are finite."""
    grads = [torch.full((3,), torch.finfo(dtype).max, device=device, dtype=dtype) for dtype in (HALF, BF16)]
    norm, nonfinite = unscale_grads_(grads, torch.tensor([0.5, 0.997], device=device))
    assert nonfinite.tolist() == [True, True] and not norm.isfinite()
    assert all(grad.isinf().all() for grad in grads)


def test_a_norm_that_overflows_is_no_nonfinite_gradient(device: str) -> None:
    grads = [torch.full((3,), 1e25, device=device), torch.ones(3, device=device)]
    norm, nonfinite = unscale_grads_(grads, torch.ones(2, device=device))
    assert nonfinite.tolist() == [False, False] and norm.item() > 1e19


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_keep_their_neighbours_and_the_norm_its_bits(dtype: torch.dtype, device: str) -> None:
    """Wherever a tensor starts, its sum has the same order."""
    values, norms = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device, dtype), set()
    for offset in range(9):
        storage = torch.full((1016,), 7.25, device=device, dtype=dtype)
        view = storage[offset : offset + 1000].copy_(values)
        norms.add(unscale_grads_([view], torch.full((1,), 3.0, device=device))[0].item())
        assert (storage[:offset] == 7.25).all() and (storage[offset + 1000 :] == 7.25).all()
        assert torch.equal(view.cpu(), (values.cpu().float() / 3).to(dtype))  # on a GPU torch multiplies by 1 / 3
    assert len(norms) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
def test_same_bits_for_any_number_of_threads() -> None:
    before, runs = torch.get_num_threads(), []
    with use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(unscale_grads_(grads_of([70_001, 3, 40_000], "cpu"), torch.full((3,), 3.0))[0])
    torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_autograd_knows_of_the_write(device: str) -> None:
    grad, scales = torch.ones(3, device=device), torch.ones(1, device=device)
    before = grad._version
    unscale_grads_([grad], scales)
    assert grad._version > before
    weight = torch.ones(3, device=device, requires_grad=True)
    product = weight * grad
    unscale_grads_([grad], scales)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- tracing


def test_functionalised_in_a_compiled_step() -> None:
    """Reads before and after the write, and a gradient that is an intermediate of the graph, come out as in eager."""

    def step(a: Tensor, b: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        before, scaled = a.sum(), b * 3
        norm, nonfinite = unscale_grads_([a, scaled], scales)
        return before, a + 1, scaled, norm, nonfinite

    given = (torch.randn(4, 5), torch.randn(7).half(), torch.tensor([2.0, 2.0**7.5]))
    plainly, traced = [t.clone() for t in given], [t.clone() for t in given]
    expected = step(*plainly)
    results = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    for a, b in zip((*results, *traced), (*expected, *plainly), strict=True):
        assert torch.equal(a, b)


def test_launchers_never_read_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have none, and a device that is asked for one makes the host wait."""
    calls: list[str] = []
    names = ("scale_and_filter", "unscale_and_filter", "unscale_grads")
    stand_in = SimpleNamespace(**{n: lambda *_, n=n: calls.append(n) for n in names}, unscale_grads_workspace=max)
    monkeypatch.setattr(_backends, "extension", lambda name: stand_in)
    x, scale = torch.empty(4, 6, device="meta"), torch.empty((), device="meta")
    for name, inputs in {
        "scale_and_filter": {"x": x, "scale": scale, "dtype": HALF},
        "unscale_and_filter": {"x": x, "scale": scale, "add": x},
        "unscale_grads_": {"grads": [x, x.half()], "scales": scale.expand(2)},
    }.items():
        spec = SPECS[name]
        spec.columns["cuda"].forward(spec.prepare(**inputs))
    assert calls == list(names)


# ---- refusals

X, ONE = torch.ones(2, 3), torch.ones(())
META, WHOLE, WANTS = torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3).clone()
WANTS.requires_grad_()


@pytest.mark.parametrize("op", [scale_and_filter, unscale_and_filter])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"x": WHOLE}, TypeError, "x: expected a floating dtype of 16 to 64 bits, got torch.int64"),
        ({"scale": ONE.double()}, TypeError, "scale: expected torch.float32, got torch.float64"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: expected one element, got \[2\]"),
        ({"scale": ONE.to("meta")}, ValueError, "scale: expected a tensor on cpu, got meta"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating dtype, got torch.int32"),
        ({"x": WANTS}, ValueError, "[a-z]+: expected a tensor without gradient, got requires_grad=True"),
    ],
)
def test_bad_arguments_are_named(op: Any, inputs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**{"x": X, "scale": ONE} | inputs)


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (torch.ones(3), ValueError, r"add: expected \[2, 3\], got \[3\]"),
        (X.double(), TypeError, "add: expected torch.float32 or torch.float16, got torch.float64"),
        (META, ValueError, "add: expected a tensor on cpu, got meta"),
        (WANTS, ValueError, "[a-z]+: expected a tensor without gradient"),
    ],
)
def test_a_bad_add_is_named(add: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^unscale_and_filter: {message}"):
        unscale_and_filter(X.half(), ONE, add=add)


@pytest.mark.parametrize(
    ("grads", "scales", "error", "message"),
    [
        ([X], torch.ones(1, dtype=HALF), TypeError, "scales: expected torch.float32, got torch.float16"),
        ([X, X], torch.ones(1), ValueError, r"scales: expected \[2\], one for each gradient, got \[1\]"),
        ([X], ONE, ValueError, r"scales: expected \[1\], one for each gradient, got \[\]"),
        ([X, WHOLE], torch.ones(2), TypeError, r"grads\[1\]: expected .*float32 scales, got torch.int64"),
        ([X.double()], torch.ones(1), TypeError, r"grads\[0\]: expected .*float32 scales, got torch.float64"),
        ([X, META], torch.ones(2), ValueError, r"grads\[1\]: expected a tensor on cpu as scales, got meta"),
        (
            [X[:, ::2]],
            torch.ones(1),
            ValueError,
            r"grads\[0\]: expected elements without gaps or overlap, got \[2, 2\]",
        ),
        ([X[:1].expand(2, 3)], torch.ones(1), ValueError, r"grads\[0\]: expected elements without gaps or overlap"),
        ([WANTS], torch.ones(1), ValueError, r"grads\[0\]: expected a tensor without gradient, got requires_grad=True"),
    ],
)
def test_bad_lists_are_named(grads: list[Tensor], scales: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^unscale_grads_: {message}"):
        unscale_grads_(grads, scales)


def test_a_subclass_beside_plain_scales_is_named() -> None:
    class Sharded(Tensor):
        pass

    with pytest.raises(TypeError, match=r"unscale_grads_: grads\[0\]: expected a plain tensor, got Sharded"):
        unscale_grads_([X.clone().as_subclass(Sharded)], torch.ones(1))


def test_a_dtype_that_kernels_do_not_write_runs_on_the_reference() -> None:
    y = scale_and_filter(X, 2 * ONE, dtype=torch.float64)
    assert y.dtype == torch.float64 and (y == 2).all()
    call = SPECS["scale_and_filter"].prepare(X, ONE, dtype=torch.float64)
    assert SPECS["scale_and_filter"].columns["cpu"].declines(call) == (
        "writes float32, float16 and bfloat16, not torch.float64"
    )


if __name__ == "__main__":
    check_bits("cpu")
