"""Markdown from the rows of a benchmark run: `python bench/table.py bench/results/NAME.json`.

Each row is a group, each column a provider: median (half the interquartile range), and how many times as fast as the
group's first provider, which is the median over rounds. The last lines say where the rows come from.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ORDER = (
    "eager", "diffusers", "compile", "diffusers_compile", "diffusers_max_autotune",
    "reference", "cpu", "triton", "cuda", "kolors_fast",
)  # fmt: skip


def table(report: dict[str, Any]) -> str:
    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for row in report["benchmarks"]:
        groups[row["group"]][row["name"]] = {**row["stats"], **row["extra_info"]}
    lines = []
    for group, providers in groups.items():
        cells = [
            f"{name} {_time(stats['median'])} (± {_time(stats['iqr'] / 2)}, {stats['speedup']:.2f}x)"
            for name, stats in sorted(providers.items(), key=lambda item: _place(item[0]))
        ]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    info = report["machine_info"]
    lines.append(f"\ncommit {report['commit_info']['id'][:12]}, {report['datetime'][:19]}, `{info['command']}`")
    cpu = info["cpu"].get("brand_raw", info["machine"])
    lines.append(f"{cpu}, {info['threads']} threads, torch {info['torch']}, GPU: {info['gpu']}")
    return "\n".join(lines)


def _place(provider: str) -> int:
    """Peers come last, in the order in which they ran."""
    return ORDER.index(provider) if provider in ORDER else len(ORDER)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(json.loads(Path(name).read_text())))
