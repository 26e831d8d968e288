"""Every op on its models' real shapes: eager PyTorch, torch.compile, and each backend at hand, side by side.

    pytest bench/bench_ops.py --benchmark-only

A provider is compared with the reference before it is timed; a wrong one is never timed. Providers take turns. Inputs
rotate through copies larger than the last-level cache, so that nobody times a cache. `GB/s` counts each tensor once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast.ops import SPECS, OpSpec, _backends, use_backend
from kolors_fast.ops._spec import Case, Inputs, cast, map_tensors, tensors

COLD_BYTES = 256 * 2**20
PROVIDERS = ("eager", "compile", *(name for name in _backends.BACKENDS if name != "reference"))
# on a CPU the whole suite has five minutes: one shape of each kind
ON_CPU = (
    "kolors_2x320x128x128",
    "kolors_2x640+320x64x64",
    "kolors_2x1280x32x32",
    "kolors_2x1280x32x32_no_silu",
    "sd3_text_2x333x1536",
    "pixart_2x4096x1152",
    "kolors_2x4096x640",
    "kolors_2x1024x1280",
    "kolors_1024_multistep",
    "kolors_1024_batch_8",
    "dalle_2x4096x1536_to_float16",
    "dalle_2x4096x1536_to_bfloat16",
    "dalle_2x4096x1536_float16",
    "dalle_2x4096x1536_bfloat16",
    "gpt_192x16",
    "kolors_512_2x1024x5120",
    "kolors_512_2x256x10240",
    "chatglm_1x256x27392",
    "chatglm_1x256x4096",
    "sd35_2x4096x24x64",
    "kolors_self_2x1024x20x64",
    "kolors_cross_2x1024x20x64",
    "sd35_2x1024+333x24x64",
)


def _cases() -> list[Any]:
    everywhere = torch.cuda.is_available()
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in SPECS.values()
        for case in spec.cases
        if case.model and (everywhere or case.name in ON_CPU)
    ]


def _run(spec: OpSpec, name: str, device: str) -> tuple[Callable[..., Any], str | None] | str:
    """What is called and the backend that is forced meanwhile, or why the provider cannot run here."""
    if name == "eager":
        return spec.eager, None
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(spec.eager, dynamic=False), None
    reason = _backends.unavailable(name)
    if reason is None and name == "triton" and device == "cpu":
        reason = "the Triton interpreter is for tests"
    if reason is None and (name == "cpu") != (device == "cpu"):
        reason = f"runs on {name} tensors, benchmarking {device}"
    return reason or (spec.function, name)


def _all(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cold(inputs: Inputs) -> itertools.cycle[Inputs]:
    size = sum(t.numel() * t.element_size() for value in inputs.values() for t in tensors(value))
    copies = min(64, max(2, COLD_BYTES // max(size, 1)))
    clones = [{k: map_tensors(v, Tensor.clone) for k, v in inputs.items()} for _ in range(copies)]
    return itertools.cycle(clones)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), _cases())
def test_forward(
    race: Any, benchmark: Any, spec: OpSpec, case: Case, dtype: torch.dtype, provider: str, device: str
) -> None:
    inputs = cast(case.make(torch.Generator().manual_seed(0)), dtype, device)

    def line_up() -> dict[str, Any]:
        cold, epsilon = _cold(inputs), torch.finfo(dtype).eps
        truth = [y.float() for y in _all(spec.reference(**inputs))]

        def enter(name: str) -> Any:
            found = _run(spec, name, device)
            if isinstance(found, str):
                return found
            run, backend = found
            with torch.no_grad(), use_backend(backend):
                ours = [y.float() for y in _all(run(**inputs))]
            torch.testing.assert_close(ours, truth, rtol=16 * epsilon, atol=16 * epsilon)
            return lambda: run(**next(cold)), backend

        return {name: enter(name) for name in PROVIDERS}

    race(f"{spec.name} {case.name} {dtype} forward", provider, line_up, rounds=15)
    _report_bandwidth(benchmark, spec.bytes_moved(inputs))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("spec", "case"), [p for p in _cases() if p.values[0].gradients])
def test_backward(race: Any, benchmark: Any, spec: OpSpec, case: Case, provider: str, device: str) -> None:
    inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32, device)

    def line_up() -> dict[str, Any]:
        leaves = [inputs[n].requires_grad_() for n in spec.gradients if isinstance(inputs.get(n), Tensor)]
        outputs = _all(spec.reference(**inputs))
        seeds = [torch.randn_like(y) for y in outputs]
        truth = torch.autograd.grad(outputs, leaves, seeds)

        def enter(name: str) -> Any:
            found = _run(spec, name, device)
            if isinstance(found, str):
                return found
            run, backend = found

            def once() -> tuple[Tensor, ...]:
                return torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)

            with use_backend(backend):
                outputs = _all(run(**inputs))
                for ours, true in zip(once(), truth, strict=True):
                    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
            return once, backend

        return {name: enter(name) for name in PROVIDERS}

    race(f"{spec.name} {case.name} float32 backward", provider, line_up, rounds=15)
    # the inputs and the gradient are read, the input's gradient is written
    _report_bandwidth(benchmark, spec.bytes_moved(inputs) * 3 // 2)


@pytest.mark.parametrize("provider", ["eager", "cpu", "cuda", "triton"])
@pytest.mark.parametrize(
    ("spec", "differentiated"),
    [pytest.param(spec, False, id=name) for name, spec in SPECS.items()]
    + [pytest.param(spec, True, id=f"{name}-differentiated") for name, spec in SPECS.items() if spec.gradients],
)
def test_host_overhead(race: Any, spec: OpSpec, differentiated: bool, provider: str, device: str) -> None:
    """The smallest call, alone and recorded for a backward pass: what is left is the host's time for an op."""
    case = next(c for c in spec.cases if c.name == "plain")
    inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32, device)
    for name in spec.gradients if differentiated else ():
        if isinstance(inputs.get(name), Tensor):
            inputs[name].requires_grad_()

    def enter(name: str) -> Any:
        found = _run(spec, name, device)
        return found if isinstance(found, str) else (partial(found[0], **inputs), found[1])

    names = ("eager", "cpu", "cuda", "triton")
    group = f"{spec.name} host overhead" + (", differentiated" if differentiated else "")
    race(group, provider, lambda: {n: enter(n) for n in names}, rounds=50, iterations=200, grad=differentiated)


def _report_bandwidth(benchmark: Any, moved: int) -> None:
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
