"""Processes that train together, started as programs: a module of tests cannot be imported everywhere."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def spawn(work: Callable[[int, int, Path], dict[str, Any]], size: int, folder: Path) -> dict[str, Any]:
    """What the main process of `size` of them returns; `work(rank, size, folder)` is found by its name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = f"from {__name__} import process; process({work.__module__!r}, {work.__name__!r}, {str(folder)!r})"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    errors = [folder / f"{work.__name__}-{rank}.err" for rank in range(size)]
    running = []
    for rank, error in enumerate(errors):
        with error.open("w") as file:
            environment = {**os.environ, **meeting, "PYTHONPATH": path, "RANK": str(rank)}
            running.append(subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=file))
    try:
        for one, error in zip(running, errors, strict=True):
            assert one.wait(timeout=400) == 0, error.read_text()
    finally:
        for one in running:
            one.kill()
            one.wait()
    result: dict[str, Any] = torch.load(folder / f"{work.__name__}-0.pt", weights_only=True)
    return result


def process(module: str, work: str, folder: str) -> None:
    """One of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    value = getattr(importlib.import_module(module), work)(rank, dist.get_world_size(), Path(folder))
    torch.save(value, Path(folder) / f"{work}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
