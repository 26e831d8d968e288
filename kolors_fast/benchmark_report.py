"""What `kolors-fast bench` prints, and where its numbers come from."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__


def provenance(device: torch.device) -> dict[str, Any]:
    """Command, date, machine and versions."""
    return {
        "command": shlex.join(["kolors-fast", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(device),
        "versions": {"kolors_fast": __version__, **{name: _version(name) for name in ("torch", "triton", "diffusers")}},
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['model']}: {report['pictures']}", ""]
    head = ("provider", "step ms", "times as fast", "picture s", "peak MB")
    lines.append("{:<20}{:>18}{:>15}{:>18}{:>10}".format(*head))
    for name, row in report["providers"].items():
        if "missing" in row:
            lines.append(f"{name:<20}  {row['missing']}")
            continue
        step, picture = _spread(row["step_ms"], 1), _spread(row["picture_s"], 3)
        lines.append(f"{name:<20}{step:>18}{row['times_as_fast']:>15.2f}{picture:>18}{row['peak_mb']:>10.0f}")
    pairs = [", ".join(f"{name} {value}" for name, value in report[part].items()) for part in ("machine", "versions")]
    return "\n".join([*lines, "", f"memory: {report['memory']}", *pairs, report["command"]])


def _spread(values: list[float], digits: int) -> str:
    """Median ± half of the interquartile range."""
    first, middle, third = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ± {(third - first) / 2:.{digits}f}"


def _machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        if shutil.which("nvidia-smi"):
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
            found["driver, power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
