#!/usr/bin/env bash
# The CUDA and Triton kernels under NVIDIA's compute-sanitizer: accesses out of bounds (memcheck), races in shared
# memory (racecheck), reads of memory that nobody wrote (initcheck). Needs a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
[ -x "$tool" ] || { echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"; exit 1; }
running=()
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
for check in memcheck racecheck initcheck; do
    # PyTorch's allocator hands out parts of large blocks, whose ends memcheck could not see
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 9 --target-processes all \
        --kernel-regex kns=kolors_fast --kernel-regex kns=_kernel \
        python -m pytest tests/ops/test_ops.py -q -p no:cacheprovider -x \
        -k "against_float64 and (cuda or triton) and (plain or odd or seam) and bfloat16" >"$logs/$check" 2>&1 &
    running+=("$!")
done
status=0
for process in "${running[@]}"; do
    wait "$process" || status=1
done
tail -n 40 "$logs"/*
exit $status
