"""What an op says about itself, once: tests, benchmarks, `explain` and the docs table are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._backends import Column

Inputs = dict[str, Any]  # keyword arguments of the public function


@dataclass(frozen=True)
class Case:
    """A named set of inputs. `make(generator)` builds them in float64 on the CPU; the user casts and moves."""

    name: str
    make: Callable[[torch.Generator], Inputs]
    model: bool = False  # a real shape of a model: for benchmarks and GPUs, too big for the interpreter


@dataclass(frozen=True)
class Tolerance:
    """Error against float64, as a multiple of what eager PyTorch errs in the same dtype.

    rms and max are multiples of eager's root-mean-square and largest error. The floors, in units of the dtype's epsilon
    times the root-mean-square of the truth, cover the cases where eager happens to be exact or lucky:
    half an epsilon is the one rounding at the store. A gradient summed over R rows adds terms that carry about five
    roundings each (x_hat, u, sigmoid, its derivative, the product), sqrt(5) * eps/sqrt(12) = 0.65 eps per term; the
    errors and the terms both grow by sqrt(R) in the sum, so the relative error stays, and the fp32 partial sums of a
    split reduction add log2(R) roundings of growing partial results, at most sqrt(log2 R) * 0.29 eps, 1.3 eps for a
    million rows. Together sqrt(0.65^2 + 1.3^2) = 1.5.
    """

    rms: float = 1.5
    max: float = 3.0
    floor: float = 0.5
    gradient_floor: float = 1.5

    def violation(self, ours: Tensor, eager: Tensor, truth: Tensor, *, gradient: bool = False) -> str | None:
        """How `ours` breaks the contract, or None. truth: float64; eager: of eager PyTorch in the dtype of ours.

        What is not finite in the truth must not be finite in ours, and the other way round.
        """
        if ours.shape != truth.shape:
            return f"shape {list(ours.shape)}, expected {list(truth.shape)}"
        if not ours.is_floating_point():
            return None if torch.equal(ours, truth.to(ours.dtype)) else "not equal"
        finite, truth = truth.isfinite(), truth.double()  # a truth of a dtype that the caller asked for
        if not torch.equal(ours.isfinite(), finite):
            return "not finite in other places than the truth"
        if not finite.any():
            return None
        error, eager_error = ours.double() - truth, (eager.double() - truth)[finite].nan_to_num(0, 0, 0)
        error, truth = error[finite], truth[finite]
        floor = torch.finfo(ours.dtype).eps * (self.gradient_floor if gradient else self.floor)
        rms_bound = self.rms * _rms(eager_error) + floor * _rms(truth)
        if not _rms(error) <= rms_bound:
            return f"rms error {_rms(error):.3g}, allowed {rms_bound:.3g}"
        max_bound = self.max * _largest(eager_error) + 2 * floor * _largest(truth)
        if not _largest(error) <= max_bound:
            return f"largest error {_largest(error):.3g}, allowed {max_bound:.3g}"
        return None


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


@dataclass(frozen=True)
class OpSpec:
    """One row of the library.

    Attributes:
        function: the public function.
        reference: plain PyTorch, fp32 inside (float64 for float64): the definition.
        eager: what a PyTorch user writes today, in the input dtype: the rival in errors and in time.
        prepare: public arguments -> the op's `Call`, checked: what the registered op and the launchers take.
        columns: the launchers of each backend, in no order (design: `_backends._ORDER`).
        gradients: names of the arguments that a gradient is defined for; of a tuple, all its tensors.
        mutated: names of the arguments (tensors, or lists of them) that are written in place.
        bytes_moved, flops: of one forward call with these inputs, each tensor counted once.
        determinism: what is bitwise repeatable.
        details: a call -> further choices that `explain` shows, each with its verdict.
        traced_as: the registered op that tracing meets, where that is not the op's own.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    columns: Mapping[str, Column]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Inputs], int]
    flops: Callable[[Inputs], int]
    gradients: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    determinism: str = "bitwise on every backend"
    details: Callable[[Any], dict[str, str]] | None = None
    traced_as: str = ""


def tensors(value: Any) -> list[Tensor]:
    """Those in an argument: the tensor itself, or the tensors of a list or tuple."""
    if isinstance(value, (list, tuple)):
        return [value for value in value if isinstance(value, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The argument with each of its tensors changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of a case in `dtype` on `device`, strides and offsets kept (`Tensor.to` would make them dense);
    control tensors (spec: float32, int64) keep their dtype."""

    def one(value: Tensor) -> Tensor:
        kind = dtype if value.dtype == torch.float64 else value.dtype
        if 0 in value.stride():
            return value.to(device, kind)  # expanded: several elements share one place
        storage = torch.zeros(value.untyped_storage().nbytes() // value.itemsize, dtype=kind, device=device)
        return storage.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)

    return {name: map_tensors(value, one) for name, value in inputs.items()}
