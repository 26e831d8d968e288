"""What geglu and swiglu share: y = value * act(gate) over the halves of the last axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _library, _rows
from ._arguments import refused_by_kind
from ._operator import Operator
from ._spec import Case, Inputs, OpSpec

Grads = tuple[Tensor]  # of y
Activation = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> act(x), its derivative


class Call(NamedTuple):
    """A checked call: what the registered op takes, and what every launcher reads."""

    h: Tensor  # [..., 2F]


def prepare(op: str, h: Tensor) -> Call:
    """Check the public argument."""
    if h.dtype not in _library.FLOATING:
        raise TypeError(f"{op}: h: expected a floating dtype of 16 to 64 bits, got {h.dtype}")
    if h.dim() < 1 or h.shape[-1] % 2:
        raise ValueError(f"{op}: h: expected [..., 2F], got {list(h.shape)}")
    return Call(h)


class Gate:
    """The columns of one gate, and its registered op.

    Args:
        op: its name, also that of its kernels.
        activation: plain PyTorch, in the dtype it is given.
        gate_first: whether the gate is the first half.
    """

    def __init__(self, op: str, activation: Activation, *, gate_first: bool) -> None:
        self.op, self.activation, self.gate_first = op, activation, gate_first
        self.prepare = refused_by_kind(op)(partial(prepare, op))
        self.columns = {
            "reference": _backends.Column(self._reference_forward, self._reference_backward),
            "cpu": _backends.Column(self._cpu_forward, self._cpu_backward),
            "triton": _backends.Column(self._triton_forward, self._triton_backward),
        }
        self.operator = Operator(op, Call, self.columns, dense=dense, fake=fake)

    def reference(self, h: Tensor) -> Tensor:
        """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
        return self._reference_forward(self.prepare(h))[0]

    def _halves(self, call: Call) -> tuple[Tensor, Tensor]:
        """value, gate [..., F] in fp32 or float64."""
        first, second = call.h.to(torch.promote_types(call.h.dtype, torch.float32)).chunk(2, dim=-1)
        return (second, first) if self.gate_first else (first, second)

    def _reference_forward(self, call: Call) -> tuple[Tensor]:
        value, gate = self._halves(call)
        return ((value * self.activation(gate)[0]).to(call.h.dtype),)

    def _reference_backward(self, call: Call, grads: Grads, saved: tuple[()], needs: list[bool]) -> tuple[Tensor]:
        value, gate = self._halves(call)
        g = grads[0].to(value.dtype)
        activated, slope = self.activation(gate)
        halves = (g * activated, g * value * slope)
        return (torch.cat(halves[::-1] if self.gate_first else halves, dim=-1).to(call.h.dtype),)

    def _cpu_forward(self, call: Call) -> tuple[Tensor]:
        h, (y,) = call.h, fake(call)
        run = getattr(_backends.extension("cpu"), f"{self.op}_forward")
        run(h.data_ptr(), y.data_ptr(), *geometry(h), _library.DTYPE_CODE[h.dtype], 0)
        return (y,)

    def _cpu_backward(self, call: Call, grads: Grads, saved: tuple[()], needs: list[bool]) -> tuple[Tensor]:
        h, grad_y = call.h, grads[0].contiguous()
        grad_h = h.new_empty(*h.shape)
        run = getattr(_backends.extension("cpu"), f"{self.op}_backward")
        run(h.data_ptr(), grad_y.data_ptr(), grad_h.data_ptr(), *geometry(h), _library.DTYPE_CODE[h.dtype], 0)
        return (grad_h,)

    def _triton_forward(self, call: Call) -> tuple[Tensor]:
        kernel = import_module(f"kolors_fast.kernels.{self.op}")  # triton is imported at first use
        return (kernel.forward(call.h, _rows.row_stride(call.h)),)

    def _triton_backward(self, call: Call, grads: Grads, saved: tuple[()], needs: list[bool]) -> tuple[Tensor]:
        kernel = import_module(f"kolors_fast.kernels.{self.op}")
        return (kernel.backward(grads[0].contiguous(), call.h, _rows.row_stride(call.h)),)

    def spec(self, function: Callable[..., Any], eager: Callable[..., Any], cases: tuple[Case, ...]) -> OpSpec:
        return OpSpec(
            name=self.op,
            function=function,
            reference=self.reference,
            eager=eager,
            prepare=self.prepare,
            columns=self.columns,
            cases=cases,
            bytes_moved=_bytes_moved,
            flops=_flops,
            gradients=("h",),
        )


