"""Builds csrc/ through CMake when that is possible; the install works without it.

FILA_KERNELS_BUILD_NATIVE:
    auto (default)  build where a compiler, CMake and torch are found; otherwise, or when the build fails, install
                    without the native library, say so, and leave the reason for `python -m fila_kernels.info`
    1               a library that cannot be built is an error
    0               do not try

Nothing here looks for a GPU: what is built depends on the tools installed, never on the machine's devices.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
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


class CannotBuild(Exception):
    """Why there is no native library."""


def wanted() -> str:
    value = os.environ.get("FILA_KERNELS_BUILD_NATIVE", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"FILA_KERNELS_BUILD_NATIVE: expected 0, 1 or auto, got {value!r}")
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

    configure = [cmake, "-S", str(ROOT), f"-DFILA_TORCH_DIR={torch_dir}", "-DCMAKE_BUILD_TYPE=Release"]
    ninja = find_tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # CMake remembers its compiler, so a folder belongs to one set of tools.
    tools = " ".join([*configure, *(os.environ.get(key, "") for key in ("CXX", "CXXFLAGS", "LDFLAGS"))])
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
            if wanted() == "0":
                raise CannotBuild("FILA_KERNELS_BUILD_NATIVE=0 when this was installed")
            built = compile_library(Path(self.build_temp))
        except CannotBuild as reason:
            library.unlink(missing_ok=True)  # never leave an older library behind a failure
            if wanted() == "1":
                raise SystemExit(f"error: FILA_KERNELS_BUILD_NATIVE=1, but: {reason}") from reason
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


setup(
    # A stand-in that makes setuptools run build_ext; CMakeLists.txt names the sources.
    ext_modules=[Extension("fila_kernels.lib.libfila_kernels", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": StableWheel},
)
