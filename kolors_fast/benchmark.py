"""`kolors-fast bench`: whole pictures by kolors_fast, by pure PyTorch and by diffusers, in turns, on this machine.

The providers have the same weights and draw the same pictures, and must agree with pure PyTorch before anything is
timed. A step is the UNet's prediction with guidance and the sampler's update, as a pipeline runs them: the time from
the end of the first step to the end of the last, divided by their number. The text encoder is ours in every row.
"""

from __future__ import annotations

import argparse
import copy
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
from torch.profiler import ProfilerActivity, profile

from .assets import bundled
from .benchmark_report import provenance, table
from .models.autoencoder_kl import AutoencoderKL
from .models.chatglm import ChatGLM
from .models.chatglm_tokenizer import ChatGLMTokenizer
from .models.checkpoint import write_file
from .models.layers import store_convolutions
from .models.unet import KolorsUNet
from .ops import use_backend
from .pipelines.kolors import KolorsPipeline
from .savings import SAVINGS, without
from .schedulers import EulerDiscreteScheduler

BASELINE = "pytorch"
PROVIDERS = (BASELINE, "kolors_fast", "kolors_fast_graphs", "diffusers", "diffusers_compile")
PROMPT = "红色圆形在蓝色方块左边"
TOKENS, REAL_TOKENS = 256, 20  # of random text
KOLORS_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}
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

        def step_ended(_pipeline: Any, row: int, *_: Any) -> dict[str, Any]:
            if row in (0, last):  # to wait at each would keep the host from running ahead
                _synchronise()
                ends.append(time.perf_counter())
            return {}

        with ExitStack() as switches:
            switches.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if self.plain:
                switches.enter_context(use_backend("reference"))
                switches.enter_context(without(*SAVINGS))
            generator = torch.Generator().manual_seed(0)
            _synchronise()
            started = time.perf_counter()
            drawn = self.pipeline(**asked, generator=generator, output_type="np", callback_on_step_end=step_ended)
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


def _pictures(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[KolorsPipeline, dict[str, Any]]:
    """A pipeline that has not run, and the arguments of the pictures."""
    if options.config is None:
        pipeline = KolorsPipeline.from_pretrained(
            options.model, torch_dtype=dtype, variant=options.variant, device=device
        )
        asked: dict[str, Any] = {"prompt": [PROMPT] * options.batch}
    else:
        pipeline = random_pipeline({}, KOLORS_VAE, device, dtype)
        asked = random_text(pipeline.unet, options.batch)
    return pipeline, asked | {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": 5.0,
    }


def random_pipeline(
    unet: dict[str, Any], vae: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> KolorsPipeline:
    """UNet ({}: Kolors') and autoencoder with random weights, and a text encoder that nobody asks."""
    torch.manual_seed(0)
    with device:
        models = {
            "unet": KolorsUNet(**unet).to(dtype).eval(),
            "vae": AutoencoderKL(**vae).to(dtype).eval(),
            "text_encoder": ChatGLM(num_layers=1, padded_vocab_size=8, hidden_size=8, ffn_hidden_size=8).to(dtype),
        }
    tokenizer = ChatGLMTokenizer.from_pretrained(bundled("kolors-tiny"), subfolder="tokenizer")
    scheduler = EulerDiscreteScheduler.from_pretrained(bundled("kolors-tiny"), subfolder="scheduler")
    return KolorsPipeline(**models, tokenizer=tokenizer, scheduler=scheduler)  # type: ignore[arg-type]  # by name


def random_text(unet: KolorsUNet, batch: int) -> dict[str, Any]:
    """Features of prompts and of their negatives: pads, which are equal, then the states of real tokens."""
    config, asked = unet.config, {}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    for prefix in ("", "negative_"):
        states = torch.randn(batch, TOKENS, config.encoder_hid_dim)
        states[:, : TOKENS - REAL_TOKENS] = states[:, :1]
        asked[f"{prefix}prompt_embeds"] = states.to(unet.device, unet.dtype)
        asked[f"{prefix}pooled_prompt_embeds"] = torch.randn(batch, pooled).to(unet.device, unet.dtype)
    return asked


def _enter(name: str, pipeline: KolorsPipeline, on_gpu: bool) -> Provider | str:
    """A provider with an own UNet and autoencoder, whose layouts and caches are its own; or why it cannot run."""
    parts = pipeline.components
    if name == "kolors_fast_graphs" and not on_gpu:
        return "CUDA graphs need a CUDA device"
    if name.startswith("diffusers"):
        try:
            own = _diffusers_pipeline(parts, compiled=name == "diffusers_compile")
        except (ImportError, RuntimeError) as error:  # the second where diffusers imports a part at its first use
            return f"cannot run: {str(error).strip().splitlines()[0]}"
    else:
        own = KolorsPipeline(**parts | {part: copy.deepcopy(parts[part]) for part in ("unet", "vae", "scheduler")})
        if name == "kolors_fast_graphs":
            own.enable_cuda_graphs()
        if name == BASELINE:  # as plain code has them; anew in its first picture, they would count twice
            store_convolutions(own.unet, torch.contiguous_format)
    own.set_progress_bar_config(disable=True)
    models = (parts[part] for part in ("unet", "vae", "text_encoder"))
    weights = sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
    return Provider(own, weights, plain=not name.startswith("kolors_fast"))


def _diffusers_pipeline(parts: dict[str, Any], *, compiled: bool) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    theirs = {}
    for part, kind in kinds.items():
        with parts[part].device:
            theirs[part] = kind.from_config(dict(parts[part].config)).to(parts[part].dtype).eval()
        theirs[part].load_state_dict(parts[part].state_dict())
    if compiled:
        theirs["unet"] = torch.compile(theirs["unet"])
    scheduler = getattr(diffusers, type(parts["scheduler"]).__name__).from_config(dict(parts["scheduler"].config))
    return diffusers.KolorsPipeline(**parts | theirs | {"scheduler": scheduler})


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
