"""An op between its public function and its launchers: the two routes, the choice of a backend, and autograd.

Eager calls go to a launcher directly, or through one `autograd.Function`; what is traced goes through the registered
op. Both end in the same methods of `Operator`, and a generated test holds that they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _backends, _library
from ._arguments import kinds_of, misfit

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[Tensor]": "Tensor[]",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "torch.dtype": "ScalarType",
}


class Operator:
    """A registered op whose launchers take a `Call`.

    Args:
        name: of the public function; the op becomes `kolors_fast::<name>`.
        call: a NamedTuple of tensors followed by numbers: what the op takes, in its order. The first tensor names
            device and dtype.
        columns: the launchers. `forward(call)` returns the outputs and then what the backward pass reads besides the
            call; an output that is not wanted is None. `backward(call, grads, saved, needs)` returns one gradient, or
            None, per tensor of the call, with its elements if not its shape; a gradient that did not arrive is None in
            `grads`.
        dense: a call -> the same call on tensors as the kernels read them.
        fake: a call -> what `forward` returns, uninitialised.
        outputs: how many results of `forward` are the op's; `saved` more follow, for the backward pass.
        mutated: the field of the call that `forward` writes in place.
        kept: (call, outputs) -> by field, the tensor that `backward` reads in its place, of the same shape and dtype.
            So an input that `backward` has no use for need not live until then.
        reads_outputs: whether `backward` reads the outputs too; they then come first in what it gets as saved.
    """

    def __init__(
        self,
        name: str,
        call: type[Any],
        columns: Mapping[str, _backends.Column],
        *,
        dense: Callable[[Any], Any],
        fake: Callable[[Any], tuple[Tensor | None, ...]],
        outputs: int = 1,
        saved: int = 0,
        mutated: str | None = None,
        kept: Callable[[Any, tuple[Any, ...]], Mapping[str, Tensor]] | None = None,
        reads_outputs: bool = False,
    ) -> None:
        self.name, self.call, self.columns, self.dense, self.fake = name, call, columns, dense, fake
        self.outputs, self.saved, self.mutated = outputs, saved, mutated
        self.first_kept = 0 if reads_outputs else outputs
        self.kept = kept
        self.kinds = kinds_of(call)
        types = {field: _SCHEMA_TYPES[kind] for field, kind in self.kinds.items()}
        if mutated is not None:
            types[mutated] = types[mutated].replace("Tensor", "Tensor(a!)")
        fields = [f"{kind} {field}" for field, kind in types.items()]
        self.tensors = sum(field.startswith("Tensor") for field in fields)
        results = ", ".join(["Tensor"] * (outputs + saved))
        self.forward_op = _library.define(f"{name}({', '.join(fields)}) -> ({results})", self._forward, self._fake)
        self.differentiable = columns["reference"].backward is not None
        if self.differentiable:
            self._define_backward(fields)

    def _define_backward(self, fields: list[str]) -> None:
        grads = [f"Tensor? grad_{i}" for i in range(self.outputs)]
        kept = [f"Tensor saved_{i}" for i in range(self.outputs + self.saved - self.first_kept)]
        results = ", ".join(["Tensor"] * self.tensors)
        schema = f"{self.name}_backward({', '.join([*fields, *grads, *kept])}, bool[] needs) -> ({results})"
        self.backward_op = _library.define(schema, self._backward_apart, self._backward_fake)
        _library.define_autograd(self.name, self._autograd_backward, self._setup_context)
        operator = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                # with a `setup_context` of its own, apply() would bind the arguments by signature in each call: slow
                results = operator._forward(*args)
                operator._setup_context(ctx, args, results)
                return results[0] if operator.outputs == 1 else results[: operator.outputs]

            backward = staticmethod(once_differentiable(operator._autograd_backward))  # type: ignore[assignment]

        Function.__name__ = Function.__qualname__ = self.name
        self.function = Function

    def __call__(self, call: Any) -> Any:
        """The op's output, or the tuple of its outputs."""
        if _library.tracing(*call[: self.tensors]):
            results = self.forward_op(*call)
        elif self.differentiable and (_library.wants_grad(call[: self.tensors]) or forward_ad._current_level >= 0):
            return self.function.apply(*call)
        else:
            results = self._run(call)
        return results[0] if self.outputs == 1 else results[: self.outputs]

    # ---- forward

    def _run(self, call: Any) -> tuple[Any, ...]:
        try:
            dense = self.dense(call)
            column = self.columns[_backends.choose(self.name, self.columns, dense)]
            if call[0].numel() == 0:
                results = self.fake(dense)
                if results[0] is not None and results[0].numel() == 0:
                    return results  # empty: shapes are all there is
            results = tuple(column.forward(dense))
        except (RuntimeError, TypeError):
            self.refuse_by_kind(call)
            raise
        if self.mutated is not None:
            torch.autograd.graph.increment_version(getattr(call, self.mutated))  # kernels write past autograd
        return results

    def refuse_by_kind(self, call: Any) -> None:
        """Raise a TypeError if a tensor is sparse, nested or of torch.func: what a launcher stumbles over."""
        if reason := misfit(self.kinds, call._asdict()):
            raise TypeError(f"{self.name}: {reason}") from None

    def _forward(self, *args: Any) -> tuple[Tensor, ...]:
        """A schema has no optional results: what is not wanted is empty."""
        return _filled(self._run(self.call(*args)), args[0])

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        return _filled(self.fake(self.dense(self.call(*args))), args[0])

    # ---- backward

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        call, grads, saved, needs = self._split(args)
        call = self.dense(call)
        if all(grad is None or grad.numel() == 0 for grad in grads):
            return tuple(grad.zero_() for grad in self._gradients(call, needs))
        column = self.columns[_backends.choose(self.name, self.columns, call)]
        found = column.backward(call, grads, saved, needs)  # type: ignore[misc]  # every column has one
        return tuple(
            call[0].new_empty(0) if grad is None or like is None or not need else _as(like, grad)
            for grad, like, need in zip(found, call, needs, strict=False)
        )

    def _backward_apart(self, *args: Any) -> tuple[Tensor, ...]:
        """A registered op's results share no memory with each other or its arguments: gradients that do are copied."""
        taken, found = {id(arg) for arg in args}, list(self._backward(*args))
        for i, grad in enumerate(found):
            found[i] = grad.clone() if id(grad) in taken else grad
            taken.add(id(grad))
        return tuple(found)

    def _backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        call, _, _, needs = self._split(args)
        return self._gradients(self.dense(call), needs)

    def _gradients(self, call: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return tuple(
            call[0].new_empty(0) if like is None or not need else torch.empty_like(like)
            for like, need in zip(call, needs, strict=False)
        )

    def _split(self, args: tuple[Any, ...]) -> tuple[Any, tuple[Tensor | None, ...], tuple[Tensor, ...], list[bool]]:
        """The arguments of the backward op: the call, the outputs' gradients, what was saved, which are wanted."""
        size = len(self.call._fields)
        middle = size + self.outputs
        return self.call(*args[:size]), args[size:middle], args[middle:-1], args[-1]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            output = (output,)
        ctx.set_materialize_grads(False)
        tensors = list(inputs[: self.tensors])
        if self.kept is not None:
            for field, kept in self.kept(self.call(*inputs), output).items():
                tensors[self.call._fields.index(field)] = kept
        ctx.save_for_backward(*tensors, *output[self.first_kept :])
        ctx.numbers = inputs[self.tensors :]

    def _autograd_backward(self, ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, kept = arrived[: self.outputs], ctx.saved_tensors  # what is saved is for us alone: no gradient arrives
        needs = list(ctx.needs_input_grad[: self.tensors])
        run = self.backward_op if any(g is not None and _library.tracing(g) for g in grads) else self._backward
        found = run(*kept[: self.tensors], *ctx.numbers, *grads, *kept[self.tensors :], needs)
        wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (*wanted, *[None] * len(ctx.numbers))


def backward_by_rerun(
    function: Callable[[Any], tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A column's `backward` that runs `function`, of plain PyTorch and differentiable ops, again under autograd."""

    def backward(
        call: Any, grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        fields: list[Any] = list(call)
        with torch.enable_grad():
            for i, need in enumerate(needs):
                fields[i] = None if fields[i] is None else fields[i].detach().requires_grad_(need)
            results = function(type(call)(*fields))
        wanted = [i for i, need in enumerate(needs) if need and fields[i] is not None]
        given = [(y, grad) for y, grad in zip(results, grads, strict=True) if y is not None and grad is not None]
        found: list[Tensor | None] = [None] * len(needs)
        for i, grad in zip(
            wanted,
            torch.autograd.grad(
                [y for y, _ in given],
                [fields[i] for i in wanted],
                [grad for _, grad in given],
                materialize_grads=True,
            ),
            strict=True,
        ):
            found[i] = grad
        return tuple(found)

    return backward


def _as(like: Tensor, grad: Tensor) -> Tensor:
    grad = grad.to(like.dtype)
    return grad if grad.shape == like.shape else grad.reshape(like.shape)


def _filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if result is None else result for result in results)
