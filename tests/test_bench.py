"""The table and the chart of benchmark rows know every provider that can run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import chart
import peers
import table

from kolors_fast.ops import SPECS, _backends

GROUPS = {
    "models": (
        "diffusers",
        "diffusers_compile",
        "diffusers_max_autotune",
        "reference",
        "kolors_fast",
        "kolors_fast_tiled",
    ),
    **{name: ("eager", "compile", *reversed(_backends.BACKENDS), *peers.PEERS.get(name, ())) for name in SPECS},
}


@pytest.fixture
def report() -> dict[str, Any]:
    rows = [
        {
            "group": f"{group} case torch.float32 forward",
            "name": name,
            "stats": {"median": 2e-3, "iqr": 1e-4},
            "extra_info": {"speedup": 1.5},
        }
        for group, names in GROUPS.items()
        for name in names
    ]
    machine = {"cpu": {"brand_raw": "a CPU"}, "machine": "x86_64", "threads": 2, "torch": "2", "gpu": None}
    return {
        "benchmarks": rows,
        "machine_info": {**machine, "command": "pytest bench"},
        "commit_info": {"id": "0" * 40},
        "datetime": "2026-01-01T00:00:00",
    }


def test_the_table_has_a_cell_for_every_provider_and_the_rival_first(report: dict[str, Any]) -> None:
    lines = table.table(report).splitlines()
    for line, names in zip(lines, GROUPS.values(), strict=False):
        cells = [cell.split()[0] for cell in line.strip("| ").split(" | ")[1:]]
        assert sorted(cells) == sorted(names) and cells[0] in ("eager", "diffusers")
        found = peers.PEERS.get(line.split()[1], {})
        assert cells[len(cells) - len(found) :] == list(found)


def test_the_chart_tells_the_providers_of_a_group_apart(report: dict[str, Any]) -> None:
    drawn = chart.chart(report)
    for names in GROUPS.values():
        assert len({chart.colour(name) for name in names}) == len(names)
    assert drawn.count("<rect") == 1 + len(report["benchmarks"])
