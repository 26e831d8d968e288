"""The table and the chart of benchmark rows know every provider that can run; races of models are of equal results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench_transformers
import chart
import peers
import providers
import table
import torch

from kolors_fast.ops import SPECS, _backends

GROUPS = {
    "models": (
        "diffusers",
        "diffusers_compile",
        "diffusers_max_autotune",
        "reference",
        "kolors_fast_graph",
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


@pytest.mark.parametrize("name", bench_transformers.SMALL)
def test_a_step_of_a_run_is_that_of_diffusers(name: str) -> None:
    """Whatever saving is left out; and it is one that depends on prompts and the timestep."""
    case = bench_transformers.SMALL[name]
    dim = "cross_attention_dim" if name == "pixart" else "caption_projection_dim"
    case = case._replace(config={**case.config, "num_layers": 2, "num_attention_heads": 2, dim: 128}, side=8)
    asked = {"diffusers", "reference", "kolors_fast", *(f"without {saving}" for saving in case.savings)}
    assert set(bench_transformers.step_of(case, "cpu", asked)) == asked  # else they do not agree
    inputs = bench_transformers.inputs_of(case, "cpu", torch.float32)
    model = case.kind(**case.config).eval()
    with torch.no_grad():
        (plain,) = bench_transformers.stepping(model, inputs)()
        (later,) = model(**{**inputs, "timestep": inputs["timestep"] / 2})
        (others,) = model(**{**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]})
        assert torch.equal(plain, bench_transformers.stepping(model, inputs)()[0])
    for changed in (later, others):
        assert not torch.allclose(changed, plain, **providers.TOLERANCE[torch.float32])


def test_what_differs_is_not_timed() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    same = {"diffusers": lambda: [one, two], "kolors_fast": lambda: (one, two + 1e-6)}
    assert list(providers.agreeing(same, rtol=0.0, atol=1e-5)) == list(same)
    with pytest.raises(AssertionError):  # in what comes second, too
        providers.agreeing({**same, "reference": lambda: [one, two + 1]}, rtol=0.0, atol=1e-5)
