"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, without spills and with wide accesses.

The launchers run on meta tensors of the specs' cases with their kernels replaced by recorders, so that what is compiled
is exactly what they would launch. This needs the real JIT, and Triton chooses between that and its interpreter once, at
import: the work is done by this file run as a script, in a process of its own. The same script writes the table that
the results are compared with, when a change is meant:

    python tests/ops/test_triton_ahead_of_time.py --record
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_fast.ops import SPECS
from kolors_fast.ops._spec import cast

TABLE = Path(__file__).with_name("triton_resources.json")
ARCHITECTURES = (80, 90, 100)
COLUMNS = ("registers", "shared bytes", "bytes loaded 16 at a time", "bytes stored 16 at a time", "other bytes loaded")
# of an op with many real shapes, those that compile to something else
CASES = {
    "group_norm_silu": (
        "kolors_2x320x128x128",
        "kolors_2x640+320x128x128",
        "kolors_2x1280x32x32_no_silu",
        "plain",
        "offset_view",
    ),
    "ada_layer_norm": ("sd3_2x4096x1536", "sd35_large_2x4096x2432", "plain", "offset_view"),
    "gated_residual_ada_layer_norm": ("sd3_2x4096x1536", "sd35_large_2x4096x2432", "plain", "no_gate"),
    "residual_layer_norm": ("kolors_2x4096x640", "kolors_2x1024x1280", "plain"),
    "qk_norm": ("sd35_2x4096+333x24x64", "head_dim_72", "plain", "offset_view"),
    "qk_norm_attention": (
        "kolors_cross_2x1024x20x64",
        "kolors_cross_2x1024x20x64_256",
        "kolors_cross_2x4096x10x64",
        "sd35_2x4096+333x24x64",
        "pixart_self_2x4096x16x72",
        "plain",
    ),
}
# kernels that read partial sums and rows of channels only
NARROW = ("_grad_groups_kernel",)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, list[int]]  # architecture -> COLUMNS
_JOBS: list[Any] = []  # name, architecture, source, settings: of a compiling process

# ---- the process that compiles


class Recorder:
    """Stands in for a kernel: keeps the launches instead of making them."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def _launches() -> Iterator[tuple[str, int, Any, tuple[Any, ...], dict[str, Any]]]:
    """(op case dtype, architecture, kernel, arguments, options) of all that the Triton columns launch, on 132 SMs."""
    import kolors_fast.kernels
    import triton

    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    names_of_modules = [found.name for found in pkgutil.iter_modules(kolors_fast.kernels.__path__)]
    modules: list[Any] = [importlib.import_module(f"kolors_fast.kernels.{name}") for name in names_of_modules]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Recorder(value, made))
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: 132
    # what has been measured says whether this kernel is used, not whether it compiles
    importlib.import_module("kolors_fast.ops.geglu_linear").epilogue_pays = lambda *sizes: True  # type: ignore[attr-defined]

    for architecture, spec in itertools.product(ARCHITECTURES, SPECS.values()):
        for module in modules:
            if hasattr(module, "architecture"):
                module.architecture = lambda device, found=architecture: found
        operator = importlib.import_module(f"kolors_fast.ops.{spec.name}")._operator
        names = CASES.get(spec.name) or [c.name for c in spec.cases if c.model or c.name in ("plain", "offset_view")]
        # real shapes first: what several cases compile to goes by the name of the first
        for case in sorted((case for case in spec.cases if case.name in names), key=lambda case: not case.model):
            for dtype_name, dtype in DTYPES.items():
                if dtype_name == "bf16" and case.name != "plain":
                    continue  # the same accesses as fp16
                with torch.device("meta"):
                    call = operator.dense(spec.prepare(**cast(case.make(None), dtype, "meta")))  # type: ignore[arg-type]
                column, outputs = spec.columns["triton"], operator.outputs
                results = column.forward(call)
                if column.backward is not None:
                    column.backward(call, results[:outputs], results[operator.first_kept :], [True] * operator.tensors)
                for kernel, args, options in made:
                    yield f"{spec.name} {case.name} {dtype_name}", architecture, kernel, args, options
                made.clear()


def _source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the JIT would compile for these arguments: integers are specialised unless told not to, pointers are when
    aligned."""
    from triton.compiler import ASTSource

    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    names |= {torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1", torch.int32: "*i32"}
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = bound.get(name, parameter.default)
        if isinstance(value, Tensor):
            signature[name] = names[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize and value == 1:
                signature[name], constants[(i,)] = "constexpr", 1
            elif not parameter.do_not_specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resources(compiled: Any) -> list[int]:
    """COLUMNS, from the machine code and the PTX. Local memory, whether spills or arrays, ends the run."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)}
    loads, stores = (_accesses(compiled.asm["ptx"], access) for access in ("ld", "st"))
    wide = [sum(size for size in sizes if size >= 16) for sizes in (loads, stores)]
    local = used["STACK"] + used["LOCAL"]
    return [used["REG"], compiled.metadata.shared, *wide, sum(loads) - wide[0], local]


def _accesses(ptx: str, access: str) -> list[int]:
    """Bytes of every global load or store in the code; a loop's count once."""
    found = re.findall(rf"\b{access}\.global(?:\.(?!v\d|[bfus]\d)[:\w]+)*(?:\.v(\d))?\.[bfus](\d+)", ptx)
    if access == "ld":  # into shared memory
        copied = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)
        found += [("", str(8 * int(size, 16))) for size in copied]
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def _compile_all() -> dict[str, Row]:
    jobs, seen = [], set()
    for name, architecture, kernel, args, options in _launches():
        source = _source(kernel, args, options)
        settings = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
        if (variant := (source.hash(), str(settings), architecture)) not in seen:
            seen.add(variant)
            jobs.append((f"{name} {kernel.__name__}", architecture, source, settings))
    assert len({job[:2] for job in jobs}) == len(jobs), "two launches of a case share a name"

    rows: dict[str, Row] = {}
    # forked processes have the jobs already; threads would wait for each other in the compiler's Python part
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _keep, (jobs,)) as pool:
        for (name, architecture, *_), found in zip(jobs, pool.map(_compile_one, range(len(jobs)), 1), strict=True):
            rows.setdefault(name, {})[f"sm_{architecture}"] = found
    return rows


