"""All parameter gradients of a model unscaled in place, with their norm and which of them overflowed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _library
from . import _gradient_scaling as scaling
from ._arguments import refused_by_kind
from ._operator import Operator
from ._spec import Case, Inputs, OpSpec

NAME = "unscale_grads_"


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    scales: Tensor  # [n], any stride
    grads: Sequence[Tensor]  # n dense tensors, written in place


def unscale_grads_(grads: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, Tensor]:
    """grads[i] /= scales[i] in place; norm = sqrt(sum of squares of all); nonfinite[i] = any NaN or Inf in grads[i].

    Each quotient is taken in fp32 and rounded once to its gradient's dtype. norm is that of the quotients; nonfinite
    looks at what is stored. Nothing waits for the device: a trainer skips an update, clips by norm and lowers the scale
    of a block without leaving it.

    Squares are summed in fp32 over at most 16,384 elements, with at most 33 additions in a row, and in fp64 above that:
    norm errs by less than 20 * 2^-24 relatively. It is Inf where the squares of that many elements sum to more than
    3.4e38 (gradients of 1e17 or more), and loses digits where gradients are below 1e-19. The order of additions follows
    from the sizes alone: two runs give the same bits.

    Args:
        grads: dense tensors of any shape and memory format, each once; float32, float16 and bfloat16 may be mixed, all
            on one device (float64, with float64 scales: reference only). Empty tensors and an empty list are fine.
        scales: float32 [len(grads)] of any stride, on the same device; read by the kernels, never by the host. One
            scale for all is `scale.expand(len(grads))`.

    Returns:
        norm, float32 []: not finite where a gradient is not; and nonfinite, bool [len(grads)].

    Raises:
        ValueError, TypeError: a shape, dtype, device or memory format that does not fit, named with expected and got.

    Source: Ramesh et al., arXiv 2102.12092, section 2.4 and appendix D (one scale per resblock, lowered when a gradient
    of that block is not finite).
    """
    norm, nonfinite = _operator(_prepare(grads, scales))
    return norm, nonfinite


@refused_by_kind(NAME)
def _prepare(grads: Sequence[Tensor], scales: Tensor) -> Call:
    """Check the public arguments."""
    if scales.dtype != torch.float32 and scales.dtype != torch.float64:
        raise TypeError(f"{NAME}: scales: expected torch.float32, got {scales.dtype}")
    if scales.shape != (len(grads),):
        raise ValueError(f"{NAME}: scales: expected [{len(grads)}], one for each gradient, got {list(scales.shape)}")
    dtypes = tuple(_library.DTYPE_CODE) if scales.dtype == torch.float32 else (torch.float64,)
    device, plain = scales.device, not _library.tracing(scales)
    for i, grad in enumerate(grads):
        if grad.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise TypeError(f"{NAME}: grads[{i}]: expected {expected} with {scales.dtype} scales, got {grad.dtype}")
        if grad.device != device:
            raise ValueError(f"{NAME}: grads[{i}]: expected a tensor on {device} as scales, got {grad.device}")
        if not (grad.is_contiguous() or _is_dense(grad)):
            got = f"{list(grad.shape)} with strides {list(grad.stride())}"
            raise ValueError(f"{NAME}: grads[{i}]: expected elements without gaps or overlap, got {got}")
        if plain and _library.tracing(grad):
            raise TypeError(f"{NAME}: grads[{i}]: expected a plain tensor, got {type(grad).__name__}")
    if _library.wants_grad((scales, *grads)):
        _library.refuse_grad(NAME, scales=scales, **{f"grads[{i}]": grad for i, grad in enumerate(grads)})
    return Call(scales, grads)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements of x fill a piece of memory, in whatever order of axes."""
    size = 1
    for stride, length in sorted((x.stride(i), x.shape[i]) for i in range(x.dim()) if x.shape[i] != 1):
        if stride != size:
            return False
        size *= length
    return True


# ---- reference column


