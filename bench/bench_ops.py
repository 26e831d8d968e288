"""Every op on its models' real shapes: eager PyTorch, torch.compile, and each backend at hand, side by side.

    pytest bench/bench_ops.py --benchmark-only

Peers (bench/peers.py) join where they are installed. A provider is compared with the reference before it is timed; a
wrong one is never timed. Providers take turns. Inputs rotate through copies larger than the last-level cache, so that
nobody times a cache. `GB/s` counts each tensor once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peers import PEERS
from torch import Tensor

from kolors_fast.ops import SPECS, OpSpec, _backends, use_backend
from kolors_fast.ops._spec import Case, Inputs, cast, map_tensors, tensors

COLD_BYTES = 256 * 2**20
# a GPU's users compute in bf16; on a CPU fp32 is as common, and torch's own backward passes are made for it
DTYPES = [torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.bfloat16]
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
    "kolors_512_2x256x1280_to_5120",
    "chatglm_1x256x27392",
    "chatglm_1x256x4096",
    "sd35_2x4096x24x64",
    "kolors_self_2x1024x20x64",
    "kolors_cross_2x1024x20x64",
    "sd35_2x1024+333x24x64",
    "sd35_attention_alone_2x1357x24x64",
)


def _providers(spec: OpSpec) -> tuple[str, ...]:
    return (*PROVIDERS, *PEERS.get(spec.name, ()))


def _entries(gradients: bool = False) -> list[Any]:
    """Every (spec, case, provider)."""
    everywhere = torch.cuda.is_available()
    return [
        pytest.param(spec, case, provider, id=f"{spec.name}-{case.name}-{provider}")
        for spec in SPECS.values()
        for case in spec.cases
        for provider in _providers(spec)
        if case.model and (everywhere or case.name in ON_CPU) and (spec.gradients or not gradients)
    ]


def _run(spec: OpSpec, name: str, device: str) -> tuple[Callable[..., Any], str | None] | str:
    """What is called and the backend that is forced meanwhile, or why the provider cannot run here."""
    if name == "eager":
        return spec.eager, None
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(spec.eager, dynamic=False), None
    if name in PEERS.get(spec.name, ()):
        return PEERS[spec.name][name], None
    reason = _backends.unavailable(name)
    if reason is None and name == "triton" and device == "cpu":
        reason = "the Triton interpreter is for tests"
    if reason is None and (name == "cpu") != (device == "cpu"):
        reason = f"runs on {name} tensors, benchmarking {device}"
    if reason is None and name not in spec.columns:
        reason = "the op has no such column"
    return reason or (spec.function, name)


def _judged(spec: OpSpec, name: str, gate: Callable[[], None]) -> str | None:
    """Why a provider is not timed: a peer may lack, decline or err; what is ours must not."""
    if name not in PEERS.get(spec.name, ()):
        gate()
        return None
    try:
        gate()
    except (ImportError, NotImplementedError, RuntimeError, AssertionError) as error:
        return f"{name}: {str(error).strip().splitlines()[0]}"
    return None


def _all(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cold(inputs: Inputs) -> itertools.cycle[Inputs]:
    size = sum(t.numel() * t.element_size() for value in inputs.values() for t in tensors(value))
    copies = min(64, max(2, COLD_BYTES // max(size, 1)))
    clones = [{k: map_tensors(v, Tensor.clone) for k, v in inputs.items()} for _ in range(copies)]
    return itertools.cycle(clones)


@pytest.mark.parametrize(("spec", "case", "provider"), _entries())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(
    race: Any, benchmark: Any, roof: Any, spec: OpSpec, case: Case, dtype: torch.dtype, provider: str, device: str
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

            def gate() -> None:
                with torch.no_grad(), use_backend(backend):
                    ours = [y.float() for y in _all(run(**inputs))]
                torch.testing.assert_close(ours, truth, rtol=16 * epsilon, atol=16 * epsilon)

            return _judged(spec, name, gate) or (lambda: run(**next(cold)), backend)

        return {name: partial(enter, name) for name in _providers(spec)}

    race(f"{spec.name} {case.name} {dtype} forward", provider, line_up, rounds=15, memory=True, graph=True)
    _report(benchmark, roof, spec.bytes_moved(inputs), spec.flops(inputs), dtype)


@pytest.mark.parametrize(("spec", "case", "provider"), _entries(gradients=True))
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_backward(
    race: Any, benchmark: Any, roof: Any, spec: OpSpec, case: Case, dtype: torch.dtype, provider: str, device: str
) -> None:
    inputs = cast(case.make(torch.Generator().manual_seed(0)), dtype, device)
    slack = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps

    def line_up() -> dict[str, Any]:
        leaves = [t.requires_grad_() for n in spec.gradients for t in tensors(inputs.get(n))]
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
                outputs: tuple[Tensor, ...] = ()

                def gate() -> None:
                    nonlocal outputs
                    outputs = _all(run(**inputs))
                    for ours, true in zip(once(), truth, strict=True):
                        torch.testing.assert_close(ours, true, rtol=slack, atol=slack * true.abs().max().item())

                return _judged(spec, name, gate) or (once, backend)

        return {name: partial(enter, name) for name in _providers(spec)}

    race(f"{spec.name} {case.name} {dtype} backward", provider, line_up, rounds=15, graph=True)
    # the inputs and the gradient are read, the input's gradient is written; twice the forward pass' arithmetic
    _report(benchmark, roof, spec.bytes_moved(inputs) * 3 // 2, 2 * spec.flops(inputs), dtype)


@pytest.mark.parametrize("provider", ["eager", "cpu", "cuda", "triton"])
@pytest.mark.parametrize(
    ("spec", "differentiated"),
    [pytest.param(spec, False, id=name) for name, spec in SPECS.items()]
    + [pytest.param(spec, True, id=f"{name}-differentiated") for name, spec in SPECS.items() if spec.gradients],
)
def test_host_overhead(
    race: Any, benchmark: Any, spec: OpSpec, differentiated: bool, provider: str, device: str
) -> None:
    """The smallest call, alone and recorded for a backward pass: what is left is the host's time for an op.

    `us in kernel` is the part that the extension's own functions take: the rest is above the kernel.
    """
    case = next(c for c in spec.cases if c.name == "plain")
    inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32, device)
    for name in spec.gradients if differentiated else ():
        for leaf in tensors(inputs.get(name)):
            leaf.requires_grad_()

    def enter(name: str) -> Any:
        found = _run(spec, name, device)
        return found if isinstance(found, str) else (partial(found[0], **inputs), found[1])

    names = ("eager", "cpu", "cuda", "triton")
    group = f"{spec.name} host overhead" + (", differentiated" if differentiated else "")
    race(group, provider, lambda: {n: partial(enter, n) for n in names}, rounds=50, iterations=200, grad=differentiated)
    if provider in ("cpu", "cuda"):
        call, backend = enter(provider)
        with torch.set_grad_enabled(differentiated), use_backend(backend):
            benchmark.extra_info["us in kernel"] = round(1e6 * _seconds_in_extension(call, backend), 2)


def _seconds_in_extension(call: Callable[[], Any], name: str, calls: int = 2000) -> float:
    """Of one call, in the functions of kolors_fast._<name>."""
    extension, seconds = _backends.extension, 0.0

    class Watched:
        def __getattr__(self, function: str) -> Callable[..., Any]:
            run = getattr(extension(name), function)

            def timed(*args: Any) -> Any:
                nonlocal seconds
                start = time.perf_counter()
                result = run(*args)
                seconds += time.perf_counter() - start
                return result

            return timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "extension", lambda _: Watched())
        for _ in range(calls):
            call()
    return seconds / calls


def _report(benchmark: Any, roof: Any, moved: int, flops: int, dtype: torch.dtype) -> None:
    """What is moved a second, and the share of what this machine could do at best: the least time that its measured
    copy and matrix product allow, over the time taken."""
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        bandwidth, arithmetic = roof(dtype)
        benchmark.extra_info["GB/s"] = round(moved / seconds / 1e9, 2)
        benchmark.extra_info["roofline"] = round(max(moved / bandwidth, flops / arithmetic) / seconds, 3)
