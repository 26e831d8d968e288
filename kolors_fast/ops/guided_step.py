"""Guidance and one scheduler step in one pass."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _layout, _library
from ._arguments import refused_by_kind
from ._operator import Operator
from ._spec import Case, Inputs, OpSpec


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    sample: Tensor  # [B, ...]
    predictions: Tensor  # [P*B, ...]
    weights: Tensor  # [P]
    coefficients: Tensor  # [6] or [steps, 6]
    row: Tensor | None  # [1]
    previous: Tensor | None
    noise: Tensor | None
    return_denoised: bool


@overload
def guided_step(
    sample: Tensor,
    predictions: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    row: Tensor | None = None,
    return_denoised: Literal[False] = False,
) -> Tensor: ...


@overload
def guided_step(
    sample: Tensor,
    predictions: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    row: Tensor | None = None,
    return_denoised: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def guided_step(
    sample: Tensor,
    predictions: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    row: Tensor | None = None,
    return_denoised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """guided = sum_p weights[p] * predictions_p, then one affine step of any sampler.

        next     = c0 * sample + c1 * guided + c2 * previous + c3 * noise
        denoised = c4 * sample + c5 * guided

    Classifier-free guidance is weights (1-g, g) over (negative, positive); a perturbed third prediction makes PAG.
    All arithmetic in fp32, one rounding at the store. No gradient.

    Args:
        sample: [B, ...], float32, float16, bfloat16 (float64: reference only).
        predictions: [P*B, ...], the model's output, P predictions stacked on the batch axis.
        weights: float32 [P], P from 1 to 3 (float64 may go with a float64 sample, for coefficients too).
        coefficients: float32 [6], or [steps, 6] with `row`.
        previous: like sample: what a multistep sampler kept, normally the last step's `denoised`.
        noise: like sample.
        row: int64 [1] on the same device: the row of `coefficients`, read by the kernel and, on a GPU, never by the
            host: there it is not checked.
        return_denoised: also return `denoised`.

    Returns:
        next, or (next, denoised): like sample.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Karras et al., arXiv 2206.00364 (samplers as one affine family); Ho & Salimans, arXiv 2207.12598
    (guidance); Lu et al., arXiv 2211.01095 (multistep).
    """
    call = _prepare(
        sample, predictions, weights, coefficients,
        previous=previous, noise=noise, row=row, return_denoised=return_denoised,
    )  # fmt: skip
    after, denoised = _operator(call)
    return after if denoised is None or not return_denoised else (after, denoised)


@refused_by_kind("guided_step")
def _prepare(
    sample: Tensor,
    predictions: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    row: Tensor | None = None,
    return_denoised: bool = False,
) -> Call:
    """Check the public arguments."""
    if sample.dim() < 1:
        raise ValueError(f"guided_step: sample: expected [B, ...], got {list(sample.shape)}")
    if sample.dtype not in _library.FLOATING:
        raise TypeError(f"guided_step: sample: expected a floating dtype of 16 to 64 bits, got {sample.dtype}")
    if weights.dim() != 1 or not 1 <= weights.shape[0] <= 3:
        raise ValueError(f"guided_step: weights: expected [P] with P from 1 to 3, got {list(weights.shape)}")
    stacked = (weights.shape[0] * sample.shape[0], *sample.shape[1:])
    if predictions.shape != stacked:
        raise ValueError(f"guided_step: predictions: expected {list(stacked)}, got {list(predictions.shape)}")
    expected = (6,) if row is None else (coefficients.shape[0], 6)
    if coefficients.shape != expected:
        shape = "[6]" if row is None else "[steps, 6]"
        raise ValueError(f"guided_step: coefficients: expected {shape}, got {list(coefficients.shape)}")
    if row is not None and row.numel() != 1:
        raise ValueError(f"guided_step: row: expected one element, got {list(row.shape)}")
    for name, value in (("previous", previous), ("noise", noise)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(f"guided_step: {name}: expected {list(sample.shape)}, got {list(value.shape)}")
    dtype, device = sample.dtype, sample.device
    control = torch.float64 if dtype == weights.dtype == torch.float64 else torch.float32
    for name, tensor, wanted in (
        ("predictions", predictions, dtype), ("weights", weights, control), ("coefficients", coefficients, control),
        ("row", row, torch.int64), ("previous", previous, dtype), ("noise", noise, dtype),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.dtype != wanted:
            raise TypeError(f"guided_step: {name}: expected {wanted}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"guided_step: {name}: expected a tensor on {device}, got {tensor.device}")
    _library.refuse_grad(
        "guided_step", sample=sample, predictions=predictions, weights=weights, coefficients=coefficients,
        previous=previous, noise=noise,
    )  # fmt: skip
    return Call(sample, predictions, weights, coefficients, row, previous, noise, return_denoised)


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    after, denoised = _reference_step(_prepare(*args, **options))
    return after if denoised is None else (after, denoised)


def _check_row(call: Call) -> None:
    """On a CPU, where looking costs no wait; a kernel on a GPU reads what it is told to."""
    row = call.row
    if row is not None and row.is_cpu and not 0 <= int(row) < call.coefficients.shape[0]:
        raise ValueError(f"guided_step: row: expected one of {call.coefficients.shape[0]} rows, from 0, got {int(row)}")


def _reference_step(call: Call) -> tuple[Tensor, Tensor | None]:
    _check_row(call)
    wide = torch.promote_types(call.sample.dtype, torch.float32)
    c = call.coefficients if call.row is None else call.coefficients.index_select(0, call.row.reshape(1))[0]
    c, x = c.to(wide), call.sample.to(wide)
    guided = torch.zeros_like(x)
    for weight, prediction in zip(call.weights.to(wide), call.predictions.chunk(len(call.weights)), strict=True):
        guided = guided + weight * prediction.to(wide)
    after = c[0] * x + c[1] * guided
    if call.previous is not None:
        after = after + c[2] * call.previous.to(wide)
    if call.noise is not None:
        after = after + c[3] * call.noise.to(wide)
    denoised = (c[4] * x + c[5] * guided).to(call.sample.dtype) if call.return_denoised else None
    return after.to(call.sample.dtype), denoised


def _eager(
    sample: Tensor,
    predictions: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    row: Tensor | None = None,
    return_denoised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Guidance and step as a pipeline writes them, in the input dtype."""
    c = (coefficients if row is None else coefficients[row[0]]).to(sample.dtype)
    guided = sum(w * p for w, p in zip(weights.to(sample.dtype), predictions.chunk(len(weights)), strict=True))
    after = c[0] * sample + c[1] * guided
    after = after if previous is None else after + c[2] * previous
    after = after if noise is None else after + c[3] * noise
    return (after, c[4] * sample + c[5] * guided) if return_denoised else after


