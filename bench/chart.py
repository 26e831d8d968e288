"""A chart from the rows of a benchmark's runs: `python bench/chart.py bench/results/NAME.json... > NAME.svg`.

One bar per provider of a group: how many times as fast as the group's first provider.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

COLOURS = {
    "eager": "#9aa0a6", "diffusers": "#9aa0a6", "compile": "#5f6b7a", "diffusers_compile": "#5f6b7a",
    "reference": "#c4b5a0", "cpu": "#1a73e8", "kolors_fast": "#1a73e8", "triton": "#e8710a", "cuda": "#188038",
    "triton_epilogue": "#f9ab00", "liger": "#a142f4", "sdpa": "#12b5cb", "flash_attn": "#e52592",
    "flash_attn_3": "#9c166b", "xformers": "#7cb342", "kolors_fast_tiled": "#8ab4f8",
    "diffusers_max_autotune": "#3c4043", "kolors_fast_full": "#8ab4f8", "kolors_fast_graph": "#174ea6",
    "without": "#aecbfa",
}  # fmt: skip
BAR, GAP, TEXT, SCALE, FONT = 12, 10, 460, 90, 11


def chart(report: dict[str, Any]) -> str:
    groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in report["benchmarks"]:
        if "host overhead" not in row["group"]:
            groups[row["group"]].append((row["name"], row["extra_info"]["speedup"]))
    groups = {group: providers for group, providers in groups.items() if len(providers) > 1}
    widest = max(speedup for providers in groups.values() for _, speedup in providers)
    lines, y = [], GAP
    for group, providers in groups.items():
        lines.append(_text(TEXT - 8, y + BAR * len(providers) / 2 + 4, group.replace("torch.", ""), "end"))
        for name, speedup in providers:
            bar = f'width="{speedup * SCALE:.1f}" height="{BAR - 2}" fill="{colour(name)}"'
            lines.append(f'<rect x="{TEXT}" y="{y}" {bar}/>')
            lines.append(_text(TEXT + speedup * SCALE + 4, y + BAR - 3, f"{name} {speedup:.2f}", "start"))
            y += BAR
        y += GAP
    width, info = TEXT + widest * SCALE + 140, report["machine_info"]
    machine = info["gpu"] or info["cpu"].get("brand_raw", info["machine"])
    source = f"times as fast as the first; {machine}, torch {info['torch']}, commit {report['commit_info']['id'][:12]}"
    lines.append(_text(TEXT, y + 8, source, "start"))
    one = f'<line x1="{TEXT + SCALE}" y1="0" x2="{TEXT + SCALE}" y2="{y}" stroke="#d93025" stroke-dasharray="2 3"/>'
    style = f'font-family="sans-serif" font-size="{FONT}"'
    size = f'width="{width:.0f}" height="{y + 20}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *lines, one, "</svg>"])


def colour(provider: str) -> str:
    return COLOURS[provider.partition(" ")[0]]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    reports = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    print(chart({**reports[0], "benchmarks": [row for report in reports for row in report["benchmarks"]]}))
