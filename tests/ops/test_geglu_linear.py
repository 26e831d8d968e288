"""The product with GEGLU as its epilogue, interpreted, against float64; when it is used; and its configs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kolors_fast.kernels.device import architecture
from kolors_fast.kernels.geglu_linear_config import Config, configure
from torch import Tensor

from kolors_fast.ops import SPECS, _backends, explain, geglu_linear, use_backend
from kolors_fast.ops._spec import Case, Inputs, cast, map_tensors
from kolors_fast.ops.geglu_linear import EPILOGUE_PAYS_FROM, epilogue, epilogue_pays

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURE = architecture(torch.device(DEVICE))
SPEC = SPECS["geglu_linear"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = [case for case in SPEC.cases if not case.model]
with_triton = pytest.mark.skipif(
    _backends.unavailable("triton") is not None, reason=str(_backends.unavailable("triton"))
)


def build(case: Case, dtype: torch.dtype) -> Inputs:
    return cast(case.make(torch.Generator().manual_seed(0)), dtype, DEVICE)


def named(name: str) -> Case:
    return next(case for case in SPEC.cases if case.name == name)


def double(inputs: Inputs) -> Inputs:
    return {name: map_tensors(value, lambda t: t.cpu().double()) for name, value in inputs.items()}


# ---- the kernel


@with_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_epilogue_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = build(case, dtype)
    y, truth, eager = epilogue(**inputs), SPEC.reference(**double(inputs)), SPEC.eager(**inputs)
    assert y.dtype == dtype and y.is_contiguous()
    assert (broken := SPEC.tolerance.violation(y.cpu(), eager.cpu(), truth)) is None, broken


@with_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_epilogue_rounds_once(dtype: torch.dtype) -> None:
    """Half a unit in the last place and the cheaper Phi's 3e-5, where what rounds h first errs by several."""
    inputs = build(named("several_tiles"), dtype)
    truth = SPEC.reference(**double(inputs))
    unit = torch.finfo(dtype).eps * 2.0 ** truth.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    sums = 1e-5  # of 72 products in fp32, |h| < 8
    assert ((epilogue(**inputs).cpu() - truth).abs() <= 0.5 * unit + 4e-5 * truth.abs() + sums).all()
    assert not ((SPEC.eager(**inputs).cpu() - truth).abs() <= 0.5 * unit + 4e-5 * truth.abs() + sums).all()


@with_triton
@pytest.mark.parametrize("name", ["several_tiles", "odd"])
def test_every_element_is_written_twice_the_same_and_nothing_else(name: str) -> None:
    inputs = build(named(name), torch.float16)
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    try:
        first, second = epilogue(**inputs), epilogue(**inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second) and not first.isnan().any()


@with_triton
def test_views_at_every_offset() -> None:
    inputs = build(named("plain"), torch.float16)
    expected = epilogue(**inputs)
    for offset in range(1, 9):
        moved = {}
        for name, value in inputs.items():
            storage = torch.full((value.numel() + 16,), 7.25, dtype=value.dtype, device=DEVICE)
            moved[name] = storage[offset : offset + value.numel()].view(value.shape).copy_(value)
        assert torch.equal(epilogue(**moved), expected)


# ---- when it is used