# ---- extension columns (C++ and CUDA C++ export the same function)


def _extension_step(name: str, call: Call) -> tuple[Tensor, Tensor | None]:
    module: Any = _backends.extension(name)
    _check_row(call)
    sample, predictions, weights, coefficients, row, previous, noise, return_denoised = call
    after = torch.empty_like(sample)
    denoised = torch.empty_like(sample) if return_denoised else None
    p = _library.pointer
    with guard(sample):
        module.guided_step(
            p(sample), p(predictions), p(weights), p(coefficients), p(row), p(previous), p(noise), p(after),
            p(denoised), sample.numel(), weights.shape[0], _library.DTYPE_CODE[sample.dtype], _library.stream(sample),
        )  # fmt: skip
    return after, denoised


# ---- Triton column


def _triton_step(call: Call) -> tuple[Tensor, Tensor | None]:
    from kolors_fast.kernels import guided_step as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor | None] = kernel.step(*call)
    return outputs


COLUMNS = {
    "reference": _backends.Column(_reference_step),
    "cpu": _backends.Column(partial(_extension_step, "cpu")),
    "triton": _backends.Column(_triton_step),
    "cuda": _backends.Column(partial(_extension_step, "cuda")),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on dense tensors in the sample's layout: the kernels see flat arrays."""
    last = _layout.is_channels_last(call.sample)
    return Call(
        _layout.as_layout(call.sample, last),
        _layout.as_layout(call.predictions, last),
        call.weights.contiguous(),
        call.coefficients.contiguous(),
        call.row,
        None if call.previous is None else _layout.as_layout(call.previous, last),
        None if call.noise is None else _layout.as_layout(call.noise, last),
        call.return_denoised,
    )


def _fake(call: Call) -> tuple[Tensor, Tensor | None]:
    last = _layout.is_channels_last(call.sample)
    after = _layout.empty(call.sample.shape, last, call.sample)
    return after, torch.empty_like(after) if call.return_denoised else None


_operator = Operator("guided_step", Call, COLUMNS, dense=_dense, fake=_fake, outputs=2)


# ---- what tests, benchmarks and explain() are made from


def _inputs(
    generator: torch.Generator,
    shape: tuple[int, ...],
    predictions: int,
    *,
    previous: bool = False,
    noise: bool = False,
    row: int | None = None,
    denoised: bool = False,
    channels_last: bool = False,
    scale: float = 1.0,
) -> Inputs:
    def normal(*size: int) -> Tensor:
        h = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return _layout.as_layout(h, channels_last)

    steps = () if row is None else (5,)
    weights = {1: [1.0], 2: [-4.0, 5.0], 3: [-4.0, 8.0, -3.0]}[predictions]
    return {
        "sample": normal(*shape),
        "predictions": normal(predictions * shape[0], *shape[1:]),
        "weights": torch.tensor(weights, dtype=torch.float32),
        "coefficients": torch.randn((*steps, 6), generator=generator, dtype=torch.float32),
        "previous": normal(*shape) if previous else None,
        "noise": normal(*shape) if noise else None,
        "row": None if row is None else torch.tensor([row]),
        "return_denoised": denoised,
    }


def _offset_view(generator: torch.Generator) -> Inputs:
    inputs = _inputs(generator, (2, 4, 5, 6), 2, previous=True)
    storage = torch.zeros(inputs["sample"].numel() + 1, dtype=torch.float64)
    view = storage[1:].view(inputs["sample"].shape)
    view.copy_(inputs["sample"])
    return {**inputs, "sample": view}


def _strided(generator: torch.Generator) -> Inputs:
    inputs = _inputs(generator, (2, 4, 6, 5), 2)
    return {**inputs, "sample": torch.cat([inputs["sample"]] * 2, dim=3)[..., ::2]}


def _holds_nan(generator: torch.Generator) -> Inputs:
    inputs = _inputs(generator, (1, 4, 4, 4), 2)
    inputs["predictions"][1, 2, 3, 0] = float("nan")
    return inputs


def _case(name: str, *args: Any, model: bool = False, **options: Any) -> Case:
    return Case(name, lambda generator: _inputs(generator, *args, **options), model=model)


CASES = (
    _case("plain", (2, 4, 8, 8), 1),
    _case("guided", (2, 4, 8, 8), 2),
    _case("perturbed", (2, 4, 8, 8), 3, denoised=True),
    _case("multistep", (2, 4, 8, 8), 2, previous=True, denoised=True),
    _case("noisy", (1, 4, 8, 8), 2, noise=True),
    _case("all_from_row", (2, 4, 7, 5), 2, previous=True, noise=True, row=3, denoised=True),
    _case("last_row", (1, 4, 3, 3), 1, row=4),
    _case("channels_last", (2, 4, 8, 6), 2, noise=True, channels_last=True, denoised=True),
    _case("one_element", (1,), 2, previous=True),
    _case("prime", (1, 7919), 2, noise=True),
    _case("batch_0", (0, 4, 8, 8), 2),
    _case("huge", (1, 4, 8, 8), 2, scale=1e3),
    _case("tiny", (1, 4, 8, 8), 2, scale=1e-3),
    Case("offset_view", _offset_view),
    Case("strided", _strided),
    Case("holds_nan", _holds_nan),
    _case("kolors_1024", (1, 4, 128, 128), 2, model=True),
    _case("kolors_1024_multistep", (1, 4, 128, 128), 2, previous=True, denoised=True, model=True),
    _case("kolors_1024_batch_8", (8, 4, 128, 128), 2, model=True),
)


def _bytes_moved(inputs: Inputs) -> int:
    """Each tensor read or written once."""
    optional = sum(inputs.get(name) is not None for name in ("previous", "noise"))
    tensors = 2 + len(inputs["weights"]) + optional + bool(inputs.get("return_denoised"))
    sample: Tensor = inputs["sample"]
    return tensors * sample.numel() * sample.element_size()


def _flops(inputs: Inputs) -> int:
    optional = sum(inputs.get(name) is not None for name in ("previous", "noise"))
    terms = 2 + len(inputs["weights"]) + optional + 2 * bool(inputs.get("return_denoised"))
    return 2 * terms * int(inputs["sample"].numel())


SPEC = OpSpec(
    name="guided_step",
    function=guided_step,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
)
