"""Provenance for every row, and the threads of the machine at hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import kolors_fast
from kolors_fast.ops import _backends


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["kolors_fast"] = kolors_fast.__version__
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["backends"] = {name: _backends.unavailable(name) or "available" for name in _backends.BACKENDS}
    machine_info["command"] = " ".join(["pytest", *config.invocation_params.args])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Leave out each round's time, and parameters that are printed Python objects; `name` and `group` say the same."""
    for row in output_json["benchmarks"]:
        del row["params"]
        row["stats"].pop("data", None)


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ.get("KOLORS_FAST_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
