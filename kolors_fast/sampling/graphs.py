"""Denoising steps captured as CUDA graphs and replayed: about two thousand launches of a UNet's step become one.

A graph holds one step and reads everything that changes from tensors that stay where they are: the sample, the row, the
table's coefficients, guidance weights, noise, and what the model is conditioned on. So one graph serves all steps of a
run, all prompts and all schedules of one shape, the host never waits, and callbacks run between replays. What was baked
into it (addresses and structure of the model's weights, strengths of LoRA layers, switches) is looked at before each
replay; a change means another capture, which takes as long as two steps, not a compilation.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import savings
from ..models.layers import PEFT_STATE
from ..ops._backends import forced
from ..schedulers import StepTable

logger = logging.getLogger(__name__)

WARM_UPS = 2  # runs before a capture: what is compiled, loaded or chosen at the first call cannot be captured


class Plan(Protocol):
    """What a model is conditioned on, at every step of a run."""

    def signature(self) -> Hashable:
        """All that decides whether `load` fits: shapes, dtypes, structure."""

    def fixed(self) -> Any:
        """A copy in memory of its own."""

    def load(self, other: Any) -> None:
        """Take over the values of a plan with the same signature."""

    def at(self, row: int | Tensor) -> Any:
        """The conditioning of one step; a row int64 [1] on the device is not read by the host."""


Predict = Callable[[Tensor, Any], Tensor]  # (inputs [P*B, ...], conditioning) -> predictions [P*B, ...]


class Program:
    """One step on tensors that stay where they are."""

    def __init__(self, predict: Predict, plan: Plan, table: StepTable, sample: Tensor, weights: Tensor) -> None:
        device = sample.device
        self.predict, self.table = predict, table
        self.plan, self._loaded = plan.fixed(), plan
        self.sample = sample.clone()
        self.denoised = torch.zeros_like(sample)
        self.previous = torch.zeros_like(sample) if table.uses_previous else None
        self.noise = torch.zeros_like(sample) if any(table.needs_noise) else None
        self.weights = torch.zeros_like(weights)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.coefficients = table.coefficients_on(device).clone()
        self.input_scale = torch.tensor(table.input_scale, device=device)
        self.replay: Callable[[], None] = self.run
        self.bytes = 0

    def run(self) -> None:
        scale = self.input_scale.index_select(0, self.row)
        scaled = (self.sample.float() * scale).to(self.sample.dtype)
        inputs = torch.cat([scaled] * len(self.weights))
        after, denoised = self.table.advance_from(
            self.coefficients, self.row, self.sample, self.predict(inputs, self.plan.at(self.row)), self.weights,
            previous=self.previous, noise=self.noise,
        )  # fmt: skip
        self.sample.copy_(after)
        self.denoised.copy_(denoised)

    def load(
        self, plan: Plan, table: StepTable, row: int, sample: Tensor, weights: Tensor,
        previous: Tensor | None, noise: Tensor | None,
    ) -> None:  # fmt: skip
        """Copy what differs from the step before."""
        if plan is not self._loaded:
            self.plan.load(plan)
            self._loaded = plan
        if table is not self.table:
            self.coefficients.copy_(table.coefficients_on(sample.device))
            self.input_scale.copy_(torch.tensor(table.input_scale))
            self.table = table
        self.row.fill_(row)
        self.sample.copy_(sample)
        self.weights.copy_(weights)
        for own, given in ((self.previous, previous), (self.noise, noise)):
            if own is not None:
                own.zero_() if given is None else own.copy_(given)


class StepGraphs:
    """The graphs of one model.

    Args:
        model: whose weights and switches a graph depends on.
        keep: graphs kept, the least recently used one goes first. Each holds the memory that one step takes; all
            share it.
        record: what makes a replay of a program; the default captures a CUDA graph.

    Raises:
        ValueError: the model is not on a CUDA device.
    """

    def __init__(
        self, model: nn.Module, *, keep: int = 4, record: Callable[[Program], Callable[[], None]] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"graphs: keep: expected at least 1, got {keep}")
        self.model, self.keep = model, keep
        self._record = record or self._capture
        self._captures = record is None
        self._pool: Any = None
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def step(
        self, predict: Predict, plan: Plan, table: StepTable, row: int, sample: Tensor, weights: Tensor,
        previous: Tensor | None, noise: Tensor | None, kind: Hashable = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Row `row` of `table` from `sample`: (next, denoised), tensors that the next step overwrites.

        `kind` is whatever else decides what `predict` does.
        """
        if self._captures and sample.device.type != "cuda":
            raise ValueError(f"graphs: expected a model on a CUDA device, got one on {sample.device}")
        key = self._key(plan, table, sample, weights, kind)
        program = self._programs.get(key)
        if program is None:
            program = Program(predict, plan, table, sample, weights)
            program.load(plan, table, row, sample, weights, previous, noise)
            program.replay = self._record(program)
            # anew, for a model's first run may have joined weights, which moves them
            key = self._key(plan, table, sample, weights, kind)
            self._programs[key] = program
            while len(self._programs) > self.keep:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        program.load(plan, table, row, sample, weights, previous, noise)
        program.replay()
        return program.sample, program.denoised

    def __len__(self) -> int:
        return len(self._programs)

    def _key(self, plan: Plan, table: StepTable, sample: Tensor, weights: Tensor, kind: Hashable) -> Hashable:
        return (
            tuple(sample.shape), sample.dtype, sample.device, tuple(weights.shape), plan.signature(),
            table.coefficients.shape, table.uses_previous, table.clip, any(table.needs_noise), kind,
            _baked(self.model),
        )  # fmt: skip

    def _capture(self, program: Program) -> Callable[[], None]:
        before = torch.cuda.memory_reserved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                program.run()
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            program.run()
        program.bytes = torch.cuda.memory_reserved() - before
        shape = "x".join(map(str, program.sample.shape))
        logger.info("captured a step of %s, which took %.0f MiB more", shape, program.bytes / 2**20)
        return graph.replay


def _baked(model: nn.Module) -> Hashable:
    """What a graph of the model holds for good. Asked at every step, so `model.modules()` would be too slow."""
    addresses: list[int] = []
    strengths: list[str] = []
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is None:
            continue
        modules += module._modules.values()
        addresses += [0 if tensor is None else tensor.data_ptr() for tensor in module._parameters.values()]
        if "scaling" in module.__dict__:
            strengths.append(repr([getattr(module, name, None) for name in PEFT_STATE]))
    return tuple(addresses), tuple(strengths), savings.switched_off(), forced()
