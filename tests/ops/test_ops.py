"""Every op x backend x dtype x case against float64, generated from the specs: a new op gets these by existing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast import ops
from kolors_fast.ops import SPECS, OpSpec, _backends, use_backend
from kolors_fast.ops._spec import Case, Inputs, cast, map_tensors, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = ("cpu", "triton", "cuda")


def _backends_here() -> list[str]:
    """Backends that exist on this machine; `test_backend_is_tested` skips with the reason for each other one."""
    return ["reference", *(name for name in FUSED if _backends.unavailable(name) is None)]


def _small() -> list[Any]:
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in SPECS.values()
        for case in spec.cases
        if not case.model
    ]


def _on_each_backend(entries: Iterable[Any]) -> list[Any]:
    """Each of them on every backend of this machine that its op has a column for."""
    return [
        pytest.param(*entry.values, backend, id=f"{entry.id}-{backend}")
        for entry in entries
        for backend in _backends_here()
        if backend in entry.values[0].columns
    ]


_SPECS = [pytest.param(spec, id=name) for name, spec in SPECS.items()]


def _device(backend: str) -> str:
    return "cpu" if backend in ("cpu", "reference") else DEVICE


def _build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    return cast(case.make(torch.Generator().manual_seed(0)), dtype, device)


def _double(inputs: Inputs) -> Inputs:
    def one(value: Tensor) -> Tensor:
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()

    return {name: map_tensors(value, one) for name, value in inputs.items()}


def _eagers(inputs: Inputs) -> Inputs:
    """In NCHW: on a CPU eager group_norm of channels_last tensors cancels at a large mean (relative error 0.3 at 1000),
    and a multiple of that would allow anything."""
    return {name: map_tensors(value, Tensor.contiguous) for name, value in inputs.items()}


def _run(spec: OpSpec, function: Any, inputs: Inputs) -> list[Tensor]:
    """All that a call computes: its results, and copies of what it writes in place."""
    inputs = {**inputs, **{name: map_tensors(inputs[name], Tensor.clone) for name in spec.mutated}}
    results = function(**inputs)
    results = [y for y in results if y is not None] if isinstance(results, tuple) else [results]
    return [*results, *(tensor for name in spec.mutated for tensor in tensors(inputs[name]))]


def _with_grad(inputs: Inputs, names: tuple[str, ...]) -> tuple[Inputs, list[Tensor]]:
    """Leaves that keep their layout and storage offset."""
    given = {n: map_tensors(inputs.get(n), lambda t: t.detach().requires_grad_()) for n in names}
    return {**inputs, **given}, [leaf for value in given.values() for leaf in tensors(value)]


def _grads(spec: OpSpec, function: Any, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Of all differentiable arguments, for seeded gradients of all results that `dtype` holds exactly."""
    inputs, leaves = _with_grad(inputs, spec.gradients)
    results, generator = _run(spec, function, inputs), torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in results]
    seeds = [seed.to(y.device, y.dtype) for seed, y in zip(seeds, results, strict=True)]
    return list(torch.autograd.grad(results, leaves, seeds))


@pytest.mark.parametrize("backend", [*FUSED])
def test_backend_is_tested(backend: str) -> None:
    if reason := _backends.unavailable(backend):
        pytest.skip(reason)
    assert backend in _backends_here()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case", "backend"), _on_each_backend(_small()))
def test_forward_against_float64(spec: OpSpec, case: Case, backend: str, dtype: torch.dtype) -> None:
    inputs = _build(case, dtype, _device(backend))
    with use_backend(backend):
        ours = _run(spec, spec.function, inputs)
    defined = _run(spec, spec.reference, inputs)
    truth, eager = _run(spec, spec.reference, _double(inputs)), _run(spec, spec.eager, _eagers(inputs))
    for i, (o, d, e, t) in enumerate(zip(ours, defined, eager, truth, strict=True)):
        assert o.dtype == d.dtype
        assert (broken := spec.tolerance.violation(o.cpu(), e.cpu(), t)) is None, f"output {i}: {broken}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case", "backend"), _on_each_backend(p for p in _small() if p.values[0].gradients))
def test_backward_against_float64(spec: OpSpec, case: Case, backend: str, dtype: torch.dtype) -> None:
    inputs = _build(case, dtype, _device(backend))
    leaves = [tensor for name in spec.gradients for tensor in tensors(inputs.get(name))]
    with use_backend(backend):
        ours = _grads(spec, spec.function, inputs, dtype)
    truth = _grads(spec, spec.reference, _double(inputs), dtype)
    eager = _grads(spec, spec.eager, _eagers(inputs), dtype)
    for i, (leaf, o, e, t) in enumerate(zip(leaves, ours, eager, truth, strict=True)):
        assert o.dtype == leaf.dtype
        broken = spec.tolerance.violation(o.cpu(), e.cpu(), t, gradient=True)
        assert broken is None, f"gradient {i}: {broken}"


