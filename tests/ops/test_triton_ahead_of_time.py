"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, without spills and with wide accesses.

The launchers run on meta tensors with their kernels replaced by recorders, so that what is compiled is exactly what
they would launch. This needs the real JIT, and Triton chooses between that and its interpreter once, at import: the
work is done by this file run as a script, in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Variant:
    """A GroupNorm of [2, x + skip, side, side] in 32 groups."""

    x: int
    skip: int
    side: int
    channels_last: bool
    dtype: torch.dtype = HALF
    channel_add: bool = True
    silu: bool = True
    groups: int = 32
    aligned: bool = True
    backward: bool = True

    @property
    def wide(self) -> bool:
        inner = (self.x, self.skip) if self.channels_last else (self.side**2,)
        return self.aligned and all(length * self.dtype.itemsize % 16 == 0 for length in inner)


VARIANTS = {
    "resnet": Variant(320, 0, 128, True),
    "straddled_seam": Variant(1280, 640, 64, True, BF16, channel_add=False),
    "attention": Variant(1280, 0, 32, True, channel_add=False, silu=False, backward=False),
    "autoencoder": Variant(128, 0, 512, True, FLOAT, channel_add=False, backward=False),
    "one_group": Variant(512, 0, 16, True, groups=1, backward=False),
    "nchw": Variant(640, 320, 64, False),
    "nchw_fp32": Variant(320, 0, 64, False, FLOAT, backward=False),
    "odd_channels": Variant(315, 37, 63, True),
    "odd_address": Variant(640, 320, 64, True, aligned=False, backward=False),
    "odd_pixels": Variant(96, 0, 63, False, BF16),
}
STEPS = {"step_multistep": (4 * 128 * 128, True), "step_odd": (4 * 125 * 93, False)}
# tensors of the picture's size that a kernel reads and writes: all of those accesses must be wide
TENSORS = {
    "_statistics_kernel": (1, 0),
    "_apply_kernel": (1, 1),
    "_grad_sums_kernel": (2, 0),
    "_grad_input_kernel": (2, 1),
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel of one variant became on one architecture; bytes are those of one thread and one tile."""

    name: str
    kernel: str
    architecture: int
    stack: int
    local: int
    registers: int
    wide_loaded: int
    wide_stored: int
    tile_bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {self.kernel} for sm_{self.architecture}"


# ---- the process that compiles


class Recorder:
    """Stands in for a kernel: keeps the launches instead of making them."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def _launches() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any], int]]:
    from kolors_fast.kernels import group_norm_silu, guided_step

    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for module in (group_norm_silu, guided_step):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), made))
    group_norm_silu.multiprocessors = lambda device: 132

    def meta(*shape: int, dtype: torch.dtype = HALF, aligned: bool = True) -> Tensor:
        h = torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")
        return (h[:-1] if aligned else h[1:]).view(shape)

    for name, v in VARIANTS.items():
        channels = v.x + v.skip
        x = meta(2, v.x, v.side, v.side, dtype=v.dtype, aligned=v.aligned)
        skip = meta(2, v.skip, v.side, v.side, dtype=v.dtype, aligned=v.aligned) if v.skip else None
        affine = meta(channels, dtype=v.dtype)
        add = meta(2, channels, dtype=v.dtype) if v.channel_add else None
        y, mean, rstd = group_norm_silu.forward(x, skip, affine, affine, add, v.groups, 1e-5, v.silu, v.channels_last)
        if v.backward:
            group_norm_silu.backward(
                y, x, skip, affine, affine, add, mean, rstd, v.groups, v.silu, v.channels_last, (True,) * 5
            )
        for kernel, args, options in made:
            tile = options.get("BLOCK_P", 0) * options.get("BLOCK_C", 0) * v.dtype.itemsize
            yield name, kernel, args, options, tile // (options["num_warps"] * 32)
        made.clear()

    for name, (elements, multistep) in STEPS.items():
        sample, fp32 = meta(1, elements), meta(2, dtype=FLOAT)
        table, row = meta(50, 6, dtype=FLOAT), meta(1, dtype=torch.int64)
        previous = sample if multistep else None
        guided_step.step(sample, meta(2, elements), fp32, table, row, previous, None, multistep)
        for kernel, args, options in made:
            yield name, kernel, args, options, options["BLOCK"] * 2 // (options["num_warps"] * 32)
        made.clear()


def _source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the JIT would compile for these arguments: integers are not specialised, pointers are when aligned."""
    from triton.compiler import ASTSource

    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = bound[name]
        if isinstance(value, Tensor):
            signature[name] = names[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or name.isupper():
            signature[name], constants[(i,)] = "constexpr", value
        else:
            assert isinstance(value, float) or name in {p.name for p in kernel.params if p.do_not_specialize}
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes) -> dict[str, int]:
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)}


def _wide_bytes(ptx: str, access: str) -> int:
    """Bytes moved by the instructions that move 16 or more at once."""
    vectors = re.findall(rf"\b{access}\.global(?:[.:\w]*)\.v(\d)\.[bfu](\d+)", ptx)
    sizes = [int(count) * int(bits) // 8 for count, bits in vectors]
    return sum(size for size in sizes if size >= 16)


def _compile_all() -> list[Compiled]:
    import triton
    from triton.backends.compiler import GPUTarget

    results, seen = [], set()
    for name, kernel, args, options, tile_bytes in _launches():
        source = _source(kernel, args, options)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        for architecture in ARCHITECTURES:
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target=target, options={"num_warps": options["num_warps"]})
            used, ptx = _resources(compiled.asm["cubin"]), compiled.asm["ptx"]
            result = Compiled(
                name, kernel.__name__, architecture, used["STACK"], used["LOCAL"], used["REG"],
                _wide_bytes(ptx, "ld"), _wide_bytes(ptx, "st"), tile_bytes,
            )  # fmt: skip
            results.append(result)
    return results


# ---- the tests


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # compile, rather than remember
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [Compiled(**row) for row in json.loads(run.stdout)]


def test_every_kernel_compiles_for_every_architecture(compiled: list[Compiled]) -> None:
    from kolors_fast.kernels import group_norm_silu, guided_step

    kernels = {name for module in (group_norm_silu, guided_step) for name in vars(module) if name.endswith("_kernel")}
    assert {(c.kernel, c.architecture) for c in compiled} == {(k, a) for k in kernels for a in ARCHITECTURES}


def test_no_spills_and_no_local_memory(compiled: list[Compiled]) -> None:
    assert not [str(c) for c in compiled if c.stack or c.local]


def test_two_programs_share_a_multiprocessor(compiled: list[Compiled]) -> None:
    """65,536 registers for two programs of 256 threads: at most 128 each, or latency has nothing to hide behind."""
    assert not [f"{c}: {c.registers}" for c in compiled if c.registers > 128]


def test_aligned_tiles_move_in_16_byte_accesses(compiled: list[Compiled]) -> None:
    checked = 0
    for c in compiled:
        if c.kernel in TENSORS and VARIANTS[c.name].wide:
            loads, stores = TENSORS[c.kernel]
            assert c.wide_loaded >= loads * c.tile_bytes > 0, c
            assert c.wide_stored == stores * c.tile_bytes, c
            checked += 1
        elif c.name == "step_multistep":
            assert (c.wide_loaded, c.wide_stored) == (4 * c.tile_bytes, 2 * c.tile_bytes), c
            checked += 1
    assert checked > len(compiled) // 2


if __name__ == "__main__":
    json.dump([asdict(result) for result in _compile_all()], sys.stdout)
