#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and nothing to download:
#
#     bench/run_gpu.sh OUTDIR [ops | models | transformers | training]
#
# builds the CUDA extension for this GPU, then for the ops (the default) runs their GPU tests and sanitizers and times
# them; for the models tests the captured denoising step, times one step of Kolors' 2.58B UNet with random weights at
# 1024x1024 (CFG batch 2, bfloat16) and its parts beside diffusers, and profiles it; for the transformers does the same
# with SD3-medium, SD3.5-medium and PixArt-XL/2; for training tests that the trainer does on the GPU what it does on the
# CPU, times an update of Kolors' UNet and profiles it. OUTDIR gets a log of each part, rows of each benchmark as JSON,
# a table (.md) and a chart (.svg). Each is meant to take under nine minutes on 16 cores; a part that fails or takes too
# long is reported and the others still run. Needs torch with CUDA, triton, pytest, pytest-xdist (compiling thousands of
# small Triton kernels one after the other takes longer), pytest-benchmark, setuptools, pybind11, ninja, nvcc; all but
# the ops diffusers, transformers, accelerate and peft as well, and 80 GB for all providers at once.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/run_gpu.sh OUTDIR [ops | models | transformers | training]}
what=${2:-ops}
[[ $what =~ ^(ops|models|transformers|training)$ ]] || { echo "expected ops, models, transformers or training, got $what" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

part() { # name, seconds that it may take, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || failed+=("$name (exit $?)")
    tail -n 3 "$out/$name.log"
    echo "-- $name took $((SECONDS - start)) s"
}

rows=()
bench() { # name, seconds that it may take, pytest's -k
    part "$1" "$2" python -m pytest "bench/bench_$what.py" -q -p no:cacheprovider --benchmark-only -k "$3" \
        --benchmark-json="$out/$1.json"
    [ -s "$out/$1.json" ] && rows+=("$out/$1.json")
}

nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$out/gpu.csv"
part build 90 python -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
if [ "$what" = ops ]; then
    part tests 200 python -m pytest tests/ops/test_ops.py -q -p no:cacheprovider -n auto -k "cuda or triton" --maxfail=50
    part sanitizer 80 tests/compute_sanitizer.sh
    # first what decides; torch.compile takes its time to compile, so on few shapes
    bench forward 90 "test_forward and not compile"
    bench backward 80 "test_backward and not compile"
    bench host 20 "host_overhead"
    bench compiled 50 "test_forward and (sd3_2x4096x1536 or kolors_2x640x64x64 or kolors_2x1024x10240)"
elif [ "$what" = models ]; then
    part graphs 60 python -m pytest tests/sampling/test_graphs.py -q -p no:cacheprovider
    bench step 60 "unet_step and not (compile or autotune or reference)"
    bench savings 60 "savings"
    bench parts 80 "(block or host or decode or encoding) and not compile"
    part profile 40 python bench/profile_step.py unet 40
    bench compiled 240 "unet_step and not reference"
    bench first 60 "first_picture and not compile"
elif [ "$what" = training ]; then
    part tests 120 python -m pytest tests/training/test_devices.py -q -p no:cacheprovider
    bench step 90 "not compile"
    part profile 90 python bench/profile_step.py training 60
    bench compiled 280 "compile"
else
    part graphs 60 python -m pytest tests/sampling/test_graphs.py -q -p no:cacheprovider
    bench step 90 "test_step and not (compile or autotune or reference)"
    bench blocks 40 "block and not compile"
    bench savings 90 "savings"
    part mmdit 40 python bench/profile_step.py mmdit 40
    part pixart 40 python bench/profile_step.py pixart 40
    bench compiled 180 "test_step and not reference and (sd3_medium- or pixart_xl2)"
fi
if [ ${#rows[@]} -gt 0 ]; then
    python bench/table.py "${rows[@]}" | tee "$out/$what.md"
    python bench/chart.py "${rows[@]}" >"$out/$what.svg"
fi
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
