"""The command `kolors-fast`: generate | evaluate | bench | precompute | train | info.

Every failure that a user can cause is one sentence on stderr and exit status 1 (2 for a wrong command line).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import check_folder, draw, load


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"kolors-fast: warning: {message}", file=sys.stderr)
            return int(options.run(options) or 0)
    except KeyboardInterrupt as stopped:
        print(f"kolors-fast: interrupted{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        # the library states what is wrong in one sentence; of anything longer the first line is the statement
        print(f"kolors-fast: {str(error).strip().splitlines()[0] if str(error) else repr(error)}", file=sys.stderr)
        return 1


_MANY_PROMPTS = """
FILE has one prompt a line (blank lines and those starting with # are skipped) or, if it ends in .jsonl, one JSON
object a line: prompt, and optionally negative_prompt, seed, guidance_scale, height, width, steps and output (a name
ending in .png); options stand for what a line does not say. Pictures are LINE-SEED.png, written when their batch is
done, with their parameters (the model's options among them) inside. A rerun keeps a picture that is there with the
same parameters, and refuses one with others unless told to --overwrite. A line that fails is told with its number, the
rest go on, and the exit status is 1. By torchrun each worker draws its share of the pictures on its own GPU.
"""

_EVALUATE = """
Draws held-out prompts of the shapes world and lets its oracle judge the pictures. By torchrun each worker takes its
share: of the batches of pictures here, of the files or samples below. The first one prints and writes the whole.
"""

_MEASURES = """
Beside the oracle's verdicts: the Frechet distance (FID, where SPEC is Inception) of the pictures to a REFERENCE, and
the CLIP-score of pictures and prompts. SPEC is given uint8 pictures [B, 3, H, W] and returns features [B, D]. Pictures
of a FOLDER are measured alone, with the prompts that generate put into them.
"""

_VALIDATION = """
The loss of any model on a folder that precompute made with its autoencoder and text encoders; nothing is drawn. It is
taken at eight equidistant times, which weigh the same, and of one --seed always with the same noise, so that two
checkpoints can be compared.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kolors-fast", description="Kolors-class text-to-image models, fused.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw pictures of prompts")
    generate.set_defaults(run=_generate, refuse=generate.error)
    generate.add_argument("prompt", nargs="*", help="what to draw, in English or Chinese")
    generate.add_argument("-o", "--output", type=Path, help="default: out.png; the folder of --prompts-file's pictures")
    generate.add_argument("--grid", action="store_true", help="put all pictures into one file")
    generate.add_argument("--seed", type=int, nargs="+", default=[0], help="one picture per prompt and seed")
    generate.add_argument("--memory-limit", help="such as 8GiB: choose what is in memory when, and print the plan")
    generate.add_argument("--compare-reference", action="store_true", help="draw again in pure PyTorch and compare")
    generate.add_argument("--nvtx", action="store_true", help="NVTX ranges around steps, blocks and ops, for nsys")
    many = generate.add_argument_group("many prompts", _MANY_PROMPTS)
    many.add_argument("--prompts-file", metavar="FILE", help="draw what each line asks for; - reads stdin")
    many.add_argument("--batch", type=int, help="pictures at once, halved when memory is out; default: 4")
    many.add_argument("--overwrite", action="store_true", help="draw again a picture there with other parameters")
    _add_sampling(generate)

    evaluate = commands.add_parser("evaluate", help="judge a model, by pictures or by its loss", description=_EVALUATE)
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("-n", "--prompts", type=int, default=200, help="how many, half of them Chinese")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--batch", type=int, default=20)
    evaluate.add_argument("-o", "--output", type=Path, help="also write the report as JSON")
    measures = evaluate.add_argument_group("other measures", _MEASURES)
    measures.add_argument("--features", metavar="SPEC", help="a TorchScript file, or module.path:callable")
    measures.add_argument("--fid", type=Path, metavar="REFERENCE", help="folder of pictures, or saved statistics")
    measures.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIPModel with tokenizer and processor")
    measures.add_argument("--save-statistics", type=Path, metavar="FILE.safetensors", help="to be a REFERENCE later")
    measures.add_argument("--pictures", type=Path, metavar="FOLDER", help="of these, and draw none")
    loss = evaluate.add_argument_group("validation loss", _VALIDATION)
    loss.add_argument("--validation", type=Path, metavar="FEATURES", help="folder of precompute's")
    _add_sampling(evaluate)

    train = commands.add_parser("train", help="train a model from a recipe")
    train.set_defaults(run=_train)
    train.add_argument("recipe", help="a shipped recipe (kolors-tiny, sd3-tiny, pixart-tiny) or a TOML file")
    train.add_argument("-o", "--output", type=Path, required=True, help="folder of checkpoints and of the model")
    train.add_argument("--stages", nargs="+", help="only these stages of the recipe, in its order")
    train.add_argument("--threads", type=int, help="CPU threads of each process; default: all")
    train.add_argument("--engine", choices=["ddp", "fsdp", "hybrid"], default="ddp", help="of several processes")
    train.add_argument("--device", help="default: cuda if there is one, a GPU for each process, else cpu")
    train.add_argument("--accept-changes", action="store_true", help="resume although settings have changed")

    features = commands.add_parser("precompute", help="encode pictures and captions once, to train a denoiser on them")
    features.set_defaults(run=_precompute)
    features.add_argument("data", metavar="DATA", help="folder of pictures, tar shards or Parquet shards")
    features.add_argument("-o", "--output", type=Path, required=True, help="folder of latents and text features")
    features.add_argument("--model", required=True, help="whose autoencoder and text encoders: bundled, folder, hub id")
    features.add_argument("--variant", help="file variant of the weights, such as fp16")
    features.add_argument("--area", type=int, default=1024, help="side of the square of a bucket's area; default: 1024")
    features.add_argument("--min", type=int, default=512, help="shortest side of a bucket; default: 512")
    features.add_argument("--limit", type=int, default=2048, help="longest side of a bucket; default: 2048")
    features.add_argument("--filter", type=Path, help="TOML or JSON: which samples to keep by their metadata")
    features.add_argument("--batch", type=int, default=8, help="pictures encoded at once; default: 8")
    features.add_argument("--device", help="default: cuda if there is one, else cpu")
    features.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on cuda")

    bench = commands.add_parser("bench", help="time steps and pictures against pure PyTorch and diffusers")
    bench.set_defaults(run=_bench)
    bench.add_argument("--model", help="bundled name, folder or hub id; default on a CPU: kolors-tiny")
    bench.add_argument("--variant", help="file variant of the weights, such as fp16")
    configs = ["kolors", "sd3-medium", "sd3.5-medium", "pixart-xl2-1024", "sd3-small", "pixart-small"]
    bench.add_argument("--config", choices=configs, help="random weights; default on CUDA: kolors")
    bench.add_argument("--steps", type=int, default=25, help="default: 25")
    bench.add_argument("--batch", type=int, default=1, help="pictures in one call; default: 1")
    bench.add_argument("--height", type=int)
    bench.add_argument("--width", type=int)
    bench.add_argument("--device", help="default: cuda if there is one, else cpu")
    bench.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on cuda")
    bench.add_argument("--rounds", type=int, default=5, help="turns of each provider; default: 5")
    providers = ["kolors_fast", "kolors_fast_graphs", "diffusers"]
    bench.add_argument("--providers", nargs="*", choices=providers, default=providers, help="beside pure PyTorch")
    bench.add_argument("--compile", action="store_true", help="also diffusers under torch.compile")
    bench.add_argument("-o", "--output", type=Path, help="also write all rounds and their provenance as JSON")

    info = commands.add_parser("info", help="versions, and which backends exist or why not")
    info.set_defaults(run=_info)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    model = "bundled name (kolors-tiny, sd3-tiny, pixart-tiny), folder or hub id; default: kolors-tiny"
    parser.add_argument("--model", default="kolors-tiny", help=model)
    parser.add_argument("--variant", help="file variant of the weights, such as fp16")
    parser.add_argument("--text-encoder-quantization", choices=["int8", "int4"], help="weights in 8 or 4 bits")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--steps", type=int, default=25, help="default: 25")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="default: 5.0")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on cuda")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="capture a step once and replay it; tells the memory"
    )
    parser.add_argument("--backend", choices=["reference", "cpu", "triton", "cuda"], help="force one for every op")


