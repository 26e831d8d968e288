"""What the generated tests do not see of geglu, swiglu and rms_norm: tails, infinities, rows in place, splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.ops import BackendError, _backends, _rows, geglu, rms_norm, swiglu, use_backend
from kolors_fast.ops.rms_norm import TRITON_FEATURES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", *(name for name in ("cpu", "triton") if _backends.unavailable(name) is None)]
FUSED = [name for name in BACKENDS if name != "reference"]
GATES = {"geglu": geglu, "swiglu": swiglu}


def device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the halves, against numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_are_in_the_order_of_the_models(backend: str) -> None:
    """gelu(1) = 0.841345, silu(1) = 0.731059: diffusers gates with the second half, ChatGLM with the first."""
    h = torch.tensor([[3.0, 5.0, 1.0, 1.0]], device=device(backend))
    with use_backend(backend):
        torch.testing.assert_close(geglu(h).cpu(), torch.tensor([[3 * 0.8413447, 5 * 0.8413447]]))
        torch.testing.assert_close(swiglu(h.flip(-1)).cpu(), torch.tensor([[5 * 0.7310586, 3 * 0.7310586]]))


# ---- the left tail of Phi


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("backend", FUSED)
def test_gelu_keeps_its_digits_in_the_left_tail(backend: str) -> None:
    """A relative error, which 0.5 * (1 + erf(x / sqrt(2))) in fp32 loses all of at x = -6. 6 ulp: two
    exponentials of up to 2, and half an ulp for each of four more operations; from -12.5 on, below that the exponential
    is subnormal."""
    gate = torch.linspace(-12.5, 3.0, 4001)
    h = torch.cat([torch.ones_like(gate), gate]).to(device(backend)).requires_grad_()
    with use_backend(backend):
        y = geglu(h)
        (grad,) = torch.autograd.grad(y.sum(), h)
    truth = torch.tensor([x * phi(x) for x in gate.tolist()], dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps
    # truth 0 where gate is 0
    assert ((y.detach().cpu() - truth).abs() <= 6 * ulp * truth.abs()).all()
    assert torch.equal(grad[: len(gate)].cpu(), y.detach().cpu())  # the gradient of value, for grad_y = 1
    slope = torch.tensor(
        [phi(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in gate.tolist()], dtype=torch.float64
    )
    # two terms, the smaller of which is at most as large as their sum where x < -1.5: twice that
    tail = gate < -1.5
    assert ((grad[len(gate) :].cpu() - slope).abs() <= 12 * ulp * slope.abs())[tail].all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_in_16_bit_is_the_rounded_truth(backend: str, dtype: torch.dtype) -> None:
    """The cheaper Phi (relative error 3e-5) may turn a rounding near a tie, so half a unit in the last place becomes a
    little more, never a whole one."""
    gate = torch.linspace(-5.0, 5.0, 4001).to(dtype)
    with use_backend(backend):
        y = geglu(torch.cat([torch.ones_like(gate), gate]).to(device(backend))).cpu().double()
    truth = torch.tensor([x * phi(x) for x in gate.tolist()], dtype=torch.float64)
    info = torch.finfo(dtype)
    exponent = torch.log2(truth.abs().clamp(min=info.tiny)).floor()
    unit = info.eps * 2.0**exponent
    assert ((y - truth).abs() <= 0.5 * unit + 4e-5 * truth.abs()).all()


# ---- what is not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", GATES)
def test_infinite_gates_give_what_float64_defines(op: str, backend: str) -> None:
    """act(-inf) = -inf * 0 = NaN, act(inf) = inf; large finite gates are 0 or themselves."""
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([-inf, inf, nan, -1e4, 1e4, -300.0, -80.0, -20.0, -13.27, -13.25, 0.0, -0.0] + [1.0] * 21)
    value = torch.full_like(gate, 2.0)
    h = torch.cat([gate, value] if op == "swiglu" else [value, gate])
    activation = {"geglu": lambda x: x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5)), "swiglu": F.silu}[op]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with use_backend(backend):
            y = GATES[op](h.to(device(backend), dtype)).cpu().double()
        truth, info = 2 * activation(gate.to(dtype).double()), torch.finfo(dtype)
        atol = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)  # fp32 inside
        torch.testing.assert_close(y, truth, rtol=2 * info.eps, atol=atol, equal_nan=True)


# ---- rows


@pytest.mark.parametrize(
    "x",
    [
        normal(4, 6),
        normal(4, 6)[:, 2:5],
        normal(2, 3, 8).chunk(2, dim=-1)[1],
        normal(2, 3, 8)[:, :2],
        normal(6, 4).t(),
        normal(4, 6)[:, ::2],
        normal(4, 6)[::2],
        normal(1, 6).expand(3, 6),
        normal(2, 1, 8)[:, :, :5],
        normal(5),
        normal(10)[::2],
        normal(4, 3)[:, :1],
        normal(2, 4, 3, 8).transpose(1, 2),
    ],
    ids=lambda x: f"{tuple(x.shape)}x{x.stride()}",
)
def test_row_stride_describes_the_rows(x: Tensor) -> None:
    """Against where every element really lies; None exactly where no one stride says it."""
    places = torch.arange(x.untyped_storage().nbytes() // 4)
    places = places.as_strided(x.shape, x.stride(), x.storage_offset()).reshape(-1, x.shape[-1])
    start, stride = places[:, :1], _rows.row_stride(x)
    dense = bool((places - start == torch.arange(x.shape[-1])).all())
    steps = (start[1:] - start[:-1]).unique()
    assert (stride is not None) == (dense and len(steps) <= 1)
    if stride is not None and len(steps):
        assert stride == steps.item()
    assert (_rows.as_rows(x) is x) == (stride is not None)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("features", [24, 32])
def test_rows_that_lie_apart_are_read_in_place(backend: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = normal(5, 3, 3 * features).to(device(backend))
    x, weight = wide.chunk(3, dim=-1)[1], normal(features).to(wide)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(geglu, ()), (swiglu, ()), (rms_norm, (weight,))]
    expected = []
    with use_backend(backend):
        for op, rest in calls:
            leaf = x.contiguous().requires_grad_()
            expected.append((op(leaf, *rest), *torch.autograd.grad(op(leaf, *rest).sum(), leaf)))
        copies: list[Tensor] = []
        as_rows = _rows.as_rows
        monkeypatch.setattr(_rows, "as_rows", lambda t: copies.append(t) if as_rows(t) is not t else t)
        for (op, rest), (y, grad) in zip(calls, expected, strict=True):
            leaf = x.detach().requires_grad_()
            assert torch.equal(op(leaf, *rest), y)
            assert torch.equal(torch.autograd.grad(op(leaf, *rest).sum(), leaf)[0], grad)
    assert not copies and torch.equal(wide, normal(5, 3, 3 * features).to(wide))


# ---- the C++ column: threads and instruction sets

LARGE = [(3, 2 * 9001), (130, 2 * 257), (5000, 2 * 5)]  # few long rows, odd ones, many short ones: above one thread's


def everything(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of the three ops on the C++ column."""
    h, results = normal(*shape).to(dtype), {}
    weight = (1 + 0.2 * normal(shape[1])).to(dtype)
    with use_backend("cpu"):
        for name, op in {**GATES, "rms_norm": rms_norm}.items():
            leaves = [h.detach().requires_grad_()]
            if op is rms_norm:
                leaves.append(weight.detach().requires_grad_())
            y = op(*leaves)
            grads = torch.autograd.grad(y, leaves, normal(*y.shape).flip(0).to(dtype))
            results |= {f"{name} {i}": value for i, value in enumerate((y.detach(), *grads))}
    return results