@pytest.mark.parametrize(("spec", "case", "backend"), _on_each_backend(_small()))
def test_output_layout_follows_the_input(spec: OpSpec, case: Case, backend: str) -> None:
    inputs = _build(case, torch.float32, _device(backend))
    first = next(v for v in inputs.values() if isinstance(v, Tensor))
    written = sum(len(tensors(inputs[name])) for name in spec.mutated)
    with use_backend(backend):
        results = _run(spec, spec.function, inputs)
        for y in results[: len(results) - written]:  # what is written in place has no choice
            if first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last):
                assert y.is_contiguous(memory_format=torch.channels_last) or first.is_contiguous()
            else:
                assert y.is_contiguous() or first.dim() == 3


@pytest.fixture
def poisoned() -> Any:
    """Every uninitialised allocation holds NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all() and torch.empty(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("spec", "case", "backend"), _on_each_backend(p for p in _small() if "holds" not in p.values[1].name)
)
def test_every_element_is_written(spec: OpSpec, case: Case, backend: str, poisoned: None) -> None:
    inputs, leaves = _with_grad(_build(case, torch.float32, _device(backend)), spec.gradients)
    with use_backend(backend):
        outputs = _run(spec, spec.function, inputs)
        grads = torch.autograd.grad([y.sum() for y in outputs], leaves) if leaves else ()
    for tensor in (*outputs, *grads):
        assert not tensor.isnan().any()


@pytest.mark.parametrize(("spec", "backend"), _on_each_backend(_SPECS))
def test_views_at_every_offset(spec: OpSpec, backend: str) -> None:
    """A misaligned wide load reads wrong or faults; a write past the end changes the sentinels around the view."""
    case = next(c for c in spec.cases if c.name == "offset_view")
    expected = None
    for offset in range(9):
        inputs = _build(case, torch.float32, _device(backend))
        storages = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                storages[name] = torch.full((value.numel() + 16,), 7.25, device=value.device)
                view = storages[name].as_strided(value.shape, _dense_strides(value), offset)
                inputs[name] = view.copy_(value)
        with use_backend(backend):
            y = _run(spec, spec.function, inputs)[0]
        for name, storage in storages.items():
            used = inputs[name].numel()
            assert (storage[:offset] == 7.25).all() and (storage[offset + used :] == 7.25).all(), name
        expected = y.clone() if expected is None else expected
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


def _dense_strides(value: Tensor) -> tuple[int, ...]:
    return torch.empty_like(value, memory_format=torch.preserve_format).stride()


@pytest.mark.parametrize(
    ("spec", "case", "backend"),
    _on_each_backend(p for p in _small() if p.values[1].name in ("plain", "seam", "all_from_row")),
)
def test_two_runs_give_the_same_bits(spec: OpSpec, case: Case, backend: str) -> None:
    inputs, leaves = _with_grad(_build(case, torch.float32, _device(backend)), spec.gradients)
    runs = []
    with use_backend(backend):
        for _ in range(2):
            outputs = _run(spec, spec.function, inputs)
            grads = torch.autograd.grad([y.sum() for y in outputs], leaves) if leaves else ()
            runs.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("spec", "backend"), _on_each_backend(_SPECS))
def test_registered_op_passes_opcheck_and_equals_the_direct_route(spec: OpSpec, backend: str) -> None:
    overload = getattr(torch.ops.kolors_fast, spec.name).default

    def registered(**inputs: Any) -> tuple[Tensor, ...]:
        results = overload(*spec.prepare(**inputs))
        return tuple(y for y in ([results] if isinstance(results, Tensor) else results) if y.numel())

    for case in [c for c in spec.cases if not c.model and c.name in ("plain", "channels_last", "seam", "multistep")]:
        inputs, _ = _with_grad(_build(case, torch.float32, _device(backend)), spec.gradients)
        with use_backend(backend):
            if backend in ("reference", "cpu"):  # opcheck runs the op a dozen times: too slow interpreted
                torch.library.opcheck(overload, spec.prepare(**inputs))
            # an op that is composed of others where gradients are wanted multiplies by another library there
            with torch.set_grad_enabled(not spec.traced_as):
                direct = _run(spec, spec.function, inputs)
                traced = _run(spec, registered, inputs)[: len(direct)]  # without what is for a backward pass
        assert all(torch.equal(a, b) for a, b in zip(direct, traced, strict=True))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_compiles_into_one_graph(spec: OpSpec) -> None:
    case = next(c for c in spec.cases if c.name == "plain")
    inputs, leaves = _with_grad(_build(case, torch.float32), spec.gradients)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(spec.function, fullgraph=True, backend=backend)
    for a, b in zip(_run(spec, compiled, inputs), _run(spec, spec.function, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(graphs) == 1 and f"kolors_fast.{spec.traced_as or spec.name}.default" in graphs[0]
    if leaves:
        compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad([y.square().sum() for y in _run(spec, compiled, inputs)], leaves)
        plain = torch.autograd.grad([y.square().sum() for y in _run(spec, spec.function, inputs)], leaves)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_column_exists_and_costs_are_counted(spec: OpSpec) -> None:
    assert {"reference", "cpu", "triton"} <= set(spec.columns) <= set(_backends.BACKENDS)
    for case in spec.cases:
        if not case.model:
            inputs = _build(case, torch.float32)
            assert spec.bytes_moved(inputs) >= 0 and spec.flops(inputs) >= 0
    assert ops.__dict__[spec.name] is spec.function
