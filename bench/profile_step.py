"""Where the time of one UNet step goes, by kernel: ours and diffusers' on the same weights.

    python bench/profile_step.py [rows]

Kolors' own size in bfloat16 at 1024x1024 where there is a GPU, the 33M UNet in float32 on a CPU.
"""

from __future__ import annotations

import sys

import torch
from bench_models import KOLORS_UNET, SMALL_UNET, _step_of
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    config, side = (KOLORS_UNET, 128) if on_gpu else (SMALL_UNET, 32)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.no_grad():
        for name, (call, _) in _step_of(config, side, device, dtype, {"diffusers", "kolors_fast"}).items():
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
