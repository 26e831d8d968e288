"""The fused ops: one file per op."""

from .group_norm_silu import group_norm_silu
from .guided_step import guided_step

__all__ = ["group_norm_silu", "guided_step"]
