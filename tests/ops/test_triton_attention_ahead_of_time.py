"""The Triton attention compiles for A100, H100 and B200 without a GPU, without spills and with wide accesses.

Like test_triton_ahead_of_time: the launchers run on meta tensors with their kernels replaced by recorders, in a process
of its own, because Triton chooses between its JIT and its interpreter at import.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Variant:
    """Two samples, 4096 queries, ten heads of head_dim; q, k, v of a stream are views of one projection."""

    head_dim: int
    keys: int = 4096
    added: int = 0
    weights: bool = False
    bias: bool = False
    dtype: torch.dtype = HALF
    backward: bool = True


VARIANTS = {
    "kolors": Variant(64, backward=False),
    "kolors_prompt": Variant(64, keys=77, bias=True, backward=False),
    "kolors_long_prompt": Variant(64, keys=257, bias=True, backward=False),
    "sd3.5": Variant(64, added=333, weights=True),
    "pixart": Variant(72, backward=False),
    "pixart_prompt": Variant(72, keys=300, bias=True),
    "head_128": Variant(128, added=512, weights=True, dtype=BF16),
    "fp32": Variant(64, weights=True, dtype=FLOAT),
}
KERNELS = {
    "_normalise_kernel", "_forward_kernel", "_few_keys_kernel", "_delta_kernel", "_grad_keys_kernel",
    "_grad_queries_kernel",
}  # fmt: skip
# tiles of queries and of keys that a kernel reads and writes: all of those accesses must be wide
READS = {
    "_forward_kernel": (1, 2),
    "_few_keys_kernel": (1, 2),
    "_grad_keys_kernel": (2, 2),
    "_grad_queries_kernel": (2, 2),
}
WRITES = {
    "_forward_kernel": (1, 0), "_few_keys_kernel": (1, 0), "_grad_keys_kernel": (0, 2), "_grad_queries_kernel": (1, 0)
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one kernel of one variant became on one architecture; bytes are those of one thread."""

    name: str
    kernel: str
    architecture: int
    stack: int
    local: int
    registers: int
    shared: int
    wide_loaded: int
    wide_stored: int
    query_bytes: int  # of the tile of queries
    key_bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {self.kernel} for sm_{self.architecture}"


# ---- the process that compiles

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel: keeps the launches instead of making them."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@cache
def _recorded() -> tuple[Any, Any, list[Launch]]:
    """The two modules of launchers, and where their launches go."""
    from kolors_fast.kernels import qk_norm_attention, qk_norm_attention_backward

    made: list[Launch] = []
    for module in (qk_norm_attention, qk_norm_attention_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), made))
    qk_norm_attention.multiprocessors = lambda device: 132
    return qk_norm_attention, qk_norm_attention_backward, made


def _launches(v: Variant, architecture: int) -> list[Launch]:
    forward, backward, made = _recorded()
    forward.architecture = backward.architecture = lambda device: architecture
    made.clear()

    def meta(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def stream(rows: int) -> list[Tensor]:
        return list(meta(2, rows, 3, 10, v.head_dim).unbind(2))

    q, k, value = stream(4096)
    k, value = k[:, : v.keys], value[:, : v.keys]
    added = stream(v.added) if v.added else [None] * 3
    weights = [meta(v.head_dim) if v.weights else None] * 2
    bias = meta(2, v.keys + v.added, dtype=FLOAT) if v.bias else None
    tensors = (q, k, value, *weights, *added, *(weights if v.added else [None] * 2), bias, 1e-6, v.head_dim**-0.5)
    out, added_out, lse = forward.forward(*tensors)
    if v.backward:
        backward.backward(out, added_out, *tensors, out, added_out, lse, [True] * 11)
    return list(made)


def _source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the JIT would compile for these arguments: integers are not specialised, pointers are when aligned."""
    from triton.compiler import ASTSource

    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = bound[name]
        if isinstance(value, Tensor):
            signature[name] = names[value.dtype]
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
    """Bytes moved by the instructions that move 16 or more at once, copies to shared memory among the loads."""
    vectors = re.findall(rf"\b{access}\.global(?:[.:\w]*)\.v(\d)\.[bfu](\d+)", ptx)
    sizes = [int(count) * int(bits) // 8 for count, bits in vectors]
    copies = len(re.findall(r"\bcp\.async\.cg\.shared\.global[^;]*, 0x10,", ptx)) if access == "ld" else 0
    return sum(size for size in sizes if size >= 16) + 16 * copies


def _compile(task: tuple[str, int]) -> list[Compiled]:
    """Every kernel of one variant for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    name, architecture = task
    results, seen = [], set()
    for kernel, args, options in _launches(VARIANTS[name], architecture):
        source = _source(kernel, args, options)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        target = GPUTarget("cuda", architecture, 32)
        chosen = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
        compiled = triton.compile(source, target=target, options=chosen)
        used, ptx = _resources(compiled.asm["cubin"]), compiled.asm["ptx"]
        # a tail's columns past the head are masked, and its instructions there all the same
        row = (options["MAIN"] + options["TAIL"]) * VARIANTS[name].dtype.itemsize
        threads = options["num_warps"] * 32
        result = Compiled(
            name, kernel.__name__, architecture, used["STACK"], used["LOCAL"], used["REG"], compiled.metadata.shared,
            _wide_bytes(ptx, "ld"), _wide_bytes(ptx, "st"),
            options.get("BLOCK_Q", 0) * row // threads, options.get("BLOCK_K", 0) * row // threads,
        )  # fmt: skip
        results.append(result)
    return results


def _compile_all() -> list[Compiled]:
    tasks = list(product(VARIANTS, ARCHITECTURES))
    with ProcessPoolExecutor(2) as pool:
        return [result for results in pool.map(_compile, tasks) for result in results]


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
    assert {(c.kernel, c.architecture) for c in compiled} == set(product(KERNELS, ARCHITECTURES))
    # 4 is what is left of a kernel that the compiler gave up on
    assert all(c.registers > 4 for c in compiled)


def test_no_spills_and_no_local_memory(compiled: list[Compiled]) -> None:
    assert not [f"{c}: {c.stack}" for c in compiled if c.stack or c.local]


def test_shared_memory_suffices(compiled: list[Compiled]) -> None:
    assert not [f"{c}: {c.shared}" for c in compiled if c.shared > SHARED_MEMORY[c.architecture]]


def test_tiles_move_in_16_byte_accesses(compiled: list[Compiled]) -> None:
    checked = 0
    for c in compiled:
        if c.kernel in READS:
            expected = [
                math.fsum(
                    count * size for count, size in zip(tiles[c.kernel], (c.query_bytes, c.key_bytes), strict=True)
                )
                for tiles in (READS, WRITES)
            ]
            assert c.wide_loaded >= expected[0] > 0, c
            assert c.wide_stored >= expected[1] > 0, c
            checked += 1
    assert checked > len(compiled) // 2


if __name__ == "__main__":
    json.dump([asdict(result) for result in _compile_all()], sys.stdout)
