"""Choices that hold for the whole test run."""

import importlib.util
import os
import sys

import pytest
import torch

# Triton decides once, at import, whether kernels are interpreted; without a GPU the interpreter is all there is
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _round_as_gpus_do() -> None:
    """Triton's interpreter cuts fp32 to bf16 where GPUs, and compiled kernels, round to nearest even; and it reads
    subnormal bf16 as zero."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            exact = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).bfloat16()
            return exact.view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return convert(value, source, target, mode)

    interpreter._convert_float = rounded


def _multiply_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers, and its tl.dot multiplies those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_wide(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, *rest: object) -> object:
        return dot(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot_of_wide


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_as_gpus_do()
    _multiply_bf16()

# .ci/sanitize tests another build of the CPU kernels
if path := os.environ.get("KOLORS_FAST_TEST_EXTENSION"):
    found = importlib.util.spec_from_file_location("kolors_fast._cpu", path)
    assert found is not None and found.loader is not None
    sys.modules["kolors_fast._cpu"] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

# one worker a core already: more threads than cores only wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def every_product_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ours, and four small convolutions in the place of one after an upsampling, are fastest at any size."""
    from kolors_fast.models import layers
    from kolors_fast.ops import _products

    def for_conv2d(x: torch.Size, w: torch.Size, *steps: int) -> tuple[str, ...]:
        of_kernel = {((1, 1), (1, 1, 0, 0)): "kolors_fast", ((3, 3), (1, 1, 1, 1)): "winograd"}
        return of_kernel.get((tuple(w[2:]), steps), "packed"), "packed"

    monkeypatch.setattr(_products, "_for_linear", lambda *_: ("kolors_fast", "onednn"))
    monkeypatch.setattr(_products, "_for_conv2d", for_conv2d)
    monkeypatch.setattr(layers, "PHASES_FROM", 0)