def _generate(options: argparse.Namespace) -> int:
    generate = _generate_prompts if options.prompts_file is None else _generate_file
    if not options.nvtx:
        return generate(options)
    from .ranges import nvtx_ranges

    with nvtx_ranges():
        return generate(options)


def _generate_prompts(options: argparse.Namespace) -> int:
    from PIL import Image

    if not options.prompt or options.batch is not None or options.overwrite:
        options.refuse("expected a prompt or --prompts-file, and --batch and --overwrite only with the latter")
    options.output = options.output or Path("out.png")
    if options.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output: expected a picture's name such as out.png, got {str(options.output)!r}")
    check_folder(options.output)
    pairs = [(prompt, seed) for prompt in options.prompt for seed in options.seed]
    pipeline = load(options, len(pairs))
    prompts, seeds = [p for p, _ in pairs], [s for _, s in pairs]
    images = draw(pipeline, options, prompts, seeds)
    if options.compare_reference:
        _compare(pipeline, options, prompts, seeds)
    if len(images) > 1 and options.grid:
        from .evaluation.shapes import grid

        images = [grid(images, columns=len(options.seed) if len(options.seed) > 1 else min(4, len(images)))]
    for index, image in enumerate(images, start=1):
        name = options.output if len(images) == 1 else options.output.with_stem(f"{options.output.stem}-{index}")
        _save(image, name)
        print(name)
    return 0


