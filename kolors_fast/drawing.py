"""The pipeline that a command's options ask for, and the pictures that it draws."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def load(options: argparse.Namespace, pictures: int = 1) -> Any:
    """The pipeline, under a memory limit the one that can draw so many pictures in one call."""
    from .ops import use_backend
    from .pipelines.load import pipeline_class

    device, dtype = device_and_dtype(options)
    if options.cuda_graphs and not device.startswith("cuda"):
        raise ValueError(f"--cuda-graphs: expected a CUDA device, got {device!r}")
    use_backend(options.backend)
    kind = pipeline_class(options.model)
    own = _kolors_options(options, kind, dtype, device, pictures)
    pipeline = kind.from_pretrained(options.model, torch_dtype=dtype, variant=options.variant, device=device, **own)
    if options.cuda_graphs:
        import logging

        logging.basicConfig(format="kolors-fast: %(message)s")
        logging.getLogger(__package__).setLevel(logging.INFO)  # tells what each graph costs in memory
        pipeline.enable_cuda_graphs()
    return pipeline


def device_and_dtype(options: argparse.Namespace) -> tuple[str, Any]:
    """As asked for, else CUDA where there is some, and there float16."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu, for torch sees no CUDA device, got {device!r}")
    return device, getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))


def _kolors_options(options: argparse.Namespace, kind: Any, dtype: Any, device: str, pictures: int) -> dict[str, Any]:
    """What `from_pretrained` takes for Kolors alone; printed is the plan of a memory limit."""
    from .pipelines.folder import load_configs
    from .pipelines.kolors import KolorsPipeline
    from .pipelines.memory import plan_memory

    limit, bits = getattr(options, "memory_limit", None), options.text_encoder_quantization
    if not issubclass(kind, KolorsPipeline):
        for name, value in (("memory-limit", limit), ("text-encoder-quantization", bits)):
            if value is not None:
                raise ValueError(f"--{name}: expected none with a {kind.index_name}, which has no such, got {value!r}")
        return {}
    if limit is None:
        return {"text_encoder_quantization": bits}
    if options.compare_reference:
        raise ValueError("--memory-limit: expected none with --compare-reference, which takes more memory")
    plan = plan_memory(
        limit,
        load_configs(options.model, kind.parts),
        height=options.height,
        width=options.width,
        pictures=pictures,
        dtype=dtype,
        device=device,
        quantization=bits,
    )
    print(plan)
    return {"text_encoder_quantization": bits, "memory_limit": plan}


def draw(pipeline: Any, options: argparse.Namespace, prompts: list[str], seeds: list[int]) -> list[Any]:
    """One picture per prompt, its noise from its own seed, so that a picture does not depend on its neighbours."""
    import torch

    negative = None if options.negative_prompt is None else [options.negative_prompt] * len(prompts)
    images: list[Any] = pipeline(
        prompts,
        negative_prompt=negative,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **pipeline.typed,
    ).images
    return images


def check_folder(output: Path) -> None:
    """Before hours of work: can the result be written at all?"""
    if not output.parent.is_dir():
        raise ValueError(f"--output: expected a name in an existing folder, got {str(output)!r}")
