"""Training checkpoints: one file per stage, written beside and renamed, never over the last good one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TrainingStateError(OSError):
    """A training checkpoint is broken or belongs to another model."""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a reader, or a resumed run after a kill, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote: tensors, numbers, strings and containers of them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers stumble over
        first_line = str(error).split("\n", 1)[0]
        raise TrainingStateError(f"{path} is not a readable training checkpoint: {first_line}") from error
    if not isinstance(state, dict):
        raise TrainingStateError(f"{path} must hold a dict, got a {type(state).__name__}")
    return state


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """The module's state, detached, on the CPU."""
    return {key: value.detach().cpu() for key, value in module.state_dict().items()}
