#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and nothing to download:
#
#     bench/run_gpu.sh OUTDIR
#
# builds the CUDA extension for this GPU, runs the GPU tests and the sanitizers on the ops, times the ops, and leaves
# in OUTDIR: a log of each part, ops.json, ops.md, ops.svg. Under nine minutes; a part that fails is reported and the
# others still run. Needs torch with CUDA, triton, pytest, pytest-benchmark, setuptools, pybind11, ninja, nvcc.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/run_gpu.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

part() { # name, seconds that it may take, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed+=("$name (exit $?)")
    tail -n 3 "$out/$name.log"
    echo "-- $name took $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$out/gpu.csv"
part build 150 python -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
part tests 150 python -m pytest tests/ops/test_ops.py -q -p no:cacheprovider -k "cuda or triton" --maxfail=20
part sanitizer 90 tests/compute_sanitizer.sh
part bench 140 python -m pytest bench/bench_ops.py -q -p no:cacheprovider --benchmark-only --benchmark-json="$out/ops.json"
if [ -s "$out/ops.json" ]; then
    python bench/table.py "$out/ops.json" | tee "$out/ops.md"
    python bench/chart.py "$out/ops.json" >"$out/ops.svg"
fi
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
