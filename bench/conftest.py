"""Providers that take turns, provenance for every row, and the device at hand."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kolors_fast
from kolors_fast.ops import _backends, use_backend

sys.path.insert(0, os.path.dirname(__file__))  # peers.py, which importmode=importlib does not find

# glibc's M_MMAP_MAX and M_TRIM_THRESHOLD: freed memory stays with the process, as it does with PyTorch's allocator on a
# GPU. Else a result of 42 MB is fresh pages in some calls and old ones in others: 17 or 5 ms for the same kernel.
for parameter, value in ((-4, 0), (-1, -1)):
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, value)

if torch.cuda.is_available():
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured

# what a provider calls and the backend that is forced meanwhile; or why it cannot run
Provider = tuple[Callable[[], Any], str | None] | str
SELECTED: set[str] = set()  # providers that this run asks for: the others are not even built


def pytest_collection_finish(session: pytest.Session) -> None:
    SELECTED.update(item.callspec.params.get("provider", "") for item in session.items if hasattr(item, "callspec"))


class Clock:
    """A timer that moves only when it is told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()
WARMUP = 3
CALLS_IN_GRAPH = 20
_PEAK: dict[str, int] = {}  # provider -> bytes, of the last group
_CAPTURED: dict[str, bool] = {}  # provider -> whether its calls were one CUDA graph, of the last group
_LAST: dict[str, dict[str, list[float] | str]] = {}  # group -> provider -> seconds of each round, or why it cannot run


def take_turns(
    providers: dict[str, Provider], rounds: int, iterations: int, grad: bool, graph: bool, warmup: int = WARMUP
) -> dict[str, list[float] | str]:
    """Seconds of a call, averaged over `iterations`, for each round of each provider.

    In every round each provider has its turn. One after the other, a virtual machine that is a third slower for some
    minutes made a UNet step lose by 18 % that wins by 6 % in turns.

    Args:
        graph: on a GPU, time a CUDA graph of several calls: else a kernel of some microseconds is timed by its launch.
    """
    here = {name: provider for name, provider in providers.items() if not isinstance(provider, str)}
    times: dict[str, list[float]] = {name: [] for name in here}
    with torch.set_grad_enabled(grad):
        clocks = {}
        for name, (call, backend) in here.items():
            with use_backend(backend):
                on_gpu = graph and torch.cuda.is_available()
                clocks[name] = _gpu_clock(name, call) if on_gpu else partial(_wall_clock, call, iterations)
        for _ in range(warmup + rounds):
            for name, (_, backend) in here.items():
                with use_backend(backend):
                    times[name].append(clocks[name]())
    reasons = {name: provider for name, provider in providers.items() if isinstance(provider, str)}
    return {**reasons, **{name: seconds[warmup:] for name, seconds in times.items()}}


def _wall_clock(call: Callable[[], Any], iterations: int) -> float:
    _synchronise()
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    _synchronise()
    return (time.perf_counter() - start) / iterations


def _gpu_clock(name: str, call: Callable[[], Any]) -> Callable[[], float]:
    """What runs CALLS_IN_GRAPH calls, as one graph unless something in them cannot be captured, and times the GPU."""

    def run() -> None:
        for _ in range(CALLS_IN_GRAPH):
            call()

    run()  # what is compiled or loaded at the first call cannot be captured
    captured, play = torch.cuda.CUDAGraph(), run
    try:
        # a backward pass runs on the stream of its forward pass: all of this process is on the one that is captured
        with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
            run()
        play = captured.replay
    except RuntimeError:
        torch.cuda.synchronize()
    _CAPTURED[name] = play is not run
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        start.record()
        play()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / CALLS_IN_GRAPH

    return seconds


def peak_bytes(call: Callable[[], Any], backend: str | None, grad: bool = False) -> int:
    """The most memory that one call holds besides its inputs, its result included."""
    with torch.set_grad_enabled(grad), use_backend(backend):
        call()
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = call()
        del result
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Report one provider of a group; the first one asked for runs the group."""

    def report(
        group: str,
        provider: str,
        line_up: Callable[[], dict[str, Provider | Callable[[], Provider]]],
        rounds: int,
        iterations: int = 1,
        grad: bool = False,
        memory: bool = False,
        graph: bool = False,
        warmup: int = WARMUP,
    ) -> None:
        if group not in _LAST:
            _LAST.clear()
            _PEAK.clear()
            _CAPTURED.clear()
            entered: dict[str, Provider] = {}
            for name, entry in line_up().items():
                if not callable(entry):
                    entered[name] = entry
                elif name in SELECTED:
                    entered[name] = entry()
            if memory:
                _PEAK.update({n: peak_bytes(*e, grad) for n, e in entered.items() if not isinstance(e, str)})
            _LAST[group] = take_turns(entered, rounds, iterations, grad, graph, warmup)
        times = _LAST[group][provider]
        if isinstance(times, str):
            pytest.skip(times)  # the reason why it cannot run
        replay = iter(times)
        benchmark.group, benchmark.name = group, provider
        first = next(seconds for seconds in _LAST[group].values() if not isinstance(seconds, str))
        # over the group's first provider, round by round
        speedup = statistics.median(theirs / ours for theirs, ours in zip(first, times, strict=True))
        benchmark.extra_info["speedup"] = round(speedup, 3)
        if provider in _PEAK:
            benchmark.extra_info["peak MB"] = round(_PEAK[provider] / 1e6, 3)
        if provider in _CAPTURED:
            benchmark.extra_info["CUDA graph"] = _CAPTURED[provider]
        benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(replay),), {}), rounds=len(times))

    return report


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["kolors_fast"] = kolors_fast.__version__
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["backends"] = {name: _backends.unavailable(name) or "available" for name in _backends.BACKENDS}
    machine_info["command"] = " ".join(["pytest", *config.invocation_params.args])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Leave out what nobody reads: each round's time, parameters that are printed Python objects, options of a timer
    that does not run. `name` and `group` say which row it is."""
    for row in output_json["benchmarks"]:
        for field in ("params", "param", "fullname", "options"):
            row.pop(field, None)
        row["stats"] = {
            name: row["stats"][name] for name in ("rounds", "min", "median", "mean", "max", "iqr", "stddev")
        }


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ.get("KOLORS_FAST_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def selected() -> set[str]:
    """The providers that this run asks for."""
    return SELECTED


@pytest.fixture(scope="session")
def roof(device: str) -> Callable[[torch.dtype], tuple[float, float]]:
    """dtype -> bytes copied (read and written) and operations of a matrix product, each a second, measured here."""

    def best(call: Callable[[], Any], rounds: int) -> float:
        times = []
        for _ in range(rounds):
            _synchronise()
            start = time.perf_counter()
            call()
            _synchronise()
            times.append(time.perf_counter() - start)
        return min(times[2:])

    size = 1 << (28 if device == "cuda" else 26)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(partial(target.copy_, source), 12)

    @cache
    def of(dtype: torch.dtype) -> tuple[float, float]:
        side = 8192 if device == "cuda" else 1024
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return bandwidth, 2 * side**3 / best(lambda: a @ b, 12)

    return of
