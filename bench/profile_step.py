"""Where the time of one denoising step goes, by kernel: ours and diffusers' on the same weights.

    python bench/profile_step.py [unet | mmdit | pixart | training] [rows]

Kolors' own size (the UNet), SD3-medium's or PixArt-XL/2's in bfloat16 at 1024x1024 where there is a GPU, the small
model in float32 on a CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def step_of(model: str, device: str) -> dict[str, Any]:
    providers, on_gpu = {"diffusers", "kolors_fast"}, device == "cuda"
    if model == "unet":
        from bench_models import KOLORS_UNET, SMALL_UNET, _step_of

        dtype = torch.bfloat16 if on_gpu else torch.float32
        config, side = (KOLORS_UNET, 128) if on_gpu else (SMALL_UNET, 32)
        return _step_of(config, side, device, dtype, providers)
    if model == "training":
        from bench_training import line_up_of

        return line_up_of(device, providers)
    from bench_transformers import CASES, step_of

    released = {"mmdit": "sd3_medium", "pixart": "pixart_xl2"}
    return step_of(CASES[released[model] if on_gpu else model], device, providers)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "unet"
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 25
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.set_grad_enabled(model == "training"):
        for name, (call, _) in step_of(model, "cuda" if on_gpu else "cpu").items():
            call()
            with profile(activities=activities) as profiled:
                for _ in range(3):
                    call()
                if on_gpu:
                    torch.cuda.synchronize()
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            print(f"{name}, three steps\n{profiled.key_averages().table(sort_by=order, row_limit=rows)}")


if __name__ == "__main__":
    main()
