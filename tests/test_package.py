"""How the package is put together: layers, the place of `kernels`, and extensions that know nothing of torch."""

import ast
import graphlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# a package imports from its own rank or below, and never in a circle
RANKS = {
    **dict.fromkeys(("_cpu", "_cuda", "kernels", "assets", "savings"), 0),
    **dict.fromkeys(("ops", "schedulers", "data"), 1),
    **dict.fromkeys(("models", "sampling"), 2),
    **dict.fromkeys(("pipelines", "training", "evaluation"), 3),
    **dict.fromkeys(("cli", "drawing", "evaluate", "ranges", "benchmark", "benchmark_models", "benchmark_report"), 4),
}


def sources() -> Iterator[tuple[str, Path]]:
    """Each Python file of the library with its module name."""
    for path in sorted((ROOT / "kolors_fast").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield ".".join(("kolors_fast", *path.relative_to(ROOT).with_suffix("").parts)), path


def imported(module: str, path: Path) -> Iterator[str]:
    """Full names of what a file imports from anywhere in it; `from a import b` gives a.b."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names)


def test_imports_run_one_way() -> None:
    edges: dict[str, set[str]] = {}
    for module, path in sources():
        if module == "kolors_fast.__init__":
            continue  # the public names, from everywhere
        importer = module.split(".")[1]
        assert importer in RANKS, f"{path} belongs to no rank of this test"
        for name in imported(module, path):
            parts = name.split(".")
            if parts[0] != "kolors_fast" or len(parts) < 2 or parts[1] not in RANKS or parts[1] == importer:
                continue
            assert RANKS[parts[1]] <= RANKS[importer], f"{module} must not import {name}"
            edges.setdefault(importer, set()).add(parts[1])
    graphlib.TopologicalSorter(edges).prepare()  # raises on a circle
    assert "kernels" in edges["ops"] and "ops" in edges["models"]  # the scan sees something


def test_importing_the_package_does_not_import_torch() -> None:
    run("import sys, kolors_fast; assert 'torch' not in sys.modules")


def test_kernels_is_a_part_of_the_package(request: pytest.FixtureRequest) -> None:
    import kolors_fast.kernels

    assert Path(kolors_fast.kernels.__file__).parent.name == "kernels"
    # a top-level `kernels` would hide the Hugging Face package of that name from diffusers
    assert request.config.getoption("importmode") == "importlib"
    found = run("import importlib.util; print(importlib.util.find_spec('kernels'))")
    assert str(ROOT) not in found


def test_no_torch_header_is_compiled() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    for path in files:
        headers = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
        assert not [h for h in headers if re.match(r"(torch|ATen|c10|pytorch)\b", h)], path


def test_the_build_needs_no_torch() -> None:
    requires = re.search(r"\[build-system\]\s*requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert requires and "torch" not in requires[1]
    assert not [name for name in imported("setup", ROOT / "setup.py") if name.split(".")[0] == "torch"]


def test_the_extension_runs_without_torch() -> None:
    code = """
        import array, sys
        sys.modules["torch"] = None  # importing it now raises
        from kolors_fast import _cpu
        assert _cpu.isa() in ("avx512bf16", "avx512", "avx2", "generic")
        x, out = array.array("f", range(100)), array.array("f", bytes(400))
        c = array.array("f", [2, 0, 0, 0, 0, 0])
        address = lambda a: a.buffer_info()[0]
        _cpu.guided_step(address(x), 0, 0, address(c), 0, 0, 0, address(out), 0, 100, 0, 0, 0)
        assert list(out) == [2.0 * i for i in range(100)]
    """
    run(code)


USE_THREADS = """
    import array
    from kolors_fast import _cpu
    n = 1 << 17
    x, c = array.array("f", bytes(4 * n)), array.array("f", bytes(24))
    _cpu.guided_step(x.buffer_info()[0], 0, 0, c.buffer_info()[0], 0, 0, 0, x.buffer_info()[0], 0, n, 0, 0, 0)
"""
PRINT_OPENMP = """
    names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
    print(*[name for name in names if "omp" in name.rpartition("/")[2]])
"""


@pytest.mark.parametrize("torch_first", [True, False])
def test_one_openmp_pool_with_torch(torch_first: bool) -> None:
    load = """
        import torch
        torch.ones(1 << 20).add_(1)
    """
    parts = (load, USE_THREADS) if torch_first else (USE_THREADS, load)
    assert len(run(*parts, PRINT_OPENMP, OMP_NUM_THREADS="2").split()) == 1


def test_one_openmp_pool_under_a_mangled_name(tmp_path: Path) -> None:
    """Some torch wheels carry libgomp-<hash>.so.1, which linking libgomp.so.1 would load a second time."""
    original = Path(run("import torch", USE_THREADS, PRINT_OPENMP, OMP_NUM_THREADS="2"))
    mangled = tmp_path / "libgomp-x.so"
    mangled.write_bytes(original.read_bytes().replace(b"libgomp.so.1\0", b"libgomp-x.so\0"))
    load = f"import ctypes; ctypes.CDLL({str(mangled)!r})"
    assert run(load, USE_THREADS, PRINT_OPENMP, OMP_NUM_THREADS="2") == str(mangled)


def test_the_instruction_set_can_be_forced() -> None:
    assert run("from kolors_fast import _cpu; print(_cpu.isa())", KOLORS_FAST_CPU_ISA="generic") == "generic"
    ask = """
        from kolors_fast import _cpu
        try:
            _cpu.isa()
        except RuntimeError as error:
            print(error)
    """
    message = run(ask, KOLORS_FAST_CPU_ISA="sse9")
    assert "KOLORS_FAST_CPU_ISA" in message and "sse9" in message


@pytest.mark.parametrize(
    ("value", "archs"), [("90", ["90"]), ("8.0;90a, 100", ["80", "90a", "100"]), ("ampere", None), (" ; ", None)]
)
def test_cuda_archs_from_the_environment(value: str, archs: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setenv("KOLORS_FAST_CUDA_ARCHS", value)
    if archs is None:
        with pytest.raises(SystemExit, match="KOLORS_FAST_CUDA_ARCHS"):
            setup.cuda_archs()
    else:
        assert setup.cuda_archs() == archs


@pytest.mark.parametrize(
    ("value", "isas"), [("generic", ["generic"]), ("generic;avx2", ["avx2", "generic"]), ("sse9", None), (";", None)]
)
def test_cpu_isas_from_the_environment(value: str, isas: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best first, whatever their order: the first that the CPU has is taken."""
    setup = load_setup()
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("KOLORS_FAST_CPU_ISAS", value)
    if isas is None:
        with pytest.raises(SystemExit, match="KOLORS_FAST_CPU_ISAS"):
            setup.cpu_isas()
    else:
        assert setup.cpu_isas() == isas


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kolors_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def run(*code: str, **environment: str) -> str:
    """Output of code in a fresh interpreter, away from the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, code))],
        cwd=Path(sys.prefix),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
