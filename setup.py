"""Builds csrc/ through CMake where that is possible; the installation works without it.

FILA_KERNELS_BUILD_NATIVE, the compiled library:
    auto (default)  built where CMake, a C++ compiler and torch are found. Otherwise, or when the build fails, the
                    installation goes on without it and keeps the reason for `python -m fila_kernels.info`
    1               a library that cannot be built is an error
    0               not built

csrc/discover.cmake finds torch, CUDA and CUTLASS; docs/cuda.md lists the variables that it reads.
"""

import hashlib
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
FOLDER = Path("fila_kernels", "lib")
LIBRARY, REASON = "libfila_kernels.so", "not_built.txt"
NATIVE, CUDA = "FILA_KERNELS_BUILD_NATIVE", "FILA_KERNELS_BUILD_CUDA"
# CMake remembers what it found, so each set of these has a build folder of its own.
VARIABLES = (
    "PATH", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME", "CUDAFLAGS", "CUDAHOSTCXX", "CUTLASS_PATH",
    "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", CUDA,
)  # fmt: skip


class CannotBuild(Exception):
    """The reason why the native library was not built."""


def wanted(variable: str) -> str:
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: expected 0, 1 or auto, got {value!r}")
    return value


def find_tool(name: str) -> str | None:
    """A program of this Python's environment, else of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def first_error(output: str) -> str:
    """The first complaint in the output of CMake or a compiler, on one line."""
    found = re.search(r"CMake Error at .*?:\n(.*?)\n\n\S", output + "\n\n.", re.DOTALL)
    text = found[1] if found else output[max(output.lower().find("error"), 0) :]
    return " ".join(text.split())[:300]


def run_cmake(build_root: Path, *settings: str) -> Path:
    """Configures and compiles csrc; returns the library's path."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None:
        raise CannotBuild("CMake was not found (pip install cmake)")
    configure = [cmake, "-S", str(ROOT), "-DCMAKE_BUILD_TYPE=Release", f"-DFILA_PYTHON={sys.executable}", *settings]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    key = "\n".join([*configure, *(os.environ.get(variable, "") for variable in VARIABLES)])
    folder = build_root / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    steps = {"configuring": [*configure, "-B", str(folder)], "compiling": [cmake, "--build", str(folder)]}
    for step, command in steps.items():
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            complaint = first_error(done.stdout)
            if re.match(r"[A-Z_]+: expected ", complaint):  # a setting that nobody can have meant
                raise SystemExit(f"error: {complaint}")
            print(done.stdout, file=sys.stderr)
            raise CannotBuild(f"{step} csrc with CMake failed: {complaint}")
    return folder / LIBRARY


def compile_library(build_root: Path) -> Path:
    """The library; without CUDA kernels where these fail to compile and were not demanded."""
    try:
        return run_cmake(build_root)
    except CannotBuild as reason:
        if wanted(CUDA) != "auto":
            raise
        library = run_cmake(build_root, f"-DFILA_WITHOUT_CUDA={reason}")
        print(f"warning: built without CUDA kernels: {reason}", file=sys.stderr)
        return library


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
            library.unlink(missing_ok=True)  # an older library would outlive its source
            demanded = [f"{variable}=1" for variable in (NATIVE, CUDA) if wanted(variable) == "1"]
            if demanded:
                raise SystemExit(f"error: {' and '.join(demanded)}, but: {reason}") from reason
            print(f"warning: installing without the native library: {reason}", file=sys.stderr)
            note.write_text(f"{reason}\n")
            return
        # The library is replaced in one step: a process that has the old one open keeps a whole file.
        fresh = target / f"{LIBRARY}.new"
        shutil.copy2(built, fresh)
        os.replace(fresh, library)
        note.unlink(missing_ok=True)

    def _target(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / FOLDER

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._target().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class StableWheel(bdist_wheel):
    """The library depends on the platform but on no version of Python; without it the wheel is plain Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = (Path(self.bdist_dir or "") / FOLDER / LIBRARY).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":
    setup(
        # A stand-in that makes setuptools run build_ext; CMakeLists.txt names the sources.
        ext_modules=[Extension("fila_kernels.lib.libfila_kernels", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": StableWheel},
    )
