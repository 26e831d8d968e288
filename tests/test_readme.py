"""The README's commands parse, its files exist, and its table knows every op."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kolors_fast.cli import _parser
from kolors_fast.ops import SPECS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _commands() -> list[str]:
    lines = re.findall(r"^(?:.*&& )?(kolors-fast .*)$", README, re.MULTILINE)
    return [line.partition("#")[0].replace("[", "").replace("]", "").replace("PROMPT...", "p") for line in lines]


@pytest.mark.parametrize("command", _commands())
def test_commands_parse(command: str) -> None:
    _parser().parse_args(shlex.split(command)[1:])


def test_there_are_commands_for_both_sections() -> None:
    assert len(_commands()) >= 4
    assert re.search(r"^pip install -e '\.\[test\]' && pytest", README, re.MULTILINE)


@pytest.mark.parametrize("name", SPECS)
def test_the_table_names_every_op_and_its_backends(name: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}("))
    said = {"reference": "reference", "C++ CPU": "cpu", "Triton": "triton", "CUDA C++": "cuda"}
    assert {column for text, column in said.items() if text in row} == set(SPECS[name].columns)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
