"""Builds csrc/ through CMake when that is possible; the install works without it.

FILA_KERNELS_BUILD_NATIVE:
    auto (default)  build where a compiler, CMake and torch are found; otherwise, or when the build fails, install
                    without the native library, say so, and leave the reason for `python -m fila_kernels.info`
    1               a library that cannot be built is an error
    0               do not try

FILA_KERNELS_BUILD_CUDA, CUDA kernels within that library:
    auto (default)  where the installed torch is a CUDA build, and nvcc and the headers of CUTLASS are found
    1               beside any torch; what is missing is an error
    0               none
TORCH_CUDA_ARCH_LIST names the architectures as PyTorch writes them ("8.0;9.0a;10.0a" unless set); CUTLASS_PATH a folder
with CUTLASS (else the package nvidia-cutlass); MAX_JOBS how many units of CUDA are compiled at a time.

Nothing here looks for a GPU: what is built depends on the tools installed, never on the machine's devices.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libfila_kernels.so"
FOLDER = Path("fila_kernels", "lib")
REASON = "not_built.txt"
OLDEST_TORCH = (2, 11)  # the stable ABI that CMakeLists.txt targets
CUDA_ARCHITECTURES = "8.0;9.0a;10.0a"
OLDEST_CAPABILITY = (8, 0)
UNIT_BYTES = 4 * 2**30  # what compiling one unit of CUDA may take


class CannotBuild(Exception):
    """Why there is no native library."""


NATIVE, CUDA = "FILA_KERNELS_BUILD_NATIVE", "FILA_KERNELS_BUILD_CUDA"


def wanted(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: expected 0, 1 or auto, got {value!r}")
    return value


def find_torch() -> Path:
    """The folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(
            "torch is not installed where the build runs (pip isolates builds: install torch first, "
            "then use pip install --no-build-isolation)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"expected torch 2.11 or newer, got {version}")
    return Path(spec.origin).parent


def find_tool(name: str) -> str | None:
    """A program of this Python's environment, else of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def find_nvcc() -> Path | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, PATH, then the usual place."""
    home = os.environ.get("CUDA_HOME")
    named = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    found = next((path for path in map(shutil.which, filter(None, named)) if path), None)
    return Path(found) if found else None


def find_cutlass() -> Path | None:
    """The folder to include CUTLASS from: CUTLASS_PATH or its `include`, else that of the package nvidia-cutlass."""
    named = os.environ.get("CUTLASS_PATH")
    if named:
        folders = [Path(named, "include"), Path(named)]
    else:
        try:
            package = importlib.metadata.distribution("nvidia-cutlass")
        except importlib.metadata.PackageNotFoundError:
            return None
        folders = [Path(str(package.locate_file("cutlass_library/source/include")))]
    return next((folder.resolve() for folder in folders if (folder / "cutlass" / "cutlass.h").exists()), None)


def is_cuda_build(torch_dir: Path) -> bool:
    """Whether torch was built with CUDA, as its version.py says."""
    return re.search(r"^cuda\b[^=]*= *['\"]", (torch_dir / "version.py").read_text(), re.MULTILINE) is not None


def parse_architectures(text: str) -> list[str]:
    """["8.0", "9.0a", "10.0a+PTX"] from a list as PyTorch writes it; those too old for any kernel here are left out."""
    kept = []
    for word in re.split(r"[;,\s]+", text.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if number is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0, 9.0a or 10.0a+PTX, separated by semicolons or "
                f"spaces, got {word!r} in {text!r}"
            )
        if (int(number[1]), int(number[2])) < OLDEST_CAPABILITY:
            print(f"warning: TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or above, {word} is left out", file=sys.stderr)
        elif word not in kept:
            kept.append(word)
    if not kept:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected an architecture of 8.0 or above, got {text!r}")
    return kept


def jobs() -> int:
    """Units of CUDA to compile at a time: MAX_JOBS, else as many as cores and memory are for."""
    named = os.environ.get("MAX_JOBS", "")
    if named and not (named.isdecimal() and int(named)):
        raise SystemExit(f"MAX_JOBS: expected a number of 1 or more, got {named!r}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(named) if named else max(1, min(os.cpu_count() or 1, memory // UNIT_BYTES))


def cuda_settings(torch_dir: Path) -> list[str]:
    """CMake's settings for CUDA kernels, or for a library without, which can say why."""
    choice = wanted(CUDA)
    try:
        if choice == "0":
            raise CannotBuild(f"{CUDA}=0 when it was built")
        if choice == "auto" and not is_cuda_build(torch_dir):
            raise CannotBuild(f"it was built beside a torch without CUDA ({CUDA}=1 builds them nevertheless)")
        nvcc, cutlass = find_nvcc(), find_cutlass()
        if nvcc is None:
            raise CannotBuild("nvcc was not found (looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda)")
        if cutlass is None:
            raise CannotBuild(
                "the headers of CUTLASS were not found (pip install --no-deps nvidia-cutlass==4.2.0.0; "
                "CUTLASS_PATH names another copy)"
            )
    except CannotBuild as reason:
        if choice == "1":
            raise
        return without_cuda(reason)
    architectures = parse_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
    return [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DFILA_CUTLASS_DIR={cutlass}",
        f"-DFILA_CUDA_ARCHITECTURES={';'.join(architectures)}",
        f"-DFILA_CUDA_JOBS={jobs()}",
    ]


def without_cuda(reason: CannotBuild) -> list[str]:
    """The setting that keeps the reason: one line, one value for CMake, no end of CMakeLists.txt's raw string."""
    text = " ".join(str(reason).replace(";", ",").replace(')FILA"', ")").split())
    return [f"-DFILA_WITHOUT_CUDA={text}"]


def first_error(output: str) -> str:
    """The first complaint of a build's output, on one line."""
    start = output.lower().find("error")
    return " ".join(output[max(start, 0) :].split())[:300]


def compile_library(build_root: Path) -> Path:
    if sys.platform != "linux":
        raise CannotBuild(f"the native library is built on Linux only, this is {sys.platform}")
    torch_dir = find_torch()
    cmake = find_tool("cmake")
    if cmake is None:
        raise CannotBuild("CMake was not found (pip install cmake)")
    if "CXX" not in os.environ and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise CannotBuild("no C++ compiler was found (looked for c++, g++ and clang++; CXX names another)")

    ninja = find_tool("ninja")
    configure = [cmake, "-S", str(ROOT), f"-DFILA_TORCH_DIR={torch_dir}", "-DCMAKE_BUILD_TYPE=Release"]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        return run_cmake(cmake, [*configure, *cuda_settings(torch_dir)], build_root)
    except CannotBuild as reason:
        if wanted(CUDA) != "auto":
            raise
        print(f"warning: building without CUDA kernels: {reason}", file=sys.stderr)
        return run_cmake(cmake, [*configure, *without_cuda(reason)], build_root)


def run_cmake(cmake: str, configure: list[str], build_root: Path) -> Path:
    """Configure and compile in a folder of these settings' own; the library."""
    # CMake remembers its compilers, so a folder belongs to one set of tools.
    variables = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
    tools = " ".join([*configure, *(os.environ.get(key, "") for key in variables)])
    folder = build_root / ("cmake-" + hashlib.sha256(tools.encode()).hexdigest()[:12])
    folder.mkdir(parents=True, exist_ok=True)
    steps = {"configuring": [*configure, "-B", str(folder)], "compiling": [cmake, "--build", str(folder)]}
    for step, command in steps.items():
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            raise CannotBuild(f"{step} csrc with CMake failed: {first_error(done.stdout)}")
    return folder / LIBRARY


class BuildNative(build_ext):
    """Puts the library, or the reason why there is none, into fila_kernels/lib."""

    def run(self) -> None:
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        library, note = target / LIBRARY, target / REASON
        try:
            if wanted(NATIVE) == "0":
                raise CannotBuild(f"{NATIVE}=0 when this was installed")
            built = compile_library(Path(self.build_temp))
        except CannotBuild as reason:
            library.unlink(missing_ok=True)  # never leave an older library behind a failure
            demanded = [f"{variable}=1" for variable in (NATIVE, CUDA) if wanted(variable) == "1"]
            if demanded:
                raise SystemExit(f"error: {' and '.join(demanded)}, but: {reason}") from reason
            print(f"warning: installing without the native library: {reason}", file=sys.stderr)
            note.write_text(f"{reason}\n")
            return
        # In one step: a process that loads or runs the old library meanwhile keeps a whole file.
        fresh = target / f"{LIBRARY}.new"
        shutil.copy2(built, fresh)
        os.replace(fresh, library)
        note.unlink(missing_ok=True)

    def _target(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib)) / FOLDER

    def get_outputs(self) -> list[str]:
        target = self._target()
        return [str(path) for path in sorted(target.glob("*"))] if target.is_dir() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*")))]


class StableWheel(bdist_wheel):
    """The library depends on the platform, but on no version of Python; without it the wheel is plain Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = (Path(self.bdist_dir or "") / FOLDER / LIBRARY).exists()
        platform = super().get_tag()[2]
        return "py3", "none", platform if built else "any"


if __name__ == "__main__":
    setup(
        # A stand-in that makes setuptools run build_ext; CMakeLists.txt names the sources.
        ext_modules=[Extension("fila_kernels.lib.libfila_kernels", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": StableWheel},
    )
