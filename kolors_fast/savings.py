"""What the models compute once, together, in place or not at all, where plain code repeats it.

Each saving is exact: results change by rounding at most. Each has a name and can be switched off, to measure what it
is worth or to find out whether it is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

SAVINGS: Mapping[str, str] = {
    "prompt_cache": "text projection, keys and values of every cross-attention, and size embedding once per prompt",
    "prompt_fold": "the projections around cross-attention multiplied into the keys and values of a short prompt",
    "step_table": "time embeddings, and what each block makes of them, for all steps at once",
    "pad_collapse": "masked pads of a prompt dropped, m equal ones as one key whose logit is raised by ln(m)",
    "fused_qkv": "queries, keys and values in one product, of one storage that the named weights are views of",
    "channels_last": "feature maps and weights as NHWC, so that pixels are tokens without a transpose",
    "channel_add": "the time embedding and the bias of a convolution added inside the next GroupNorm",
    "skip_concat": "the concat with a skip never built: GroupNorm and the 1x1 shortcut read both maps",
    "residual_norm": "a residual and the LayerNorm after it in one pass, gate and modulation included",
    "geglu": "GEGLU in one pass",
    "gelu": "GELU as the epilogue of the product before it",
    "joint_qkv": "projections of two streams in one tensor, which their joint attention reads in place",
    "upsample_phases": "nearest-neighbour upsampling and its 3x3 convolution as four 2x2 ones on the small map",
    "products": "on a CPU, whoever was measured fastest for a shape multiplies, with weights packed once",
    "winograd": "on a CPU, 3x3 convolutions at 4/9 of their products",
}
_off: frozenset[str] = frozenset()


class without:
    """Switch savings off by name: a call does it for good, a `with` block until its end. No name: all are on.

        with kolors_fast.without("fused_qkv", "geglu"):
            ...

    Raises:
        ValueError: a name is no saving.
    """

    def __init__(self, *names: str) -> None:
        global _off
        for name in names:
            if name not in SAVINGS:
                raise ValueError(f"without: expected names of {', '.join(SAVINGS)}, got {name!r}")
        self._before = _off
        _off = _off.union(names) if names else frozenset()

    def __enter__(self) -> without:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _off
        _off = self._before


def on(name: str) -> bool:
    return name not in _off


def switched_off() -> frozenset[str]:
    return _off