def expected_everything(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with PyTorch's own functions, in float64."""
    h, results = normal(*shape).to(dtype).double(), {}
    weight = (1 + 0.2 * normal(shape[1])).to(dtype).double()
    functions: dict[str, Callable[..., Tensor]] = {
        "geglu": lambda h: h.chunk(2, -1)[0] * F.gelu(h.chunk(2, -1)[1]),
        "swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        "rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
    }
    for name, function in functions.items():
        leaves = [tensor.detach().requires_grad_() for tensor in ((h, weight) if name == "rms_norm" else (h,))]
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, normal(*y.shape).flip(0).to(dtype).double())
        results |= {f"{name} {i}": value for i, value in enumerate((y.detach(), *grads))}
    return results


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("shape", LARGE)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, int], threads: None) -> None:
    torch.set_num_threads(1)
    serial = everything(shape, torch.float32)
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, value in everything(shape, torch.float32).items():
            assert torch.equal(value, serial[name]), (name, count)


def check_against_float64() -> None:
    """All dtypes, in a process of its own for each instruction set. 2e-6 of the largest value is tens of roundings in
    fp32, among them those of sums over 5000 rows; else half a unit of the dtype."""
    for dtype, rounding in ((torch.float32, 2e-6), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        for shape in LARGE:
            truth = expected_everything(shape, dtype)
            for name, ours in everything(shape, dtype).items():
                error, bound = (ours.double() - truth[name]).abs().max(), 1.05 * rounding * truth[name].abs().max()
                assert error <= bound, (name, dtype, shape, float(error), float(bound))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
def test_every_instruction_set_agrees_with_float64(on_every_instruction_set: Callable[[str], None]) -> None:
    on_every_instruction_set(__file__)


# ---- refusals


@pytest.mark.parametrize("op", GATES)
def test_gates_refuse_in_one_sentence(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: h: expected \[\.\.\., 2F\], got \[2, 5\]$"):
        GATES[op](normal(2, 5))
    with pytest.raises(ValueError, match=rf"^{op}: h: expected \[\.\.\., 2F\], got \[\]$"):
        GATES[op](torch.tensor(1.0))
    with pytest.raises(TypeError, match=rf"^{op}: h: expected a floating dtype of 16 to 64 bits, got torch.int64$"):
        GATES[op](torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            (torch.ones(3, 4, dtype=torch.int32), None),
            TypeError,
            "x: expected a floating dtype of 16 to 64 bits, got torch.int32",
        ),
        ((torch.tensor(1.0), None), ValueError, r"x: expected \[\.\.\., D\], got \[\]"),
        ((torch.ones(3, 4), torch.ones(3)), ValueError, r"weight: expected \[4\], got \[3\]"),
        ((torch.ones(3, 4), torch.ones(1, 4)), ValueError, r"weight: expected \[4\], got \[1, 4\]"),
        (
            (torch.ones(3, 4), torch.ones(4).half()),
            TypeError,
            "weight: expected torch.float32 or torch.float32, got torch.float16",
        ),
        (
            (torch.ones(3, 4).bfloat16(), torch.ones(4).half()),
            TypeError,
            "weight: expected torch.bfloat16 or torch.float32, got torch.float16",
        ),
        (
            (torch.ones(3, 4), torch.ones(4, device="meta")),
            ValueError,
            "weight: expected a tensor on cpu, got meta",
        ),
        ((torch.ones(3, 4), None, -1e-5), ValueError, "eps: expected a number >= 0, got -1e-05"),
        ((torch.ones(3, 4), None, float("nan")), ValueError, "eps: expected a number >= 0, got nan"),
    ],
)
def test_rms_norm_refuses_in_one_sentence(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^rms_norm: {message}$"):
        rms_norm(*arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton does not import")
def test_triton_declines_rows_that_registers_cannot_hold() -> None:
    x = torch.ones(1, TRITON_FEATURES + 1, device=device("triton"))
    reason = rf"holds rows of at most {TRITON_FEATURES} elements, got {TRITON_FEATURES + 1}$"
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        rms_norm(x, None)


# ---- launch configurations


@pytest.mark.parametrize("features", [1, 3, 8, 24, 101, 2560, 5120, 13696])
@pytest.mark.parametrize("rows", [1, 7, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_gate_programs_cover_the_output_once(features: int, rows: int, itemsize: int) -> None:
    from kolors_fast.kernels._gate import configure

    config = configure(features, 2 * features, itemsize, True)
    block = config.units * config.vector
    assert (config.programs(rows * features) - 1) * block < rows * features <= config.programs(rows * features) * block
    assert features % config.vector == 0  # a unit never crosses the end of a row


def test_gate_vectors_need_aligned_rows() -> None:
    from kolors_fast.kernels._gate import configure

    def vector(features: int, row_stride: int, itemsize: int, aligned: bool = True) -> int:
        return configure(features, row_stride, itemsize, aligned).vector

    assert vector(2560, 5120, 2) == 8 and vector(2560, 5120, 4) == 4
    assert vector(2560, 5124, 2) == 1 and vector(2560, 5124, 4) == 4
    assert vector(2564, 5128, 2) == 1 and vector(2560, 5120, 2, aligned=False) == 1


@pytest.mark.parametrize("features", [1, 3, 15, 64, 101, 640, 1280, 1536, 4096, 6145, 8192])
@pytest.mark.parametrize("rows", [1, 7, 300, 196608])
def test_rms_norm_tiles_cover_every_row_once(features: int, rows: int) -> None:
    from kolors_fast.kernels.rms_norm import BACKWARD_TILE, FORWARD_TILE, MOST_ROWS, configure

    for itemsize in (2, 4):
        for tile, most in ((FORWARD_TILE, None), (BACKWARD_TILE, 528)):
            config = configure(rows, features, features, itemsize, True, tile, most)
            share = config.tiles * config.block_rows
            assert (config.programs - 1) * share < rows <= config.programs * share
            assert config.programs <= (most or rows) and config.block_rows <= MOST_ROWS
            lanes = config.head + config.tail
            assert features <= lanes and config.head <= features
            assert lanes - features <= lanes // 4
            if most is not None and config.tiles > 1:
                assert config.programs > most // 2  # the split leaves no half of the GPU idle
            # registers: 32 elements of each tensor per thread in the forward pass, 16 in the backward pass
            per_thread = config.block_rows * lanes / (32 * config.num_warps)
            assert per_thread <= (32 if most is None else 16)


def test_common_widths_leave_no_lane_idle() -> None:
    from kolors_fast.kernels.rms_norm import FORWARD_TILE, configure

    for features in (64, 640, 768, 1280, 1536, 2048, 3072, 4096, 5120):
        config = configure(256, features, features, 2, True, FORWARD_TILE, None)
        assert config.head + config.tail == features and config.vector == 8


if __name__ == "__main__":
    check_against_float64()
