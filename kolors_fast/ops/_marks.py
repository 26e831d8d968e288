"""Whether a tensor is still what it was when something was derived from it.

PyTorch counts the edits of a tensor (`_version`) and `.to()` gives it another address. An edit through `.data` does
neither; on a CPU a sample of the content shows it. Inference tensors count nothing, so nothing is derived from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _backends


class Mark:
    """The state of one tensor, which is not kept alive."""

    __slots__ = ("address", "content", "of", "version")

    def __init__(self, tensor: Tensor, on_death: Callable[[Any], None] | None = None) -> None:
        self.of = weakref.ref(tensor, on_death)
        self.version = tensor._version
        self.address = tensor.data_ptr()
        self.content = _sample(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the marked one and unchanged."""
        return (
            self.of() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and self.content == _sample(tensor)
        )


def _sample(tensor: Tensor) -> int:
    module: Any = _backends.extension("cpu")
    if not tensor.is_cpu or isinstance(module, str):
        return 0
    found: int = module.sample(tensor.data_ptr(), tensor.nbytes if tensor.is_contiguous() else tensor.element_size())
    return found


class Derived:
    """Tensors made from others, made anew when those have changed, and dropped when they are gone.

    Args:
        limit: bytes of derived tensors beyond which nothing more is kept.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: dict[tuple[int, str], tuple[Mark, Tensor]] = {}  # by id of the source and kind

    def get(self, source: Tensor, make: Callable[[], Tensor], kind: str = "") -> Tensor | None:
        """What `make` derives from `source`, one thing of each kind; None where the source counts no edits or there is
        no room."""
        if source.is_inference():
            return None
        key = id(source), kind
        kept = self._kept.get(key)
        if kept is not None:
            if kept[0].holds(source):
                return kept[1]
            self._forget(key)
        if self.bytes + source.nbytes > self.limit:  # what is derived is at least as large
            return None
        made = make()
        if self.bytes + made.nbytes > self.limit:
            return None
        self._kept[key] = (Mark(source, lambda _: self._forget(key)), made)
        self.bytes += made.nbytes
        return made

    def _forget(self, key: tuple[int, str]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.bytes -= kept[1].nbytes
