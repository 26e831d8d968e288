"""`kolors-fast bench`: whole pictures by kolors_fast, by pure PyTorch and by diffusers, in turns, on this machine.

The providers have the same weights and draw the same pictures, and must agree with pure PyTorch before anything is
timed. A step is the denoiser's prediction with guidance and the sampler's update, as a pipeline runs them: the time
from the end of the first step to the end of the last, divided by their number. The text encoders, ours or those of
transformers, are the same in every row.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import statistics
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .benchmark_models import CONFIGS, random_pipeline, random_text, system_of
from .benchmark_report import provenance, table
from .models.checkpoint import write_file
from .models.layers import store_convolutions
from .ops import use_backend
from .pipelines.load import load_pipeline
from .pipelines.pipeline import Pipeline
from .savings import SAVINGS, without

BASELINE = "pytorch"
PROVIDERS = (BASELINE, "kolors_fast", "kolors_fast_graphs", "diffusers", "diffusers_compile")
# how far pictures may be from pure PyTorch's: root mean square over the standard deviation of theirs. Rounding grows
# along a trajectory, in float32 on a GPU that of TF32; the bundled model ends at 3e-6, 4e-3 and 5e-2 on a CPU
AGREEMENT = {torch.float32: 0.03, torch.float16: 0.03, torch.bfloat16: 0.2}


@dataclass
class Provider:
    """A row of the table."""

    pipeline: Any
    weights: int  # bytes
    plain: bool  # our ops and savings are off meanwhile
    step_ms: list[float] = field(default_factory=list)  # of each round
    picture_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def draw(self, asked: dict[str, Any]) -> tuple[np.ndarray[Any, Any], float, float]:
        """The pictures, and the seconds of a step and of the whole."""
        ends: list[float] = []
        last = asked["num_inference_steps"] - 1

        def step_ended(row: int) -> dict[str, Any]:
            if row in (0, last):  # to wait at each would keep the host from running ahead
                _synchronise()
                ends.append(time.perf_counter())
            return {}

        # diffusers' PixArt pipelines have callbacks of an older kind only
        older = "callback" in inspect.signature(self.pipeline.__call__).parameters
        told: dict[str, Any] = (
            {"callback": lambda row, *_: step_ended(row)}
            if older
            else {"callback_on_step_end": lambda _pipeline, row, *_: step_ended(row)}
        )

        with ExitStack() as switches:
            switches.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if self.plain:
                switches.enter_context(use_backend("reference"))
                switches.enter_context(without(*SAVINGS))
            generator = torch.Generator().manual_seed(0)
            _synchronise()
            started = time.perf_counter()
            drawn = self.pipeline(**asked, generator=generator, output_type="np", **told)
            whole = time.perf_counter() - started  # NumPy's pictures are on the host
        return np.asarray(drawn.images, dtype=np.float64), (ends[1] - ends[0]) / last, whole


def bench(options: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON."""
    on_gpu, device, dtype = _checked(options)
    pipeline, asked = _pictures(options, device, dtype)
    chosen = {BASELINE, *options.providers, *(["diffusers_compile"] if options.compile else [])}
    entered = {name: _enter(name, pipeline, on_gpu) for name in PROVIDERS if name in chosen}
    providers = {name: entry for name, entry in entered.items() if isinstance(entry, Provider)}
    _, height, width, _ = _agree(providers, asked, dtype, on_gpu)
    for turn in range(1 + options.rounds):  # a virtual machine drifts: each has its turn in every round
        for provider in providers.values():
            _, step, whole = provider.draw(asked)
            if turn:  # the first warms up
                provider.step_ms.append(1e3 * step)
                provider.picture_s.append(whole)
    report = _report(options, f"{height}x{width}", device, dtype, entered)
    print(table(report))
    if options.output is not None:
        write_file(options.output, (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())


def _checked(options: argparse.Namespace) -> tuple[bool, torch.device, torch.dtype]:
    for name, least in (("steps", 2), ("batch", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.model is not None and options.config is not None:
        raise ValueError(f"--config: expected none together with --model, got {options.config!r}")
    if options.output is not None and not options.output.parent.is_dir():
        raise ValueError(f"--output: expected a name in an existing folder, got {str(options.output)!r}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu, for torch sees no CUDA device, got {options.device!r}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory is counted, and for whom is waited
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    if options.model is None and options.config is None:
        options.model, options.config = (None, "kolors") if device.type == "cuda" else ("kolors-tiny", None)
    return device.type == "cuda", device, dtype


def _pictures(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline that has not run, and the arguments of the pictures."""
    if options.config is None:
        pipeline = load_pipeline(options.model, torch_dtype=dtype, variant=options.variant, device=device)
        text: dict[str, Any] = {"prompt": [system_of(pipeline).prompt] * options.batch}
    else:
        pipeline = random_pipeline(*CONFIGS[options.config], device, dtype)
        text = random_text(pipeline, options.batch)
    return pipeline, {
        **text,
        **system_of(pipeline).asked,
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": 5.0,
    }


def _enter(name: str, pipeline: Pipeline, on_gpu: bool) -> Provider | str:
    """A provider with an own denoiser and autoencoder, whose layouts and caches are its own; or why it cannot run."""
    parts = pipeline.components
    if name == "kolors_fast_graphs" and not on_gpu:
        return "CUDA graphs need a CUDA device"
    if name.startswith("diffusers"):
        try:
            own: Any = _diffusers_pipeline(pipeline, compiled=name == "diffusers_compile")
        except (ImportError, RuntimeError) as error:  # the second where diffusers imports a part at its first use
            return f"cannot run: {str(error).strip().splitlines()[0]}"
    else:
        copied = {part: copy.deepcopy(parts[part]) for part in (pipeline.denoiser_name, "vae", "scheduler")}
        own = type(pipeline)(**parts | copied)
        if name == "kolors_fast_graphs":
            own.enable_cuda_graphs()
        if name == BASELINE:  # as plain code has them; anew in its first picture, they would count twice
            store_convolutions(own.denoiser, torch.contiguous_format)
    own.set_progress_bar_config(disable=True)
    models = (part for part in parts.values() if isinstance(part, nn.Module))
    weights = sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
    return Provider(own, weights, plain=not name.startswith("kolors_fast"))


def _diffusers_pipeline(pipeline: Pipeline, *, compiled: bool) -> Any:
    """diffusers' own pipeline, denoiser, autoencoder and scheduler, on the same weights."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    parts, theirs = pipeline.components, {}
    for name in (pipeline.denoiser_name, "vae"):
        model = parts[name]
        with model.device:
            kind = getattr(diffusers, model.diffusers_name or type(model).__name__)
            theirs[name] = kind.from_config(dict(model.config)).to(model.dtype).eval()
        theirs[name].load_state_dict(model.state_dict())
    if compiled:
        theirs[pipeline.denoiser_name] = torch.compile(theirs[pipeline.denoiser_name])
    scheduler = getattr(diffusers, type(parts["scheduler"]).__name__).from_config(dict(parts["scheduler"].config))
    return getattr(diffusers, pipeline.index_name)(**parts | theirs | {"scheduler": scheduler})


def _agree(providers: dict[str, Provider], asked: dict[str, Any], dtype: torch.dtype, on_gpu: bool) -> tuple[int, ...]:
    """Let each draw once, note its peak memory, and refuse to time any if one draws other pictures; their shape."""
    expected: np.ndarray[Any, Any] | None = None
    for name, provider in providers.items():
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            pictures, _, _ = provider.draw(asked)
            held = torch.cuda.max_memory_allocated() - before
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports itself on stderr
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                pictures, _, _ = provider.draw(asked)
            held = _peak(profiled)
        provider.peak_mb = (provider.weights + held) / 1e6
        expected = pictures if expected is None else expected
        error = float(np.sqrt(np.square(pictures - expected).mean()) / expected.std())
        if not error <= AGREEMENT[dtype]:
            raise RuntimeError(
                f"{name}: expected the pictures of pure PyTorch, got others ({error:.2g} of their standard deviation "
                f"away, allowed {AGREEMENT[dtype]}), so nothing was timed"
            )
    assert expected is not None
    return expected.shape


def _peak(profiled: profile) -> int:
    """The most bytes that torch's allocator held on the CPU besides what it held before."""
    held = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]  # it has run
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[union-attr]  # as above
            most = max(most, held)
    return most


def _report(
    options: argparse.Namespace, size: str, device: torch.device, dtype: torch.dtype, entered: dict[str, Provider | str]
) -> dict[str, Any]:
    baseline = entered[BASELINE]
    assert isinstance(baseline, Provider)
    rows: dict[str, Any] = {}
    for name, entry in entered.items():
        if isinstance(entry, str):
            rows[name] = {"missing": entry}
            continue
        ratios = [theirs / own for theirs, own in zip(baseline.step_ms, entry.step_ms, strict=True)]
        rows[name] = {
            "step_ms": entry.step_ms,
            "picture_s": entry.picture_s,
            "peak_mb": round(entry.peak_mb, 1),
            "times_as_fast": statistics.median(ratios),
        }
    memory = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "torch's CPU allocator, by torch.profiler"
    what = options.model or f"{options.config} with random weights"
    return {
        "pictures": f"{options.batch} of {size}, {options.steps} steps, guidance 5",
        "model": f"{what}, {str(dtype).removeprefix('torch.')} on {device.type}",
        "memory": f"weights and the most that the first picture held besides, of {memory}",
        **provenance(device),
        "providers": rows,
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