def reference(grads: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: quotients in fp32, float64 for float64; the norm in float64."""
    return _reference_unscale(_prepare(grads, scales))


def _reference_unscale(call: Call) -> tuple[Tensor, Tensor]:
    scales, grads = call
    norms, nonfinite = [scales.new_zeros((), dtype=torch.float64)], []
    for grad, scale in zip(grads, scales.unbind(), strict=True):
        quotient = grad.to(scales.dtype) / scale
        grad.copy_(quotient)
        finite = grad.isfinite()
        norms.append(torch.linalg.vector_norm(torch.where(finite, quotient, torch.nan), dtype=torch.float64))
        nonfinite.append(~finite.all())
    flags = torch.stack(nonfinite) if nonfinite else scales.new_zeros(0, dtype=torch.bool)
    return torch.linalg.vector_norm(torch.stack(norms)).to(scales.dtype), flags


def _eager(grads: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.nn.utils.clip_grad_norm_` takes norms; to look at those alone is faster than at each element."""
    if not grads:
        return scales.new_zeros(()), scales.new_zeros(0, dtype=torch.bool)
    torch._foreach_div_(list(grads), list(scales.unbind()))
    norms = torch.stack(torch._foreach_norm(list(grads)))
    return torch.linalg.vector_norm(norms).to(scales.dtype), ~norms.isfinite()


# ---- extension columns (C++ and CUDA C++ export the same function)


def _extension_unscale(name: str, call: Call) -> tuple[Tensor, Tensor]:
    module: Any = _backends.extension(name)
    scales, grads = call
    table, count = array("q"), len(grads)  # rows of csrc's TensorEntry
    for grad in grads:
        table.extend((grad.data_ptr(), grad.numel(), _library.DTYPE_CODE[grad.dtype]))
    address = table.buffer_info()[0]
    norm, nonfinite = scales.new_empty(()), scales.new_empty(count, dtype=torch.bool)
    work = scales.new_empty(module.unscale_grads_workspace(address, count), dtype=torch.uint8)
    with guard(scales):
        module.unscale_grads(
            address, scales.data_ptr(), norm.data_ptr(), nonfinite.data_ptr(), work.data_ptr(),
            count, scales.stride(0), _library.stream(scales),
        )  # fmt: skip
    return norm, nonfinite


# ---- Triton column


def _triton_unscale(call: Call) -> tuple[Tensor, Tensor]:
    from kolors_fast.kernels import unscale_grads as kernel  # triton is imported at first use

    norm, nonfinite = kernel.unscale(*call)
    return norm, nonfinite


COLUMNS = {
    "reference": _backends.Column(_reference_unscale),
    "cpu": _backends.Column(partial(_extension_unscale, "cpu")),
    "triton": _backends.Column(_triton_unscale),
    "cuda": _backends.Column(partial(_extension_unscale, "cuda")),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    return call  # dense it is, or it had been refused: a copy could not be written in place


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    return call.scales.new_empty(()), call.scales.new_empty(len(call.grads), dtype=torch.bool)


_operator = Operator(NAME, Call, COLUMNS, dense=_dense, fake=_fake, outputs=2, mutated="grads")


# ---- what tests, benchmarks and explain() are made from

_SCALES = (2.0**13, 2.0**12.5, 2.0**13.001, 2.0**7, 2.0**15.9)


def _case(
    name: str,
    *shapes: tuple[int, ...],
    scales: tuple[float, ...] = _SCALES,
    size: float = 1.0,
    special: bool = False,
    mixed: bool = False,
    model: bool = False,
) -> Case:
    """A case; with `mixed` every other gradient is float32 whatever the others are. Scales repeat."""

    def make(generator: torch.Generator) -> Inputs:
        grads = [scaling.normal(generator, *shape, size=size) for shape in shapes]
        if special:
            grads[-1] = scaling.with_special_values(grads[-1])
        if mixed:
            grads = [grad.float() if i % 2 else grad for i, grad in enumerate(grads)]
        return {"grads": grads, "scales": torch.tensor((scales * len(grads))[: len(grads)])}

    return Case(name, make, model=model)


def _offset_view(generator: torch.Generator) -> Inputs:
    grads = [scaling.offset(scaling.normal(generator, 5, 35)), scaling.normal(generator, 3, 24)]
    return {"grads": grads, "scales": torch.tensor([2.0, 2.0**7.5])}


def _one_scale(generator: torch.Generator) -> Inputs:
    grads = [scaling.normal(generator, *shape) for shape in ((7, 5), (12,), ())]
    return {"grads": grads, "scales": torch.tensor(2.0**10.5).expand(3)}


def _every_second_scale(generator: torch.Generator) -> Inputs:
    grads = [scaling.normal(generator, *shape) for shape in ((7, 5), (12,))]
    return {"grads": grads, "scales": torch.tensor([2.0**9, 0.0, 2.0**8.5, 0.0])[::2]}


def _permuted(generator: torch.Generator) -> Inputs:
    grads = [scaling.normal(generator, 2, 3, 5, 4, channels_last=True), scaling.normal(generator, 6, 5).T]
    return {"grads": grads, "scales": torch.tensor(_SCALES[:2])}


def _layers(width: int, layers: int) -> list[tuple[int, ...]]:
    """The parameters of a GPT-like model: four projections, two of the MLP, six gains and biases a layer."""
    return layers * [*4 * [(width, width)], (4 * width, width), (width, 4 * width), *6 * [(width,)]]


CASES = (
    _case("plain", (24, 40), (16,), (8, 8)),
    _case("odd", (7, 29), (3,), (1031,), (1, 1)),
    _case("mixed", (12, 10), (33,), (5, 8), (16,), mixed=True),
    _case("one_element", (1,)),
    _case("rank_0", ()),
    _case("no_tensors"),
    _case("empty_tensors", (0, 4), (9, 4), (0,), (5,), (0,)),
    _case("two_chunks", (2, 8195), (40,)),
    _case("tiny", (24, 20), (5,), scales=(2.0**24,), size=1e-4),
    _case("holds_nan", (24, 20), (40,), special=True),
    _case("holds_overflow", (24, 20), (40,), scales=(2.0, 0.0)),
    Case("offset_view", _offset_view),
    Case("one_scale", _one_scale),
    Case("every_second_scale", _every_second_scale),
    Case("permuted", _permuted),
    # dividing by 1 takes as long, and leaves the next round of a benchmark the same numbers
    _case("gpt_1536x10", *_layers(1536, 10), scales=(1.0,), model=True),
    _case("gpt_192x16", *_layers(192, 16), scales=(1.0,), model=True),
)


def _bytes_moved(inputs: Inputs) -> int:
    return sum(2 * grad.numel() * grad.element_size() for grad in inputs["grads"])


def _flops(inputs: Inputs) -> int:
    return sum(3 * grad.numel() for grad in inputs["grads"])


SPEC = OpSpec(
    name=NAME,
    function=unscale_grads_,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    mutated=("grads",),
)
