"""How much memory a forward pass takes beside the weights, from shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ops._products import PACKED_LIMIT, measured, this_machine
from .layers import Conv2d, Linear

_INSIDE = 4 << 20  # bytes that operators take whatever the shapes


def activation_bytes(model: nn.Module, call: Callable[[Any], Any], device: str = "cpu") -> int:
    """An upper bound of what `call(model)` allocates on the device at its peak, the inputs that it creates included.

    The call runs on tensors without memory, and every storage that an operator returns counts from then until it is
    freed. Added are what operators use inside: a tenth, 4 MiB (attention on a CPU takes about 0.1 MiB per thread), and
    one more copy of the largest convolution weight, which PyTorch reorders for small maps; and what layers keep in
    float32 on a CPU (see `_kept`). The model's weights, on the meta device before, are fake ones after.
    """
    shapes = [(key, value.shape, value.stride(), value.dtype) for key, value in model.state_dict().items()]
    with FakeTensorMode(), torch.no_grad():
        fake = {key: torch.empty_strided(shape, stride, dtype=dtype) for key, shape, stride, dtype in shapes}
        model.load_state_dict(fake, assign=True)
        peak = _Peak([*model.parameters(), *model.buffers()])
        with peak:
            result = call(model)
        del result
    reordered = max((value.nbytes for value in model.parameters() if value.dim() == 4), default=0)
    return int(1.1 * peak.most) + _INSIDE + reordered + (_kept(model) if device == "cpu" else 0)


def _kept(model: nn.Module) -> int:
    """Bytes of the copies of float32 weights: packed for products (`ops/_products.py`), 3x3 ones as 4x4, where this CPU
    was measured; and, after an upsampling, as phases, packed too (`layers.conv_of_doubled`)."""
    packed = phases = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear | Conv2d) and module.weight.dtype == torch.float32:
            winograd = isinstance(module, Conv2d) and module.kernel_size == (3, 3)
            size = module.weight.nbytes * 16 // 9 if winograd else module.weight.nbytes
            packed += size
            if winograd and "upsamplers" in name:
                phases, packed = phases + size, packed + size
    return (min(packed, PACKED_LIMIT) if measured(this_machine()) else 0) + phases


class _Peak(TorchDispatchMode):
    """Adds up the storages that operators return, as long as each is alive."""

    def __init__(self, free: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.live = {value.untyped_storage()._cdata: 0 for value in free}  # storage -> bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += self.live[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)
