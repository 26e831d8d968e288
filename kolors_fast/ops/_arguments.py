"""What kind of thing an argument has to be, looked at only once something has gone wrong.

A call that is right pays for one frame: the checks of an op ask for shape, dtype and device, which anything that is
no tensor fails by an AttributeError. That is then told in the words of every other refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._streams import AddedStream

P = ParamSpec("P")
Call = TypeVar("Call")

_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((Tensor,), "a tensor"),
    "Sequence[Tensor]": ((list, tuple), "a list of tensors"),
    "AddedStream": ((tuple, list), "an AddedStream"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "torch.dtype": ((torch.dtype,), "a torch.dtype"),
}


def refused_by_kind(op: str) -> Callable[[Callable[P, Call]], Callable[P, Call]]:
    """Of a function that checks the arguments of `op`: where it stumbles over their kind, a TypeError says so."""

    def decorate(prepare: Callable[P, Call]) -> Callable[P, Call]:
        parameters = signature(prepare).parameters
        kinds = {name: str(parameter.annotation) for name, parameter in parameters.items()}

        @wraps(prepare)
        def checked(*args: P.args, **options: P.kwargs) -> Call:
            try:
                return prepare(*args, **options)
            except (AttributeError, TypeError, RuntimeError):
                given = {**dict(zip(kinds, args, strict=False)), **options}
                if reason := misfit(kinds, given):
                    raise TypeError(f"{op}: {reason}") from None
                raise

        return checked

    return decorate


def misfit(kinds: Mapping[str, str], given: Mapping[str, Any]) -> str | None:
    """The first argument that is not of its kind, with expected and got; or None. kinds: as annotations are written."""
    for name, value in given.items():
        if reason := _misfit(name, kinds.get(name, ""), value):
            return reason
    return None


def _misfit(name: str, annotation: str, value: Any) -> str | None:
    kind, *others = annotation.split(" | ")
    if kind not in _KINDS or (value is None and "None" in others):
        return None
    types, words = _KINDS[kind]
    if not isinstance(value, types):
        return f"{name}: expected {words}{' or None' if 'None' in others else ''}, got {_words_of(value)}"
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            return f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}"
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
            return f"{name}: expected a plain tensor, got one inside torch.vmap or torch.func"
    if isinstance(value, (list, tuple)):
        if kind == "Sequence[Tensor]":
            return _first(_misfit(f"{name}[{i}]", "Tensor", item) for i, item in enumerate(value))
        return _misfit_of_stream(name, value)
    return None


def _misfit_of_stream(name: str, values: Sequence[Any]) -> str | None:
    kinds = kinds_of(AddedStream)
    if not 3 <= len(values) <= len(kinds):
        return f"{name}: expected an AddedStream or a tuple ({', '.join(kinds)}), got {len(values)} elements"
    return _first(_misfit(f"{name}.{f}", kind, item) for (f, kind), item in zip(kinds.items(), values, strict=False))


def kinds_of(fields: type[Any]) -> dict[str, str]:
    """Field -> its type as written; the modules of ops postpone the evaluation of annotations."""
    return {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in fields.__annotations__.items()}


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _words_of(value: Any) -> str:
    if value is None or isinstance(value, (str, int, float, complex)):
        return repr(value)
    return f"a {type(value).__name__}"
