"""A second device on a CPU, in the place of "lazy", which nobody has: its tensors have values, but none that is
computed with together with a tensor of the CPU.

What would fail on a GPU, because something was left on the CPU, fails here; and what reads a value back, for which a
GPU's host would wait, is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # may take tensors of both devices
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # indices may be the CPU's
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Held(Tensor):
    """A tensor of the second device."""

    raw: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, raw: Tensor) -> Held:
        held: Held = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        held.raw = raw
        return held

    # what subclasses lack
    def tolist(self) -> Any:
        return self.raw.tolist()

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: expected to be called inside of second_device()")


class SecondDevice(TorchDispatchMode):
    """Computes what tensors of the second device are asked for; `read` are the operations that read values back."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        held = {id(one.raw): one for one in given if isinstance(one, Held)}
        there = bool(held)
        if func in _COPIES:
            there = isinstance(args[0], Held)
        elif func in _INDEXED and isinstance(args[0], Held):
            pass
        elif held and any(not isinstance(one, Held) and one.dim() > 0 for one in given):
            raise RuntimeError(f"{func}: expected tensors of one device, got {[str(one.device) for one in given]}")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu") if there else kwargs["device"]
        if held and (func in _READS or not there):
            self.read.append(str(func))

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return held[id(value)] if id(value) in held else Held(value)

        with _autograd() if func.namespace == "kolors_fast" else nullcontext():
            result = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        return tree_map(wrapped, result) if there else result


class _Tensors(TorchFunctionMode):
    """`torch.tensor`, which asks no other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu") != DEVICE:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Held) else value


@contextmanager
def _autograd() -> Iterator[None]:
    """Our ops' reference differentiates inside of its backward pass, which is below autograd here."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Under it, DEVICE is one that computes; without autocast, which knows no such device."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def other_autocast(device: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device == DEVICE.type else autocast(device, *args, **kwargs)

    def other_enabled(device: str) -> bool:
        return device != DEVICE.type and enabled(device)

    supported = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with (
        SecondDevice() as mode,
        _Tensors(),
        patch(supported, lambda: ["cpu", DEVICE.type]),
        patch("torch.autocast", other_autocast),
        patch("torch.is_autocast_enabled", other_enabled),
    ):
        yield mode
