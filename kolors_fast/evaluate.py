"""The command `kolors-fast evaluate`, by one process or, under torchrun, by several that each take their share."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .data.shapes import held_out_prompts
from .data.shapes.captions import LANGUAGES
from .data.shapes.split import CATEGORIES
from .drawing import check_folder, device_and_dtype, draw, load
from .evaluation.pictures import Measures, picture_files, read
from .evaluation.shapes import Report
from .evaluation.shapes import evaluate as judge
from .models.checkpoint import write_file
from .ops import use_backend
from .pipelines.prompts_file import Worker
from .training.parallel import World
from .training.validation import pipeline_validation_loss


def evaluate(options: argparse.Namespace) -> None:
    """Print what is asked for, and write it as JSON; of several workers the main one does."""
    _check(options)
    worker, world = Worker.from_environment(), World.join(device=options.device)
    options.device = str(world.device)
    if options.validation is not None:
        told = _validation(options, worker, world)
    elif options.pictures is not None:
        told = _folder(options, worker, world)
    else:
        told = _shapes_world(options, worker, world)
    world.leave()
    if world.is_main and options.output is not None:
        write_file(options.output, (json.dumps(told, ensure_ascii=False, indent=1) + "\n").encode())


def _check(options: argparse.Namespace) -> None:
    """Before hours of work: do the options go together, and can the results be written?"""
    for name in ("prompts", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    for output in (options.output, options.save_statistics):
        if output is not None:
            check_folder(output)
    if options.validation is not None:
        for name in ("features", "fid", "clip", "save_statistics", "pictures"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected none with --validation, which draws nothing, got one")
    elif (options.features is None) != (options.fid is None and options.save_statistics is None):
        raise ValueError("--features: expected together with --fid or --save-statistics, got one without the other")
    elif options.pictures is not None and options.features is None and options.clip is None:
        raise ValueError("--pictures: expected --features or --clip with it, got neither")


def _validation(options: argparse.Namespace, worker: Worker, world: World) -> dict[str, Any]:
    """The loss of precomputed features."""
    use_backend(options.backend)
    device, dtype = device_and_dtype(options)
    found = pipeline_validation_loss(
        options.model,
        options.validation,
        torch_dtype=dtype,
        variant=options.variant,
        device=device,
        batch=options.batch,
        seed=options.seed,
        rank=worker.rank,
        size=worker.count,
    )
    if world.is_main:
        print(found)
    return {"validation": asdict(found)}


def _folder(options: argparse.Namespace, worker: Worker, world: World) -> dict[str, Any]:
    """Measures of pictures that are there."""
    files, measures = picture_files(options.pictures), _measures(options, worker)
    measures.update(read(worker.share(files)))
    return {"measures": _tell(measures, options, world)}


def _shapes_world(options: argparse.Namespace, worker: Worker, world: World) -> dict[str, Any]:
    """The oracle's verdicts on what is drawn now, and measures of it."""
    measures, pipeline = _measures(options, worker), load(options)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], batch: int) -> list[Any]:
        return draw(pipeline, options, prompts, [options.batch * batch + i for i in range(len(prompts))])

    asked = held_out_prompts(options.prompts, options.seed)
    report = judge(
        generate,
        asked,
        batch_size=options.batch,
        seed=options.seed,
        progress=world.is_main,
        share=worker.share if worker.count > 1 else None,
    )
    measures.update((one.picture, one.asked.prompt) for one in report.judged if one.picture is not None)
    if world.is_main:
        print(report)
    figures = _tell(measures, options, world)
    return {**_table(report), **({"measures": figures} if figures else {}), "wrong": _wrong(report)}


def _table(report: Report) -> dict[str, Any]:
    groups = {"all": (None, None)} | {c: (c, None) for c in CATEGORIES} | {g: (None, g) for g in LANGUAGES}
    counts = {name: report.count(*group) for name, group in groups.items()}
    return {name: {"correct": right, "prompts": of} for name, (right, of) in counts.items()}


def _wrong(report: Report) -> list[dict[str, Any]]:
    return [{"prompt": one.asked.prompt, "reasons": one.verdict.reasons} for one in report.wrong]


def _measures(options: argparse.Namespace, worker: Worker) -> Measures:
    return Measures(
        options.features,
        options.fid,
        options.clip,
        device=options.device,
        batch=options.batch,
        share=worker.share,
    )


def _tell(measures: Measures, options: argparse.Namespace, world: World) -> dict[str, float]:
    """The measures over all workers, which all call this."""
    measures.all_reduce()
    figures = measures.figures()
    if world.is_main:
        for name, value in figures.items():
            print(f"{name}: {value:.6g}")
        if options.save_statistics is not None:
            measures.save(options.save_statistics)
    return figures
