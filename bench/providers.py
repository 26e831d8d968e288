"""What races of models share: the names of providers, one step by each of them, and that they must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from kolors_fast import without
from kolors_fast.ops import use_backend
from kolors_fast.savings import SAVINGS

PROVIDERS = ("diffusers", "diffusers_compile", "reference", "kolors_fast")
STEP_PROVIDERS = (*PROVIDERS[:2], "diffusers_max_autotune", "reference", "kolors_fast_graph", "kolors_fast")
TOLERANCE = {torch.float32: {"rtol": 1e-3, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.1, "atol": 0.1}}


def steps(
    rival: nn.Module,
    inputs: dict[str, Any],
    ours: Callable[[], Callable[[], Any]],
    savings: Iterable[str],
    device: str,
    dtype: torch.dtype,
    selected: set[str],
) -> dict[str, Any]:
    """One step by every provider, each on a model of its own: switching a saving off stores weights anew.

    Args:
        rival: diffusers' model, called with `inputs`.
        ours: makes a model with the same weights; what it returns takes a step.
        savings: each is left out by a provider.
        selected: the providers that are made.
    """

    def compiled(**options: Any) -> Callable[[], Any]:
        torch.compiler.reset()
        return lambda: partial(torch.compile(rival, **options), **inputs)

    calls: dict[str, Callable[[], Any]] = {
        "diffusers": lambda: partial(rival, **inputs),
        "diffusers_compile": compiled(),
        "diffusers_max_autotune": compiled(mode="max-autotune-no-cudagraphs" if device == "cpu" else "max-autotune"),
        "reference": lambda: without_savings(SAVINGS, ours()),
        "kolors_fast": ours,
        "kolors_fast_graph": lambda: captured(ours()),
        **{f"without {name}": partial(lambda n: without_savings([n], ours()), name) for name in savings},
    }
    if device == "cpu":
        del calls["kolors_fast_graph"]
    # diffusers has the weights, and is what the others are compared with
    chosen = {name: make() for name, make in calls.items() if name in selected or name == "diffusers"}
    agreed = agreeing(chosen, **TOLERANCE[dtype])
    return {name: provider for name, provider in agreed.items() if name in selected}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph."""
    with torch.no_grad():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

    def replay(_owner_of_what_the_graph_reads: Callable[[], Any] = call) -> Any:
        graph.replay()
        return result

    return replay


def without_savings(names: Iterable[str], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with without(*names):
            return call()

    return run


def agreeing(calls: dict[str, Callable[[], Any]], **tolerance: float) -> dict[str, Any]:
    """The providers of a race, if the outputs of each are the first provider's."""
    providers = {name: (call, "reference" if name == "reference" else None) for name, call in calls.items()}
    first = None
    for call, backend in providers.values():
        with torch.no_grad(), use_backend(backend):
            outputs = [output.float() for output in call()]
        first = outputs if first is None else first
        torch.testing.assert_close(outputs, first, **tolerance)
    return providers
