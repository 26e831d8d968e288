"""The SIMT machine of tests/simt, on which the CPU executes the CUDA kernels, and runs on every instruction set."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kolors_fast.ops import _backends, _products, use_backend

ROOT = Path(__file__).parents[2]
POINTER, INT64, INT, BOOL, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool, ctypes.c_double
SIGNATURES: dict[str, list[Any]] = {
    "group_norm_silu_forward": [*[POINTER] * 9, *[INT64] * 5, DOUBLE, BOOL, BOOL, INT, INT, POINTER],
    "group_norm_silu_backward": [*[POINTER] * 14, *[INT64] * 5, BOOL, BOOL, INT, INT, POINTER],
    "guided_step": [*[POINTER] * 9, INT64, INT, INT, POINTER],
    "scale_and_filter": [*[POINTER] * 3, INT64, INT, INT, POINTER],
    "unscale_and_filter": [*[POINTER] * 4, INT64, INT, INT, INT, POINTER],
    "unscale_grads": [*[POINTER] * 5, INT64, INT64, POINTER],
    "qk_norm_forward": [POINTER, INT, *[INT64] * 3, DOUBLE, INT, INT, POINTER],
    "qk_norm_backward": [POINTER, POINTER, INT, *[INT64] * 3, DOUBLE, INT, INT, POINTER],
    "ada_layer_norm_forward": [*[POINTER] * 5, *[INT64] * 5, DOUBLE, INT, INT, POINTER],
    "ada_layer_norm_backward": [*[POINTER] * 8, *[INT64] * 4, INT, INT, POINTER],
    "gated_residual_ada_layer_norm_forward": [*[POINTER] * 8, *[INT64] * 6, DOUBLE, INT, INT, POINTER],
    "gated_residual_ada_layer_norm_backward": [*[POINTER] * 13, *[INT64] * 5, INT, INT, POINTER],
}
WORKSPACES: dict[str, list[Any]] = {
    "group_norm_silu_workspace": [*[INT64] * 4, BOOL, BOOL],
    "ada_layer_norm_workspace": [INT64] * 3,
    "unscale_grads_workspace": [POINTER, INT64],
    "qk_norm_workspace": [INT64],
    "gated_residual_ada_layer_norm_workspace": [INT64] * 3,
}


class Machine:
    """The launchers with the calling convention of kolors_fast._cuda: addresses as integers, an error raises."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, arguments in SIGNATURES.items():
            setattr(self, name, self._launcher(name, arguments))
        for name, arguments in WORKSPACES.items():
            setattr(self, name, ctypes.CFUNCTYPE(INT64, *arguments)(self._address(name)))
        self.configure(2)

    def configure(self, multiprocessors: int, reverse: bool = False) -> None:
        """How large a GPU the launchers see, and whether threads and blocks run from the last to the first."""
        self.library.configure(multiprocessors, reverse)

    def plan(self, n: int, c: int, hw: int, groups: int, last: bool, vector: int, backward: bool, sms: int) -> Any:
        names = ("blocks", "threads", "chunks", "rows", "slices", "slice_channels", "parts", "columns", "row_lanes")
        fields = (INT64 * len(names))()
        arguments = [*map(INT64, (n, c, hw, groups)), BOOL(last), vector, BOOL(backward), sms, fields]
        self.library.group_norm_plan(*arguments)
        return dict(zip(names, fields, strict=True))

    def layer_norm_plan(self, batch: int, rows: int, d: int, sms: int) -> dict[str, int]:
        fields = (INT64 * 3)()
        self.library.layer_norm_plan(*map(INT64, (batch, rows, d)), sms, fields)
        return dict(zip(("rows", "chunks", "threads"), fields, strict=True))

    def _address(self, name: str) -> int:
        return POINTER.in_dll(self.library, name).value or 0

    def _launcher(self, name: str, arguments: list[Any]) -> Callable[..., None]:
        launch = ctypes.CFUNCTYPE(INT, *arguments)(self._address(name))

        def call(*values: Any) -> None:
            if code := launch(*values):
                raise RuntimeError(f"{name}: cudaError {code}")

        return call


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the SIMT machine needs g++, which is not on PATH")
    target = tmp_path_factory.mktemp("simt") / "simt.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    # longjmp between fibres is what the fortified longjmp forbids
    flags += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-shared", "-fPIC"]
    flags += os.environ.get("KOLORS_FAST_TEST_SIMT_FLAGS", "").split()  # of .ci/sanitize
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/simt'}"]
    sources = [str(ROOT / "tests/simt" / name) for name in ("kernels.cpp", "self_test.cpp")]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of .ci/sanitize too
    command = [compiler, *flags, *sources, "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture
def machine(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The CUDA launchers behind the public ops; everything they are given to write holds NaN before."""
    machine = Machine(library)
    monkeypatch.setattr(_backends, "extension", lambda name: machine)
    monkeypatch.setattr(_products, "choose", lambda *_: ())  # it has no attention and no products:
    monkeypatch.setattr(_products, "_chooses", lambda *_: False)  # they are torch's
    monkeypatch.setattr(_backends, "unavailable", lambda backend: None)  # cached: keep the stand-in out of it
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all() and (torch.empty(4, dtype=torch.uint8) == 255).all()
    with use_backend("cpu"):
        yield machine
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_every_instruction_set() -> Callable[[str], None]:
    """Runs a test file as a script, in a process of its own for each instruction set that this CPU has."""

    def run(path: str) -> None:
        for isa in ("avx512bf16", "avx512", "avx2", "generic"):
            environment = {**os.environ, "KOLORS_FAST_CPU_ISA": isa}
            done = subprocess.run(
                [sys.executable, path], env=environment, cwd=Path(sys.prefix), capture_output=True, text=True
            )
            if "which this CPU does not have" not in done.stderr:
                assert done.returncode == 0, (isa, done.stderr)

    return run
