"""The CUDA kernels compile for every architecture of the default build, without spills and with wide accesses.

No GPU is needed: ptxas reports registers and stack, cuobjdump shows the machine code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90", "100")
SOURCE = """
#include "cuda/group_norm_silu.cuh"
#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/guided_step.cuh"
auto forward = &kolors_fast::group_norm_silu_forward;
auto backward = &kolors_fast::group_norm_silu_backward;
auto step = &kolors_fast::guided_step;
"""
TEMPLATES = {  # 16-byte loads and stores in the code, at least; registers that the planned residency allows
    "group_norm_stats_channels_last": (4, 0, 64),
    "group_norm_stats_planes": (4, 0, 64),
    "group_norm_apply_channels_last": (4, 4, 64),
    "group_norm_apply_planes": (4, 4, 64),
    "group_norm_sums_channels_last": (4, 0, 128),
    "group_norm_sums_planes": (4, 0, 128),
    "group_norm_grad_channels_last": (4, 2, 128),
    "group_norm_grad_planes": (4, 2, 128),
    "guided_step_kernel": (4, 2, 64),
}
PLAIN = {"group_norm_merge": 64, "group_norm_group_means": 64, "group_norm_grad_affine": 64}
TYPES = {"f": 4, "6__half": 8, "13__nv_bfloat16": 8}  # mangled name, elements of a 16-byte word
KERNELS = {*PLAIN, *(f"{name}<{t}, {v}>" for name in TEMPLATES for t, wide in TYPES.items() for v in (1, wide))}


@dataclass
class Build:
    """What the compiler says of one architecture, by kernel: the report of ptxas and the machine code."""

    reports: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)


def kernel_name(mangled: str) -> str:
    match = re.match(r"_ZN11kolors_fast\d+([a-z0-9_]+?)(?:I(f|6__half|13__nv_bfloat16)Li(\d)E|E)", mangled)
    assert match, mangled
    name, element, width = match.groups()
    return f"{name}<{element}, {width}>" if element else name


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


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda")
    cuobjdump = tool("cuobjdump", triton_tools())
    assert cuobjdump, "cuobjdump comes with triton and with the CUDA toolkit, and was found in neither"
    folder = tmp_path_factory.mktemp("ahead_of_time")
    (folder / "kernels.cu").write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}", "-cubin"]
    running = {
        arch: subprocess.Popen(
            [nvcc, *flags, f"-arch=sm_{arch}", str(folder / "kernels.cu"), "-o", str(folder / f"sm_{arch}.cubin")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in ARCHITECTURES
    }
    builds = {}
    for arch, process in running.items():
        report = process.communicate()[1]
        assert process.returncode == 0, report
        assert "warning" not in report, report
        dump = [cuobjdump, "-sass", str(folder / f"sm_{arch}.cubin")]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        builds[arch] = Build(split(report, r"Compiling entry function '(\w+)'"), split(sass, r"Function : (\w+)"))
    return builds


def split(text: str, heading: str) -> dict[str, str]:
    pieces = re.split(heading, text)
    return {kernel_name(name): body for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}", code))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_built(builds: dict[str, Build], arch: str) -> None:
    assert set(builds[arch].reports) == set(builds[arch].code) == KERNELS


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_lives_in_local_memory(builds: dict[str, Build], arch: str) -> None:
    """Neither spilled registers nor arrays that were indexed at run time."""
    for kernel, report in builds[arch].reports.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, f"{kernel}: {report}"
        assert not count(builds[arch].code[kernel], "(LDL|STL)"), kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_allow_the_planned_residency(builds: dict[str, Build], arch: str) -> None:
    for kernel, report in builds[arch].reports.items():
        used = re.search(r"Used (\d+) registers", report)
        name = kernel.partition("<")[0]
        assert used and int(used[1]) <= (PLAIN.get(name) or TEMPLATES[name][2]), f"{kernel}: {report}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wide_kernels_move_16_bytes_at_a_time(builds: dict[str, Build], arch: str) -> None:
    """As many loads as a thread keeps in flight; tensors never pass through generic or byte-wise accesses."""
    for name, (loads, stores, _) in TEMPLATES.items():
        for element, wide in TYPES.items():
            code = builds[arch].code[f"{name}<{element}, {wide}>"]
            assert count(code, r"LDG\.E(\.\w+)*\.128") >= loads, f"{name}<{element}, {wide}>"
            assert count(code, r"STG\.E(\.\w+)*\.128") >= stores, f"{name}<{element}, {wide}>"
            assert not count(code, r"(LD|ST)\.E"), f"{name}<{element}, {wide}>: generic access"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_atomics(builds: dict[str, Build], arch: str) -> None:
    """Every sum has one order, so two runs give the same bits."""
    for kernel, code in builds[arch].code.items():
        assert not count(code, r"(ATOM|ATOMG|ATOMS|RED|REDG)\b"), kernel