def dense(call: Call) -> Call:
    """The same call on rows with one stride."""
    return Call(_rows.as_rows(call.h))


def fake(call: Call) -> tuple[Tensor]:
    return (call.h.new_empty(*call.h.shape[:-1], call.h.shape[-1] // 2),)


def geometry(h: Tensor) -> tuple[int, int, int | None]:
    """Rows, F and the stride of rows."""
    return math.prod(h.shape[:-1]), h.shape[-1] // 2, _rows.row_stride(h)


# ---- what tests and benchmarks are made from


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _halves(generator: torch.Generator, gate_first: bool, value: Tensor, gate: Tensor) -> Inputs:
    return {"h": torch.cat([gate, value] if gate_first else [value, gate], dim=-1)}


def cases(gate_first: bool, models: Mapping[str, tuple[int, ...]]) -> tuple[Case, ...]:
    """Small inputs that break kernels, and the models' shapes of h."""

    def plain(name: str, *shape: int, scale: float = 1.0, model: bool = False) -> Case:
        return Case(name, lambda g: {"h": _normal(g, *shape) * scale}, model)

    def gates(name: str, change: Callable[[Tensor], Tensor], scale: float = 1.0) -> Case:
        """A gate of its own range; value is scaled so that no product overflows fp16."""

        def make(g: torch.Generator) -> Inputs:
            return _halves(g, gate_first, _normal(g, 4, 96) * scale, change(_normal(g, 4, 96)))

        return Case(name, make)

    def holds(value: float) -> Case:
        def make(g: torch.Generator) -> Inputs:
            h = _normal(g, 3, 24)
            h[0, 3] = h[1, 15] = h[2, 7] = h[2, 19] = value
            return {"h": h}

        return Case(f"holds_{value}", make)

    def offset_view(g: torch.Generator) -> Inputs:
        return {"h": _normal(g, 1 + 3 * 48)[1:].view(3, 48)}

    def chunk(g: torch.Generator) -> Inputs:
        return {"h": _normal(g, 2, 3, 96).chunk(3, dim=-1)[1]}

    return (
        plain("plain", 2, 5, 64),
        plain("odd", 3, 7, 2 * 15),
        plain("prime", 5, 2 * 101),
        plain("one_feature", 7, 2),
        plain("one_row", 1, 2 * 1031),
        plain("rank_1", 2 * 24),
        plain("batch_0", 0, 4, 16),
        plain("several_blocks", 3, 2 * 720),
        plain("tiny", 4, 64, scale=1e-3),
        gates("huge_gates", lambda z: z.sign() * (1e4 + 100 * z), scale=0.5),
        gates("huge_values", lambda z: z * 0.3, scale=1e4),
        gates("left_tail", lambda z: -6 + 3 * torch.tanh(z)),
        Case("offset_view", offset_view),
        Case("chunk", chunk),
        Case("transposed", lambda g: {"h": _normal(g, 20, 6).t()}),
        Case("strided", lambda g: {"h": _normal(g, 4, 64)[:, ::2]}),
        holds(float("nan")),
        holds(float("inf")),
        holds(float("-inf")),
        *(plain(name, *shape, model=True) for name, shape in models.items()),
    )


def _bytes_moved(inputs: Inputs) -> int:
    """h read once, y written once."""
    h: Tensor = inputs["h"]
    return h.numel() * h.element_size() * 3 // 2


def _flops(inputs: Inputs) -> int:
    """About 30 for each activation and one for the product."""
    return 31 * int(inputs["h"].numel()) // 2