def _generate_file(options: argparse.Namespace) -> int:
    from .pipelines.prompts_file import Defaults, Worker, draw_prompts_file

    if options.prompt or options.grid or options.compare_reference or options.output is None:
        options.refuse("--prompts-file: expected -o FOLDER, and no prompt, --grid or --compare-reference")

    def defaults(pipeline: Any) -> Defaults:
        height, width = pipeline.default_size
        return Defaults(
            negative_prompt=options.negative_prompt,
            seeds=options.seed,
            guidance_scale=options.guidance_scale,
            height=height if options.height is None else options.height,
            width=width if options.width is None else options.width,
            steps=options.steps,
        )

    def settings(pipeline: Any) -> dict[str, Any]:
        plan = pipeline.memory_plan
        bits = options.text_encoder_quantization if plan is None else plan.quantization
        dtype = str(pipeline.dtype).removeprefix("torch.")
        return {"model": options.model, "variant": options.variant, "dtype": dtype, "text_encoder_quantization": bits}

    batch = 4 if options.batch is None else options.batch
    worker = Worker.from_environment()
    options.device = worker.device(options.device)
    failed = draw_prompts_file(
        options.prompts_file,
        options.output,
        lambda: load(options, batch),
        defaults,
        batch=batch,
        overwrite=options.overwrite,
        settings=settings,
        worker=worker,
    )
    return min(failed, 1)


def _compare(pipeline: Any, options: argparse.Namespace, prompts: list[str], seeds: list[int]) -> None:
    """Print time and difference of the chosen backends against the same models in pure PyTorch, both warm."""
    import time

    import numpy as np

    from .ops import use_backend

    pipeline.set_progress_bar_config(disable=True)
    pictures, seconds = [], []
    for backend in (options.backend, "reference"):
        with use_backend(backend):
            started = time.perf_counter()
            pictures.append(np.stack([np.asarray(i) for i in draw(pipeline, options, prompts, seeds)]).astype(float))
            seconds.append(time.perf_counter() - started)
    error = np.abs(pictures[0] - pictures[1])
    mse = np.square(error).mean()
    psnr = "identical" if mse == 0 else f"PSNR {10 * np.log10(255**2 / mse):.1f} dB"
    print(f"ours {seconds[0]:.2f} s, pure PyTorch {seconds[1]:.2f} s ({seconds[1] / seconds[0]:.2f}x)")
    print(f"difference: largest {error.max():.0f} of 255, {psnr}")


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import evaluate

    evaluate(options)


def _train(options: argparse.Namespace) -> None:
    from .training import run

    run(
        options.recipe,
        options.output,
        stages=options.stages,
        threads=options.threads,
        engine=options.engine,
        device=options.device,
        accept_changes=options.accept_changes,
    )


def _precompute(options: argparse.Namespace) -> None:
    from .data.metadata import Filter
    from .data.precompute import Settings
    from .training.precompute import precompute_command

    rules = Filter({}) if options.filter is None else Filter.load(options.filter)
    settings = Settings(options.area, options.min, options.limit, options.batch, filter=rules)
    own = {name: getattr(options, name) for name in ("dtype", "variant", "device")}
    dataset = precompute_command(options.data, options.output, options.model, settings, **own)
    if dataset is not None:
        print(f"{len(dataset)} samples in {len(dataset.buckets)} sizes; {dataset.index['counts']}")


def _bench(options: argparse.Namespace) -> None:
    from .benchmark import bench

    bench(options)


def _info(options: argparse.Namespace) -> None:
    import importlib.metadata as metadata
    import platform

    import torch

    from . import __version__
    from .ops import SPECS, _backends

    print(f"kolors_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy", "safetensors", "sentencepiece", "diffusers", "transformers"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    print(f"GPU: {gpu}; CPU threads: {torch.get_num_threads()}")
    for backend in _backends.BACKENDS:
        missing = _backends.unavailable(backend)
        detail = f" ({_backends.extension('cpu').isa()})" if backend == "cpu" and not missing else ""  # type: ignore[union-attr]
        print(f"backend {backend}: {f'missing: {missing}' if missing else 'available' + detail}")
    for name, spec in SPECS.items():
        print(f"op {name}: {', '.join(spec.columns)}; gradients: {', '.join(spec.gradients) or 'none'}")


def _save(image: Any, name: Path) -> None:
    """Beside, then renamed: a picture is there whole or not at all."""
    beside = name.with_name(f".{name.stem}.part{name.suffix}")
    try:
        image.save(beside)
        beside.replace(name)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
