"""Build of kolors_fast: `kernels/` becomes `kolors_fast.kernels`, `csrc/` the extensions `_cpu` and `_cuda`.

No torch here: the extensions take raw pointers. Ninja compiles into `build/`, and again only what changed.
Environment: MAX_JOBS (parallel compilers), CXX, CUDA_HOME, KOLORS_FAST_CUDA_ARCHS (e.g. "80;90", or "none" to leave
the CUDA extension out), KOLORS_FAST_CPU_ISAS (e.g. "avx2;generic"; all by default).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = ("80", "90", "100")
GIB_PER_COMPILER = 1.0  # the largest host compiler process takes 0.5 GiB, nvcc's 0.9 per architecture

CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    # GCC 12 reports its own intrinsics as uninitialised; no vector crosses an object file
    *("-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# every kernel source is compiled once per instruction set; the choice is made at run time, the best first
ISA_FLAGS = {
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "avx512": AVX512_FLAGS,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}
ISA_INDEPENDENT = ("isa.cpp", "parallel.cpp", "sample.cpp")


def find_nvcc() -> Path | None:
    """nvcc under CUDA_HOME, on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc.resolve() for nvcc in candidates if nvcc.is_file()), None)


def cuda_archs() -> list[str]:
    """KOLORS_FAST_CUDA_ARCHS, else the local GPUs' own, else the default list."""
    wanted = os.environ.get("KOLORS_FAST_CUDA_ARCHS")
    if wanted:
        archs = [arch.replace(".", "") for arch in re.split(r"[;,\s]+", wanted.strip()) if arch]
        bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
        if bad or not archs:
            raise SystemExit(f'KOLORS_FAST_CUDA_ARCHS must look like "80;90;100", got "{wanted}"')
        return archs
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        local = sorted({cap.strip().replace(".", "") for cap in found.splitlines() if cap.strip()}, key=int)
    except (OSError, subprocess.SubprocessError, ValueError):
        local = []
    return local or list(DEFAULT_CUDA_ARCHS)


def cpu_isas() -> list[str]:
    """KOLORS_FAST_CPU_ISAS, else all that the architecture may have; the best first."""
    possible = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    wanted = os.environ.get("KOLORS_FAST_CPU_ISAS")
    if not wanted:
        return possible
    isas = wanted.split(";")
    if not set(isas) <= set(possible):
        raise SystemExit(f'KOLORS_FAST_CPU_ISAS must name some of "{";".join(possible)}", got "{wanted}"')
    return [isa for isa in possible if isa in isas]


