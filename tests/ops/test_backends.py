"""The choice of a backend: named, explained, never silent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kolors_fast
from kolors_fast import ops
from kolors_fast.ops import BackendError, _backends, explain, group_norm_silu, guided_step, use_backend


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"x": torch.randn(2, 8, 3, 3, dtype=dtype), "num_groups": 2, "weight": torch.ones(8, dtype=dtype)} | {
        "bias": torch.zeros(8, dtype=dtype)
    }


def test_explain_names_the_choice_and_a_reason_for_every_other(capsys: pytest.CaptureFixture[str]) -> None:
    table = explain(group_norm_silu, **_inputs())
    assert set(table) == {"cuda", "triton", "cpu", "reference"}
    assert [v.startswith("runs") for v in table.values()].count(True) == 1
    assert all(v.startswith(("runs", "could run, but ", "declines: ")) for v in table.values())
    assert capsys.readouterr().out.count("group_norm_silu on ") == 4


def test_float64_runs_on_the_reference_and_says_why() -> None:
    table = explain("group_norm_silu", **_inputs(torch.float64))
    assert table["reference"] == "runs"
    if _backends.unavailable("cpu") is None:
        assert table["cpu"] == "declines: computes float32, float16 and bfloat16, got torch.float64"


def test_forcing_a_backend_that_declines_raises_its_reason() -> None:
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match=r"'cuda', which was asked for and declines: .*CUDA|_cuda"),
    ):
        group_norm_silu(**_inputs())


def test_use_backend_restores_what_was_before() -> None:
    with use_backend("reference"):
        with use_backend(None):
            assert "asked for" not in explain("group_norm_silu", **_inputs())["reference"]
        assert explain("group_norm_silu", **_inputs())["reference"] == "runs (asked for by name)"
    assert _backends._forced is None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of cuda, triton, cpu, reference, got 'tpu'"):
        use_backend("tpu")
    with pytest.raises(ValueError, match=r"expected one of .*guided_step.*, got 'nothing'"):
        explain("nothing")


def test_environment_variable_chooses() -> None:
    code = "import kolors_fast.ops._backends as b; print(b._forced)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"KOLORS_FAST_BACKEND": "reference", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "reference", run.stderr


def test_top_level_names() -> None:
    assert kolors_fast.explain is explain and kolors_fast.use_backend is use_backend


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(8)}, ValueError, r"x: expected \[N, C, \*spatial\], got \[8\]"),
        (
            {"x": torch.ones(2, 8, 3, 3, dtype=torch.int32)},
            TypeError,
            "x: expected a floating dtype of 16 to 64 bits, got torch.int32",
        ),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of 8 channels, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups: expected a divisor of 8 channels, got 0"),
        ({"weight": torch.ones(7)}, ValueError, r"weight: expected \[8\], got \[7\]"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias: expected \[8\], got \[8, 1\]"),
        ({"weight": torch.ones(8).half()}, TypeError, "weight: expected torch.float32, got torch.float16"),
        ({"bias": torch.ones(8).half()}, TypeError, "bias: expected torch.float32, got torch.float16"),
        ({"skip": torch.randn(2, 4, 3, 4)}, ValueError, r"skip: expected \[2, 'Cs', 3, 3\], got \[2, 4, 3, 4\]"),
        ({"skip": torch.randn(2, 8, 3, 3)}, ValueError, r"weight: expected \[16\], got \[8\]"),
        ({"skip": torch.randn(2, 8, 3, 3).half()}, TypeError, "skip: expected torch.float32, got torch.float16"),
        ({"channel_add": torch.randn(2, 7)}, ValueError, r"channel_add: expected \[2, 8\], got \[2, 7\]"),
        (
            {"channel_add": torch.randn(2, 8).half()},
            TypeError,
            "channel_add: expected torch.float32, got torch.float16",
        ),
        ({"activation": "relu"}, ValueError, "activation: expected 'silu' or None, got 'relu'"),
        ({"eps": -1e-5}, ValueError, "eps: expected a number >= 0, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight: expected a tensor on cpu, got meta"),
    ],
)
def test_group_norm_silu_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_norm_silu(**(_inputs() | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sample": torch.ones(1, 4, dtype=torch.int64)},
            TypeError,
            "sample: expected a floating dtype of 16 to 64 bits, got torch.int64",
        ),
        ({"predictions": torch.ones(3, 4)}, ValueError, r"predictions: expected \[2, 4\], got \[3, 4\]"),
        ({"weights": torch.ones(4)}, ValueError, r"weights: expected \[P\] with P from 1 to 3, got \[4\]"),
        ({"weights": torch.ones(2).double()}, TypeError, "weights: expected torch.float32, got torch.float64"),
        ({"coefficients": torch.ones(5)}, ValueError, r"coefficients: expected \[6\], got \[5\]"),
        ({"coefficients": torch.ones(3, 6)}, ValueError, r"coefficients: expected \[6\], got \[3, 6\]"),
        ({"row": torch.tensor([0, 1]), "coefficients": torch.ones(3, 6)}, ValueError, "row: expected one element"),
        ({"noise": torch.ones(1, 5)}, ValueError, r"noise: expected \[1, 4\], got \[1, 5\]"),
        ({"previous": torch.ones(1, 4).half()}, TypeError, "previous: expected torch.float32, got torch.float16"),
        ({"sample": torch.ones(1, 4, requires_grad=True)}, ValueError, "[a-z]+: expected a tensor without gradient"),
    ],
)
def test_guided_step_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "sample": torch.ones(1, 4),
        "predictions": torch.ones(2, 4),
        "weights": torch.ones(2),
        "coefficients": torch.ones(6),
    }
    with pytest.raises(error, match=message):
        guided_step(**(given | change))


@pytest.mark.parametrize("row", [-1, 3, 2**40])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_past_the_table_is_refused_and_never_read(row: int, backend: str) -> None:
    if reason := _backends.unavailable(backend):
        pytest.skip(reason)
    sample, table = torch.ones(1, 4), torch.ones(3, 6)
    expected = f"^guided_step: row: expected one of 3 rows, from 0, got {row}$"
    with use_backend(backend), pytest.raises(ValueError, match=expected):
        guided_step(sample, sample, torch.ones(1), table, row=torch.tensor([row]))


TOY = """
import torch
from . import _backends
from ._spec import Case, OpSpec

def negate(x):
    return -x

SPEC = OpSpec(
    name="negate", function=negate, reference=negate, eager=negate, prepare=lambda x: (x,),
    columns={name: _backends.Column(negate) for name in _backends.BACKENDS},
    cases=(Case("plain", lambda g: {"x": torch.randn(3, generator=g, dtype=torch.float64)}),),
    bytes_moved=lambda i: 24, flops=lambda i: 3,
)
"""


def test_a_new_file_is_a_new_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op needs its file (and its kernels), and no list anywhere."""
    (tmp_path / "negate.py").write_text(TOY)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(ops, "SPECS", {})
    ops._discover()
    try:
        assert "negate" in ops.SPECS and "group_norm_silu" in ops.SPECS
        assert explain("negate", torch.ones(3))["cuda"]
    finally:
        del ops.negate, sys.modules["kolors_fast.ops.negate"]
