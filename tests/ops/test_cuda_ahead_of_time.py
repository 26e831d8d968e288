"""The CUDA kernels compile for every architecture of the default build, without spills and with wide accesses.

No GPU is needed: ptxas reports registers and stack, cuobjdump shows the machine code. What is compiled is what
csrc/bindings_cuda.cu includes and exports. When a change of the table is meant:

    python tests/ops/test_cuda_ahead_of_time.py --record
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
TABLE = Path(__file__).with_name("cuda_resources.json")
ARCHITECTURES = ("80", "90", "100")
COLUMNS = ("registers", "shared bytes", "16-byte loads in the code", "16-byte stores in the code")


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel on one architecture: the report of ptxas and the machine code."""

    report: str
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.code))

    def resources(self) -> list[int]:
        """COLUMNS"""
        registers, shared = re.search(r"Used (\d+) registers", self.report), re.search(r"(\d+) bytes smem", self.report)
        assert registers, self.report
        accesses = [self.count(rf"{access}\.E(\.\w+)*\.128") for access in ("LDG", "STG")]
        return [int(registers[1]), int(shared[1]) if shared else 0, *accesses]


Build = dict[str, Kernel]  # readable name -> kernel


def tool(name: str, *elsewhere: Path) -> str | None:
    homes = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    for folder in (*homes, None, Path("/usr/local/cuda/bin"), *elsewhere):
        found = shutil.which(name, path=str(folder) if folder else None)
        if found:
            return found
    return None


def triton_tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def sources() -> dict[str, str]:
    """One file for each header that the bindings include, with the launchers that they export from it."""
    bindings = (CSRC / "bindings_cuda.cu").read_text()
    exported = re.findall(r"&kolors_fast::(\w+)", bindings)
    files = {}
    for header in re.findall(r'#include "cuda/(\w+)\.cuh"', bindings):
        here = [name for name in exported if re.search(rf"\b{name}\(", (CSRC / f"cuda/{header}.cuh").read_text())]
        lines = [f"auto pointer_{name} = &kolors_fast::{name};" for name in here]
        files[header] = "\n".join([f'#include "cuda/{header}.cuh"', *lines, ""])
    return files


def compile_all(nvcc: str, cuobjdump: str, folder: Path) -> dict[str, Build]:
    files = sources()
    for header, text in files.items():
        (folder / f"{header}.cu").write_text(text)
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}", "-cubin"]

    def one(job: tuple[str, str]) -> Build:
        header, arch = job
        cubin = folder / f"{header}.{arch}.cubin"
        built = subprocess.run(
            [nvcc, *flags, f"-arch=sm_{arch}", str(folder / f"{header}.cu"), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
        sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        reports = split(built.stderr, r"Compiling entry function '(\w+)'")
        code = split(sass, r"Function : (\w+)")
        assert reports.keys() == code.keys()
        return {name: Kernel(reports[name], code[name]) for name in reports}

    jobs = [(header, arch) for arch in ARCHITECTURES for header in files]
    builds: dict[str, Build] = {arch: {} for arch in ARCHITECTURES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, arch), build in zip(jobs, pool.map(one, jobs), strict=True):
            builds[arch] |= build
    return builds


def split(text: str, heading: str) -> dict[str, str]:
    pieces = re.split(heading, text)
    return dict(zip(readable(pieces[1::2]), pieces[2::2], strict=True))


def readable(mangled: list[str]) -> list[str]:
    """`apply<__half, 8>` for the kernel of that name in the namespace kolors_fast."""
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^(void )?kolors_fast::|\(.*$|\(anonymous namespace\)::", "", name) for name in names.splitlines()]


def compiler() -> str:
    nvcc = tool("nvcc")
    assert nvcc
    version = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    assert version
    return version[1]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda")
    cuobjdump = tool("cuobjdump", triton_tools())
    assert cuobjdump, "cuobjdump comes with triton and with the CUDA toolkit, and was found in neither"
    return compile_all(nvcc, cuobjdump, tmp_path_factory.mktemp("ahead_of_time"))


def every(builds: dict[str, Build]) -> list[tuple[str, Kernel]]:
    return [(f"{name} on sm_{arch}", kernel) for arch, build in builds.items() for name, kernel in build.items()]


def test_every_header_exports_something() -> None:
    files = sources()
    assert files and all("&kolors_fast::" in text for text in files.values())


def test_every_kernel_is_built(builds: dict[str, Build]) -> None:
    text = "\n".join(path.read_text() for path in (CSRC / "cuda").glob("*.cuh"))
    declared = set(re.findall(r"__global__[^(;]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", text))
    for build in builds.values():
        assert {name.partition("<")[0] for name in build} == declared


def test_nothing_lives_in_local_memory(builds: dict[str, Build]) -> None:
    """Neither spilled registers nor arrays that were indexed at run time."""
    for name, kernel in every(builds):
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.report, f"{name}: {kernel}"
        assert not kernel.count("(LDL|STL)"), name


def test_two_blocks_share_a_multiprocessor(builds: dict[str, Build]) -> None:
    """65,536 registers for two blocks of 256 threads: at most 128 each, or latency has nothing to hide behind."""
    assert not [name for name, kernel in every(builds) if kernel.resources()[0] > 128]


def test_wide_kernels_move_16_bytes_at_a_time(builds: dict[str, Build]) -> None:
    """Of kernels that exist for a 16-byte word and for one element, the first; generic accesses are in neither."""
    wide = [(name, kernel) for name, kernel in every(builds) if re.search(r", [48]\W", name)]
    assert wide
    for name, kernel in wide:
        assert kernel.resources()[2] > 0, name
        assert not kernel.count(r"(LD|ST)\.E"), f"{name}: generic access"


def test_no_atomics(builds: dict[str, Build]) -> None:
    """Every sum has one order, so two runs give the same bits."""
    for name, kernel in every(builds):
        assert not kernel.count(r"(ATOM|ATOMG|ATOMS|RED|REDG)\b"), name


def table(builds: dict[str, Build]) -> dict[str, dict[str, list[int]]]:
    names = sorted({name for build in builds.values() for name in build})
    return {name: {f"sm_{arch}": build[name].resources() for arch, build in builds.items()} for name in names}


def test_resources_are_those_of_the_table(builds: dict[str, Build]) -> None:
    """A change is meant, or it is a loss: `--record` writes the table anew, and the difference is read in review."""
    recorded = json.loads(TABLE.read_text())
    if recorded["nvcc"] != compiler():
        pytest.skip(f"the table was recorded with nvcc {recorded['nvcc']}, this is {compiler()}")
    assert table(builds) == recorded["kernels"]


def record() -> None:
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump", triton_tools())
    assert nvcc and cuobjdump
    with tempfile.TemporaryDirectory() as folder:
        rows = table(compile_all(nvcc, cuobjdump, Path(folder)))
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = f'{{"nvcc": {json.dumps(compiler())}, "columns": {json.dumps(COLUMNS)}, "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__" and "--record" in sys.argv:
    record()
