"""The fused ops, one file per op.

Every module here without a leading underscore is an op: it defines a public function of its own name and a `SPEC`.
Finding them by their files is what makes an op complete with its kernels and its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from . import _backends
from ._backends import BackendError, use_backend
from ._spec import OpSpec
from ._streams import AddedStream

SPECS: dict[str, OpSpec] = {}


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            spec: OpSpec = importlib.import_module(f"{__name__}.{module.name}").SPEC
            SPECS[spec.name] = spec
            globals()[spec.name] = spec.function


_discover()


def explain(op: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Print, and return, which backend runs `op(*args, **kwargs)` and why each other one does not.

    Args:
        op: a public op function or its name.
        args, kwargs: the op's own arguments; nothing is computed.

    Returns:
        backend -> "runs", "could run, but ..." or "declines: ..."; then the op's further choices, in the same words.

    Raises:
        ValueError: no such op, or the arguments do not fit the op.
        BackendError: a backend was forced and declines.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in SPECS:
        raise ValueError(f"explain: op: expected one of {', '.join(SPECS)}, got {name!r}")
    spec = SPECS[name]
    call = spec.prepare(*args, **kwargs)
    table = _backends.reasons(name, spec.columns, call)
    if spec.details is not None:
        table |= spec.details(call)
    for backend, verdict in table.items():
        print(f"{name} on {backend}: {verdict}")
    return table


__all__ = ["SPECS", "AddedStream", "BackendError", "OpSpec", "explain", "use_backend", *SPECS]
