"""Registration with torch.library, and the short way round it.

The dispatcher costs more per call than a small kernel (on a 2.5 GHz core `Library.impl` 14 us,
`torch.library.custom_op` 46 us). So the registered op serves tracing (torch.compile, export, fake tensors), and
eager calls go to the launcher directly. A generated test holds that both routes agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_LIBRARY = torch.library.Library("kolors_fast", "DEF")
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), list, tuple})  # what launchers take as a tensor's field
_CHECKPOINTING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def define(
    schema: str, implementation: Callable[..., tuple[Tensor, ...]], fake: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """Register `kolors_fast::<schema>` and return its overload. All three give a tuple, also of a single result."""
    name = schema.partition("(")[0]
    single = schema.endswith("-> (Tensor)")  # which the dispatcher takes and gives bare

    def bare(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        return (lambda *args: run(*args)[0]) if single else run

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, bare(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kolors_fast::{name}", bare(fake), lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.kolors_fast, name).default
    return (lambda *args: (overload(*args),)) if single else overload


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(f"kolors_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def tracing(*tensors: Any) -> bool:
    """Whether something watches the dispatcher: dynamo, a dispatch mode, or a tensor subclass.

    Every tensor counts: a fake weight beside a plain x has the address 0, which launchers take for no weight.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:  # noqa: SIM110 (any() of a generator takes twice as long)
        if type(tensor) not in _PLAIN:
            return True
    return False


def checkpointing(*tensors: Any) -> bool:
    """Whether what watches is torch's selective checkpointing alone: any operator of torch's runs under it, and its
    result may be kept."""
    if torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors):
        return False
    modes = _get_current_dispatch_mode_stack()
    return bool(modes) and all(type(mode) in _CHECKPOINTING for mode in modes)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: a tensor is then more than what lies at its address."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def wants_grad(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() of a generator takes twice as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_grad(op: str, **named: Tensor | None) -> None:
    """For an op without a backward pass."""
    if wants_grad(named.values()):
        name = next(name for name, tensor in named.items() if tensor is not None and tensor.requires_grad)
        raise ValueError(f"{op}: {name}: expected a tensor without gradient, got requires_grad=True (no backward)")


def pointer(tensor: Tensor | None) -> int:
    """What the extensions take for a tensor: its address, 0 for absent."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that ops compute; float8 is storage

# dtype codes of csrc/
DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