def job_count() -> int:
    """Parallel compilers that the processors and the free memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(int(memory[1]) / 2**20 / GIB_PER_COMPILER) if memory else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def pybind11_headers(build: Path) -> Path:
    """A copy of pybind11's headers at a path that outlives pip's temporary build environment.

    With the original path every isolated build would look like a new one to ninja.
    """
    import pybind11

    headers = build / f"pybind11-{pybind11.__version__}"
    if not headers.is_dir():
        partial = Path(f"{headers}.{os.getpid()}")
        shutil.copytree(pybind11.get_include(), partial)
        os.replace(partial, headers)
    return headers


class NinjaFile:
    """A build.ninja under construction."""

    def __init__(self, build: Path) -> None:
        self.build = build
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: list[str], *, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def target(self, out: Path, rule: str, inputs: list[Path], flags: list[str] | None = None) -> Path:
        def escaped(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        self.lines.append(f"build {escaped(out)}: {rule} {' '.join(map(escaped, inputs))}")
        if flags:
            self.lines.append(f"  flags = {' '.join(flags)}")
        return out

    def run(self, jobs: int) -> None:
        path = self.build / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        if subprocess.run([*command, "-C", str(self.build), "-j", str(jobs)]).returncode:
            raise SystemExit("Compiling the extensions failed; the compiler's message is above.")


class NinjaBuildExt(build_ext):
    """Compiles both extensions in one ninja run, then puts each where setuptools expects it."""

    def run(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SystemExit(f"kolors_fast builds on Linux only, this is {sys.platform}.")
        unwanted = os.environ.get("KOLORS_FAST_CUDA_ARCHS") == "none"
        nvcc = None if unwanted else find_nvcc()
        archs = cuda_archs() if nvcc else []
        if nvcc:
            cuda_status = "built for " + ", ".join(f"sm_{arch}" for arch in archs)
        else:
            missing = "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
            cuda_status = f"not built: {'KOLORS_FAST_CUDA_ARCHS=none' if unwanted else missing}"
            self.extensions = [extension for extension in self.extensions if extension.name != "kolors_fast._cuda"]
        jobs = job_count()
        print(f"kolors_fast: CUDA extension {cuda_status}; {jobs} parallel compilers", flush=True)
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build = ROOT / "build" / f"ninja-{tag}"
        self.build.mkdir(parents=True, exist_ok=True)
        ninja = NinjaFile(self.build)
        includes = [
            f"-I{CSRC}",
            f"-isystem {pybind11_headers(self.build)}",
            f"-isystem {sysconfig.get_path('include')}",
        ]
        self.add_cpu(ninja, includes, cuda_status)
        if nvcc:
            self.add_cuda(ninja, includes, nvcc, archs, jobs)
        ninja.run(jobs)
        super().run()

    def built(self, extension: str) -> Path:
        return self.build / f"{extension}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def add_cpu(self, ninja: NinjaFile, includes: list[str], cuda_status: str) -> None:
        cxx = os.environ.get("CXX", "g++")
        if not shutil.which(cxx.split()[0]):
            raise SystemExit(f"kolors_fast needs a C++17 compiler: {cxx} was not found (CXX names another)")
        ninja.rule("cxx", [cxx, "-MMD -MF $out.d", *CXX_FLAGS, "$flags -c $in -o $out"])
        ninja.rule("link", [cxx, "-shared -Wl,-O1 -Wl,--as-needed $in -o $out -ldl"], depfile=False)
        status = f"'-DKOLORS_FAST_CUDA_STATUS=\"{cuda_status}\"'".replace(":", "$:")
        bindings = CSRC / "bindings_cpu.cpp"
        objects = [ninja.target(self.build / "bindings_cpu.o", "cxx", [bindings], [*includes, status, "-Os"])]
        isas = cpu_isas()
        every = f"'-DKOLORS_FAST_ISAS(ISA)={' '.join(f'ISA({isa})' for isa in isas)}'"
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.name in ISA_INDEPENDENT:
                objects.append(ninja.target(self.build / f"{source.stem}.o", "cxx", [source], [every]))
                continue
            for isa in isas:
                out = self.build / f"{source.stem}.{isa}.o"
                objects.append(ninja.target(out, "cxx", [source], [*ISA_FLAGS[isa], f"-DKOLORS_FAST_ISA={isa}"]))
        ninja.target(self.built("_cpu"), "link", objects)

    def add_cuda(self, ninja: NinjaFile, includes: list[str], nvcc: Path, archs: list[str], jobs: int) -> None:
        flags = ["-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr -cudart static"]
        flags += [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        # PTX of the newest plain architecture runs on GPUs that are newer still
        plain = [arch for arch in archs if arch.isdigit()]
        flags += [f"-gencode arch=compute_{max(plain, key=int)},code=compute_{max(plain, key=int)}"] if plain else []
        flags += [f"--threads {min(jobs, len(archs))}"]
        host = f"-ccbin {os.environ['CXX']}" if os.environ.get("CXX") else ""
        ninja.rule("nvcc", [str(nvcc), host, "-MMD -MF $out.d", *flags, "$flags -c $in -o $out"])
        ninja.rule("nvcc_link", [str(nvcc), host, "-shared -cudart static $in -o $out"], depfile=False)
        sources = [CSRC / "bindings_cuda.cu", *sorted((CSRC / "cuda").glob("*.cu"))]
        objects = [ninja.target(self.build / f"{source.stem}.cu.o", "nvcc", [source], includes) for source in sources]
        ninja.target(self.built("_cuda"), "nvcc_link", objects)

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(self.built(extension.name.rpartition(".")[2]), partial)
        os.replace(partial, target)  # a process that has the old one loaded keeps it


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["kolors_fast", "kolors_fast.*"]), "kolors_fast.kernels"],
        package_dir={"kolors_fast.kernels": "kernels"},
        ext_modules=[Extension("kolors_fast._cpu", sources=[]), Extension("kolors_fast._cuda", sources=[])],
        cmdclass={"build_ext": NinjaBuildExt},
    )