@with_triton
@pytest.mark.parametrize("measured", [(83, 40, 72), (84, 40, 72), (83, 40, 64)], ids=str)
def test_the_table_decides(
    measured: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, features, depth = measured
    inputs = build(named("several_tiles"), torch.bfloat16)
    assert not epilogue_pays(83, 40, 72, torch.bfloat16, ARCHITECTURE)
    monkeypatch.setitem(EPILOGUE_PAYS_FROM, (ARCHITECTURE, torch.bfloat16, depth, features), rows)  # type: ignore[arg-type]
    pays = measured == (83, 40, 72)
    with use_backend("triton"):
        verdict = explain(geglu_linear, **inputs)["triton epilogue"]
        y = geglu_linear(**inputs)
    assert pays == (verdict == "runs") == torch.equal(y, epilogue(**inputs))
    assert f"geglu_linear on triton epilogue: {verdict}" in capsys.readouterr().out
    assert pays or verdict == (
        f"declines: not measured to be faster for 83 rows of 72 to 80 in torch.bfloat16 on sm_{ARCHITECTURE}"
    )


@with_triton
def test_a_backward_pass_reads_what_linear_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(named("plain"), torch.float32)
    monkeypatch.setitem(EPILOGUE_PAYS_FROM, (ARCHITECTURE, torch.float32, 32, 24), 1)  # type: ignore[arg-type]
    inputs["weight"].requires_grad_()
    with use_backend("triton"):
        assert explain(geglu_linear, **inputs)["triton epilogue"].startswith("declines: a backward pass")
        (grad,) = torch.autograd.grad(geglu_linear(**inputs).sum(), inputs["weight"])
        with torch.no_grad():
            assert explain(geglu_linear, **inputs)["triton epilogue"] == "runs"
    exact = {name: map_tensors(value, lambda t: t.detach().cpu().double()) for name, value in inputs.items()}
    exact["weight"].requires_grad_()
    (truth,) = torch.autograd.grad(SPEC.reference(**exact).sum(), exact["weight"])
    torch.testing.assert_close(grad.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_compiled_inference_meets_one_op_and_training_two() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    inputs = build(named("plain"), torch.float32)
    compiled = torch.compile(geglu_linear, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**inputs), geglu_linear(**inputs), rtol=0, atol=0)
    inputs["weight"].requires_grad_()
    torch.testing.assert_close(compiled(**inputs), geglu_linear(**inputs), rtol=0, atol=0)
    with torch.no_grad():
        compiled(**inputs)
    assert ["geglu_linear.default" in graph for graph in graphs] == [True, False, True]
    assert "linear" in graphs[1] and "kolors_fast.geglu.default" in graphs[1]


# ---- refusals


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"x": torch.ones(3, 8, dtype=torch.int64)},
            TypeError,
            "x: expected a floating dtype of 16 to 64 bits, got torch.int64",
        ),
        ({"x": torch.ones(())}, ValueError, r"x: expected \[\.\.\., K\], got \[\]"),
        ({"weight": torch.ones(6, 7)}, ValueError, r"weight: expected \[2N, 8\], got \[6, 7\]"),
        ({"weight": torch.ones(5, 8)}, ValueError, r"weight: expected \[2N, 8\], got \[5, 8\]"),
        ({"weight": torch.ones(8)}, ValueError, r"weight: expected \[2N, 8\], got \[8\]"),
        ({"weight": torch.ones(6, 8).half()}, TypeError, "weight: expected torch.float32, got torch.float16"),
        ({"weight": torch.ones(6, 8, device="meta")}, ValueError, "weight: expected a tensor on cpu, got meta"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected \[6\], got \[3\]"),
        ({"bias": torch.ones(6).double()}, TypeError, "bias: expected torch.float32, got torch.float64"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, "bias: expected a tensor on cpu, got meta"),
    ],
)
def test_refuses_in_one_sentence(change: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^geglu_linear: {message}$"):
        geglu_linear(**{"x": torch.ones(3, 8), "weight": torch.ones(6, 8), "bias": torch.ones(6), **change})


# ---- configs

# bytes of shared memory that one program may have
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
KOLORS = ((8192, 2560, 640), (2048, 5120, 1280), (2048, 2560, 640), (512, 5120, 1280))


def config_of(rows: int, features: int, depth: int, sm: int, itemsize: int = 2, **options: Any) -> Config:
    given = {"x_stride": depth, "aligned": True, "multiprocessors": 132, **options}
    return configure(rows, features, depth, itemsize=itemsize, architecture=sm, **given)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sm", SHARED_MEMORY)
@pytest.mark.parametrize("sizes", KOLORS)
def test_stages_fit_and_tiles_divide_the_models_shapes(sizes: tuple[int, int, int], sm: int, itemsize: int) -> None:
    config = config_of(*sizes, sm, itemsize)
    stage = (config.block_m + 2 * config.block_n) * config.block_k * itemsize
    assert config.num_stages * stage <= SHARED_MEMORY[sm]
    rows, features, depth = sizes
    assert rows % config.block_m == features % config.block_n == depth % config.block_k == 0
    assert config.programs(rows, features) * config.block_m * config.block_n == rows * features
    assert config.vector * itemsize == 16


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_tiles_are_lower_where_they_would_be_few(sm: int) -> None:
    assert [config_of(*sizes, sm).block_m for sizes in KOLORS] == [128, 128, 128, 64]
    heights = {config_of(rows, 5120, 1280, sm).block_m for rows in range(1, 4096, 97)}
    assert heights == {64, 128}  # two kernels, whatever the resolution


def test_vectors_need_aligned_rows() -> None:
    assert config_of(64, 40, 72, 90).vector == 8 and config_of(64, 40, 72, 90, 4).vector == 4
    assert config_of(64, 40, 72, 90, aligned=False).vector == 1
    assert config_of(64, 40, 72, 90, x_stride=73).vector == 1
    assert config_of(64, 41, 72, 90).vector == config_of(64, 40, 71, 90).vector == 1


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of(64, 40, 72, 90).block_m = 1  # type: ignore[misc]