def _keep(jobs: list[Any]) -> None:
    global _JOBS
    _JOBS = jobs


def _compile_one(index: int) -> list[int]:
    import triton
    from triton.backends.compiler import GPUTarget

    _, architecture, source, settings = _JOBS[index]
    return _resources(triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=settings))


# ---- the tests


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return _run(tmp_path_factory.mktemp("triton"))


def _run(cache: Path) -> dict[str, Row]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # compile, rather than remember
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def _version() -> str:
    import triton

    return str(triton.__version__)


def test_every_kernel_compiles_for_every_architecture(compiled: dict[str, Row]) -> None:
    kernels = set()
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert {name.split()[-1] for name in compiled} == kernels
    assert all(set(row) == {f"sm_{a}" for a in ARCHITECTURES} for row in compiled.values())


def test_no_spills_and_no_local_memory(compiled: dict[str, Row]) -> None:
    assert not [f"{name} on {a}" for name, row in compiled.items() for a, values in row.items() if values[-1]]


def test_real_shapes_move_in_16_byte_accesses(compiled: dict[str, Row]) -> None:
    checked = 0
    for name, row in compiled.items():
        op, case, _, kernel = name.split()
        if kernel not in NARROW and next(c for c in SPECS[op].cases if c.name == case).model:
            assert all(values[2] > 0 for values in row.values()), name
            checked += 1
    assert checked > len(compiled) // 3


def test_registers_and_accesses_are_those_of_the_table(compiled: dict[str, Row]) -> None:
    """A change is meant, or it is a loss: `--record` writes the table anew, and the difference is read in review."""
    recorded = json.loads(TABLE.read_text())
    if recorded["triton"] != _version():
        pytest.skip(f"the table was recorded with triton {recorded['triton']}, this is {_version()}")
    found = {name: {a: values[:-1] for a, values in row.items()} for name, row in compiled.items()}
    assert found == recorded["kernels"]


def record() -> None:
    with tempfile.TemporaryDirectory() as cache:
        rows = _run(Path(cache))
    lines = [
        f"  {json.dumps(name)}: {json.dumps({a: values[:-1] for a, values in row.items()})}"
        for name, row in rows.items()
    ]
    head = f'{{"triton": {json.dumps(_version())}, "columns": {json.dumps(COLUMNS)}, "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    if "--record" in sys.argv:
        record()
    else:
        json.dump(_compile_all(), sys.stdout)
