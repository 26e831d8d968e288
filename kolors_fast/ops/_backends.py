"""Which backend runs an op, and why each other one does not.

The choice is pure: tensors in, a name and reasons out. Nothing falls back silently: `explain` prints the reasons,
and forcing a backend that declines raises with its reason.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")

# what is tried, in order, for tensors on a device; triton on cpu is its interpreter, which only tests want
_ORDER: Mapping[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendError(ValueError):
    """A backend was asked for by name and cannot run this call."""


@dataclass(frozen=True)
class Column:
    """One backend of one op: the launchers, and what else than device and dtype makes it decline a call."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    declines: Callable[..., str | None] | None = None


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the machine, not of tensors: asked once, and a constant under tracing."""
    cached = cache(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args)

    return call


@cache
def extension(name: str) -> ModuleType | str:
    """The compiled extension `kolors_fast._<name>`, or why it cannot be imported."""
    try:
        return importlib.import_module(f"kolors_fast._{name}")
    except ImportError as error:
        return f"kolors_fast._{name} is not built or does not load ({error})"


@once
def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine at all, or None."""
    if backend in ("cpu", "cuda"):
        found = extension(backend)
        if isinstance(found, str):
            return found
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton does not import ({error})"
        if not torch.cuda.is_available() and not interpreted():
            return "torch sees no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported"
    return None


@once
def interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter, which is decided once, when triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check_name(backend: str | None, source: str) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_forced: str | None = _check_name(os.environ.get("KOLORS_FAST_BACKEND") or None, "KOLORS_FAST_BACKEND")


class use_backend:
    """Force one backend for every op, for A/B runs: a call sets it, a `with` block restores the one before.

    `use_backend(None)` returns to the automatic choice. The environment variable KOLORS_FAST_BACKEND sets the
    first value.

    Raises:
        ValueError: `name` is no backend.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._before = _forced
        _forced = _check_name(name, "use_backend(name)")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._before


def forced() -> str | None:
    """The backend that every op has to take, if any."""
    return _forced


def declined(backend: str, columns: Mapping[str, Column], call: tuple[Any, ...]) -> str | None:
    """Why `backend` does not run this call, or None. `call[0]` is the tensor that names device and dtype."""
    x: Tensor = call[0]
    if backend not in columns:
        return "the op has no such column"
    if reason := _unfit(backend, x.device.type, x.dtype):
        return reason
    column = columns[backend]
    return column.declines(call) if column.declines is not None else None


def _unfit(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` runs no op at all on such tensors, or None."""
    if backend == "reference":
        return None
    if reason := unavailable(backend):
        return reason
    runs_on = "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"
    if device != runs_on:
        return f"runs on {runs_on} tensors, got {device}"
    if dtype not in _FUSED_DTYPES:
        return f"computes float32, float16 and bfloat16, got {dtype}"
    return None


@once
def _fit(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends to try for such tensors, in order: all but those that run no op on them."""
    return tuple(name for name in _ORDER.get(device, ("reference",)) if _unfit(name, device, dtype) is None)


def choose(op: str, columns: Mapping[str, Column], call: tuple[Any, ...]) -> str:
    """The backend that runs this call.

    Raises:
        BackendError: a backend was forced and declines.
    """
    if _forced is not None:
        if reason := declined(_forced, columns, call):
            got = f"{_forced!r}, which was asked for and declines: {reason}"
            raise BackendError(f"{op}: backend: expected one that runs this call, got {got}")
        return _forced
    x: Tensor = call[0]
    for backend in _fit("cpu" if x.is_cpu else x.device.type, x.dtype):  # a device's type is slow to ask for
        column = columns.get(backend)
        if column is not None and (column.declines is None or column.declines(call) is None):
            return backend
    return "reference"


def reasons(op: str, columns: Mapping[str, Column], call: tuple[Any, ...]) -> dict[str, str]:
    """For every backend either "runs" or the reason why it does not."""
    chosen = choose(op, columns, call)
    order = _ORDER.get(call[0].device.type, ("reference",))
    table: dict[str, str] = {}
    for backend in BACKENDS:
        if backend == chosen:
            table[backend] = "runs" + (" (asked for by name)" if _forced else "")
        elif reason := declined(backend, columns, call):
            table[backend] = f"declines: {reason}"
        elif _forced:
            table[backend] = f"could run, but {_forced!r} was asked for by name"
        elif backend not in order:
            table[backend] = f"could run, but only when asked for by name on {call[0].device.type} tensors"
        else:
            table[backend] = f"could run, but {chosen!r} comes first"
    return table
