"""What only the C++ CPU column promises: the same bits for any number of threads, and every instruction set right."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

_cpu = pytest.importorskip("kolors_fast._cpu", reason="the C++ extension is not built")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# n, c, c_skip, hw, groups: shared out by sample, by block, straddling the seam, without whole vectors
SHAPES = [(4, 32, 0, 300, 8), (1, 320, 160, 290, 32), (3, 10, 5, 77, 3), (1, 6, 0, 20000, 2), (5, 7, 14, 1, 3)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def random_inputs(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    n, c, c_skip, hw, _ = shape
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) + 0.5).to(dtype)

    def image(channels: int) -> Tensor:
        return tensor(n, hw, channels) if channels_last else tensor(n, channels, hw)

    total = c + c_skip
    return {
        "grad_y": image(total),
        "x": image(c),
        "skip": image(c_skip) if c_skip else None,
        "weight": tensor(total),
        "bias": tensor(total),
        "channel_add": tensor(n, total),
    }


def run_cpu(t: dict[str, Tensor | None], shape: tuple[int, ...], channels_last: bool) -> dict[str, Tensor]:
    """Forward and backward through the extension; every output starts as NaN."""
    n, c, c_skip, hw, groups = shape
    grad_y, x = t["grad_y"], t["x"]
    assert grad_y is not None and x is not None
    dtype, total = DTYPES[x.dtype], c + c_skip
    nan = float("nan")
    out = {
        "y": torch.full_like(grad_y, nan),
        "mean": torch.full((n, groups), nan),
        "rstd": torch.full((n, groups), nan),
        "grad_x": torch.full_like(x, nan),
        "grad_weight": torch.full((total,), nan),
        "grad_bias": torch.full((total,), nan),
        "grad_channel_add": torch.full((n, total), nan),
    }
    if t["skip"] is not None:
        out["grad_skip"] = torch.full_like(t["skip"], nan)
    inputs = [address(t[name]) for name in ("x", "skip", "weight", "bias", "channel_add")]
    moments = [address(out["mean"]), address(out["rstd"])]
    sizes = (n, c, c_skip, hw, groups)
    _cpu.group_norm_silu_forward(
        *inputs, address(out["y"]), *moments, 0, *sizes, 1e-5, True, channels_last, dtype, dtype, 0
    )
    gradients = ("grad_x", "grad_skip", "grad_weight", "grad_bias", "grad_channel_add")
    results = [address(out.get(name)) for name in gradients]
    _cpu.group_norm_silu_backward(
        address(grad_y), *inputs, *moments, *results, 0, *sizes, True, channels_last, dtype, dtype, 0
    )
    return out


def expected(t: dict[str, Tensor | None], shape: tuple[int, ...], channels_last: bool) -> dict[str, Tensor]:
    """The same through PyTorch in float64."""
    leaves = {name: v.double().requires_grad_() for name, v in t.items() if v is not None and name != "grad_y"}
    images = [leaves[name] for name in ("x", "skip") if name in leaves]
    h = torch.cat([image.transpose(1, 2) if channels_last else image for image in images], dim=1)
    h = h + leaves["channel_add"][:, :, None]
    y = F.silu(F.group_norm(h, shape[4], leaves["weight"], leaves["bias"], 1e-5))
    y = y.transpose(1, 2) if channels_last else y
    assert t["grad_y"] is not None
    y.backward(t["grad_y"].double())
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **gradients}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], channels_last: bool, threads: None) -> None:
    inputs = random_inputs(shape, channels_last, torch.float32)
    torch.set_num_threads(1)
    serial = run_cpu(inputs, shape, channels_last)
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, value in run_cpu(inputs, shape, channels_last).items():
            assert torch.equal(value, serial[name]), (name, count)


def check_against_float64() -> None:
    """Both layouts, all dtypes, all shapes; run in a process of its own for each instruction set."""
    # half a unit in the last place of the output dtype, or what the sums of the longest reduction may lose
    for dtype, rounding in ((torch.float32, 2e-6), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        for shape in SHAPES:
            for channels_last in (False, True):
                inputs = random_inputs(shape, channels_last, dtype)
                ours = run_cpu(inputs, shape, channels_last)
                for name, truth in expected(inputs, shape, channels_last).items():
                    stored_in_fp32 = name in ("grad_weight", "grad_bias", "grad_channel_add")
                    bound = (1e-5 if stored_in_fp32 else 1.01 * rounding) * truth.abs().max()
                    error = (ours[name].double() - truth).abs().max()
                    assert error <= bound, (name, dtype, shape, channels_last, float(error), float(bound))


def check_silu_pointwise() -> None:
    """Weights of zero make y silu(bias) and the bias's gradient a sum of silu'(bias)."""
    inner = torch.linspace(-100, 100, 1001, dtype=torch.float64)
    outer = torch.tensor([-3e38, -1e30, -1e4, -300.0, -88.0, -87.0, 87.0, 88.0, 300.0, 1e4, 1e30], dtype=torch.float64)
    points = torch.cat([inner, outer])
    # half a unit in the last place and what sigmoid says of itself
    for dtype, error in (
        (torch.float32, 5 * 2.0**-23),
        (torch.float16, 2.0**-11),
        (torch.bfloat16, 2.0**-8 + 2.0**-12),
    ):
        bias = points.to(dtype)
        shape = (1, len(bias), 0, 6, 1)
        for channels_last in (False, True):
            inputs = random_inputs(shape, channels_last, dtype)
            inputs |= {"weight": torch.zeros_like(bias), "bias": bias, "grad_y": torch.ones_like(inputs["grad_y"])}
            ours = run_cpu(inputs, shape, channels_last)
            b = bias.double().clamp(min=-1e4).requires_grad_()  # beyond, silu is 0 and float64 is Inf * 0
            truth = F.silu(b)
            (slope,) = torch.autograd.grad(truth.sum(), b)
            y = ours["y"].double().view(6, -1) if channels_last else ours["y"].double().view(-1, 6).T
            finite = bias.isfinite()
            close = (y - truth).abs() <= error * truth.abs() + 1e-34 + torch.finfo(dtype).smallest_normal
            assert close[:, finite].all(), (dtype, channels_last, bias[finite][~close[:, finite].all(0)])
            # 1 - sigmoid(x), as inexact as sigmoid(x), is multiplied by x
            close = (ours["grad_bias"].double() / 6 - slope).abs() <= 2.0**-22 * (1 + b.abs().clamp(max=100))
            assert close[finite].all(), (dtype, channels_last, bias[finite][~close[finite]])


def test_every_instruction_set_agrees_with_float64(on_every_instruction_set: Callable[[str], None]) -> None:
    on_every_instruction_set(__file__)


if __name__ == "__main__":
    check_against_float64()
    check_silu_pointwise()
