"""What a training leaves to look at: figures by step, as JSON lines and, where it is installed, for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kolors_fast.models.checkpoint import write_file

NAME = "log.jsonl"


class Log:
    """Appends figures to `<folder>/log.jsonl`; a resumed training drops what it will do again."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_file(self.path, "".join(kept).encode())
        self.board = _tensorboard(folder, step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step, by name."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """A sheet of samples, for TensorBoard."""
        if self.board is not None and path.exists():
            with Image.open(path) as sheet:
                self.board.add_image("samples", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still held back."""
        if self.board is not None:
            self.board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that forgets the steps after `step`, or None without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
