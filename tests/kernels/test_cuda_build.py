"""The build of the CUDA half of csrc/: what csrc/discover.cmake and setup.py decide, and one library for any torch.

Tests that compile need nvcc and the headers of CUTLASS, and no GPU; they are skipped without these.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tools import cuda_units

ROOT = Path(__file__).resolve().parents[2]
MISSING = cuda_units.missing_tool()
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


needs_cmake = pytest.mark.skipif(cuda_units.find_tool("cmake") is None, reason="CMake was not found")


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with no variable of the caller's that it or CMake listens to."""
    spec = importlib.util.spec_from_file_location("fila_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in {*module.VARIABLES, module.NATIVE} - {"PATH", "CXX"}:
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def tools(build, monkeypatch, tmp_path):
    """A folder with an nvcc, CUTLASS's header and a torch, which the environment's variables name."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    header = tmp_path / "cutlass" / "include" / "cutlass" / "cutlass.h"
    for path in (nvcc, header):
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path


def discover(folder: Path, cuda: str = "'13.0'", version: str = "2.13.0+cu130", choice: str = "") -> dict[str, str]:
    """The finds of csrc/discover.cmake beside a torch of this version and CUDA."""
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda}\nhip = None\n"
    )
    return cuda_units.discover(FILA_TORCH_DIR=str(folder), FILA_CUDA=choice)


@needs_cmake
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8.0;9.0a;10.0a", "8.0;9.0a;10.0a"),
        ("8.0 9.0a", "8.0;9.0a"),
        (" 8.6, 8.9+PTX ;8.6", "8.6;8.9+PTX"),
        ("7.5 12.0", "12.0"),
        ("10.0f", "10.0f"),
        ("", "8.0;9.0a;10.0a"),
    ],
)
def test_architectures_are_written_as_pytorch_writes_them(tools, monkeypatch, text, found):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert discover(tools)["FILA_CUDA_ARCHITECTURES"] == found


@needs_cmake
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hopper", "numbers such as 8.0, 9.0a or 10.0a.PTX, separated by semicolons or spaces, got 'Hopper'"),
        ("8.0;90a", ".*got '90a' in '8.0;90a'"),
        ("sm_80", ".*got 'sm_80'"),
        ("7.0;7.5", "an architecture of 8.0 or above, got '7.0;7.5'"),
        (" ", ".*got ' '"),
    ],
)
def test_other_architectures_are_refused(tools, monkeypatch, text, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(RuntimeError, match=f"^TORCH_CUDA_ARCH_LIST: expected {message}"):
        discover(tools)


@needs_cmake
@pytest.mark.parametrize(
    ("choice", "cuda", "built"),
    [("auto", "'13.0'", True), ("auto", "None", False), ("1", "None", True), ("0", "'13.0'", False)],
)
def test_cuda_kernels_follow_the_setting_and_the_torch(tools, monkeypatch, choice, cuda, built):
    monkeypatch.setenv("FILA_KERNELS_BUILD_CUDA", choice)
    found = discover(tools, cuda)
    assert bool(found["FILA_CUDA_ARCHITECTURES"]) == built
    assert bool(found["FILA_WITHOUT_CUDA"]) != built
    if built:
        assert found["FILA_CUDA_ARCHITECTURES"] == "8.0;9.0a;10.0a"
        assert found["CMAKE_CUDA_COMPILER"] == str(tools / "cuda/bin/nvcc")
        assert found["FILA_CUTLASS_DIR"] == str(tools / "cutlass/include")
        assert int(found["FILA_CUDA_JOBS"]) >= 1


@needs_cmake
def test_variables_choose_tools_and_jobs(tools, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("CUTLASS_PATH", str(tools / "cutlass/include"))
    other = tools / "other-nvcc"
    shutil.copy2(tools / "cuda/bin/nvcc", other)
    monkeypatch.setenv("CUDACXX", str(other))
    found = discover(tools)
    assert found["FILA_CUDA_JOBS"] == "3"
    assert found["FILA_CUTLASS_DIR"] == str(tools / "cutlass/include")
    assert found["CMAKE_CUDA_COMPILER"] == str(other)
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(RuntimeError, match="MAX_JOBS: expected a number of 1 or more, got 'all'"):
        discover(tools)
    monkeypatch.setenv("FILA_KERNELS_BUILD_CUDA", "yes")
    with pytest.raises(RuntimeError, match="FILA_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got 'yes'"):
        discover(tools)


@needs_cmake
def test_what_is_missing_is_named(tools, monkeypatch):
    monkeypatch.setenv("CUTLASS_PATH", str(tools / "nowhere"))
    message = "the headers of CUTLASS were not found"
    assert message in discover(tools)["FILA_WITHOUT_CUDA"]
    with pytest.raises(RuntimeError, match=message):
        discover(tools, choice="1")
    with pytest.raises(RuntimeError, match=r"^expected torch 2\.11 or newer, got '2\.10\.1'"):
        discover(tools, version="2.10.1")
    with pytest.raises(RuntimeError, match=r"^torch is not installed where the build runs"):
        cuda_units.discover(FILA_PYTHON="/bin/false")


def test_kernels_that_do_not_compile_are_left_out_unless_demanded(build, monkeypatch, tmp_path, capsys):
    def run_cmake(build_root, *settings):
        if not settings:
            raise build.CannotBuild("compiling csrc with CMake failed: error")
        return settings

    monkeypatch.setattr(build, "run_cmake", run_cmake)
    assert build.compile_library(tmp_path) == ("-DFILA_WITHOUT_CUDA=compiling csrc with CMake failed: error",)
    assert "warning: built without CUDA kernels: compiling csrc" in capsys.readouterr().err
    monkeypatch.setenv("FILA_KERNELS_BUILD_CUDA", "1")
    with pytest.raises(build.CannotBuild, match="compiling csrc"):
        build.compile_library(tmp_path)


@needs_cmake
def test_a_misspelt_setting_stops_the_build(build, monkeypatch, tmp_path):
    """The installation does not go on without what somebody asked for."""
    monkeypatch.setenv("FILA_KERNELS_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="FILA_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got 'yes'"):
        build.run_cmake(tmp_path)


def missing_for_objects() -> str | None:
    if not all(map(cuda_units.find_tool, ("cmake", "ninja"))):
        return "CMake or ninja was not found"
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler was found"


@pytest.mark.skipif(missing_for_objects() is not None, reason=str(missing_for_objects()))
def test_a_compilers_complaint_does_not_break_the_library_without(build, tmp_path):
    """nvcc quotes signatures, whose `)"` ends a plain raw string; semicolons part CMake's lists."""
    reason = build.first_error('Error: no instance of function "f(int)" matches; a \\ and `x`\n )FILA"')
    cmake, ninja = map(cuda_units.find_tool, ("cmake", "ninja"))
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DFILA_PYTHON={sys.executable}", f"-DFILA_WITHOUT_CUDA={reason}"]
    subprocess.run(configure, check=True, capture_output=True)
    unit = "CMakeFiles/fila_kernels.dir/csrc/build_info.cpp.o"
    done = subprocess.run([ninja, "-C", str(tmp_path), unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    expected = 'without_cuda=Error: no instance of function "f(int)" matches, a \\ and `x` )\n'
    assert expected in (tmp_path / "build_info.inc").read_text()
    # A compiler may copy a string's last bytes by instructions.
    assert expected[:-16].encode() in (tmp_path / unit).read_bytes()


def test_the_first_complaint_is_found(build):
    cmake = "-- The CXX compiler\nCMake Error at csrc/discover.cmake:9 (message):\n  torch is\n  missing\n\n\n-- Done\n"
    assert build.first_error(cmake) == "torch is missing"
    assert build.first_error("[1/2] g++ a.cpp\na.cpp:1: error: no\nmore\n") == "error: no more"


def test_demanding_kernels_of_a_library_that_is_not_built_is_an_error(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "FILA_KERNELS_BUILD_NATIVE": "0", "FILA_KERNELS_BUILD_CUDA": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: FILA_KERNELS_BUILD_CUDA=1, but: FILA_KERNELS_BUILD_NATIVE=0 when this was installed" in done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library with the quick units of CUDA, for all architectures."""
    folder = tmp_path_factory.mktemp("cuda")
    cuda_units.configure(folder, units="crop_resize|gate_backward|launch")
    cmake = cuda_units.find_tool("cmake")
    done = subprocess.run([cmake, "--build", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libfila_kernels.so"


@needs_nvcc
@pytest.mark.slow
def test_one_library_loads_beside_any_torch(library):
    """In a process of its own, beside a torch that need not have CUDA: what it says, and CPU tensors work."""
    script = f"""
        import torch
        torch.ops.load_library({str(library)!r})
        print(torch.ops.fila.build_info())
        out = torch.ops.fila.crop_resize(torch.ones(1, 4, 4, 2), torch.tensor([[0., 0., 4., 4.]]), torch.tensor([0]), 2)
        print(out.sum().item(), torch._C._dispatch_has_kernel_for_dispatch_key("fila::crop_resize", "CUDA"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cuda=8.0 9.0a 10.0a\n" in done.stdout
    assert re.search(r"^toolkit=\d+\.\d+", done.stdout, re.MULTILINE)
    assert "8.0 True" in done.stdout


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_its_symbols_are_the_stable_abis_and_none_of_cudas(library):
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", str(library)], text=True)
    symbols = [line.split()[-1] for line in listing.splitlines()]
    foreign = [name for name in symbols if "@" not in name and not name.startswith(("_ITM_", "__gmon"))]
    assert not [name for name in foreign if not name.startswith(("aoti_torch_", "torch_"))]
    assert not [name for name in foreign if "_cuda_" in name], "a torch without CUDA lacks it"
    versions = {name.split("@")[1].strip("@").split("_")[0] for name in symbols if "@" in name}
    assert versions <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC"}
    needed = subprocess.check_output(["objdump", "-p", str(library)], text=True)
    libraries = set(re.findall(r"NEEDED\s+(\S+)", needed))
    assert not [name for name in libraries if "cuda" in name], libraries
    exported = subprocess.check_output(["nm", "-D", "--defined-only", str(library)], text=True)
    assert "cudart" not in exported
    assert "cudaMalloc" not in exported


@needs_nvcc
@pytest.mark.slow
def test_its_cuda_operators_check_their_arguments(library):
    """Called as for CUDA tensors with others: refused by name, and nothing is launched."""
    script = f"""
        import torch
        torch.ops.load_library({str(library)!r})
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        forward, back = torch.ops.fila.crop_resize.default, torch.ops.fila.crop_resize_backward.default
        box, index = torch.tensor([[0., 0., 4., 4.]]), torch.tensor([0])
        calls = (
            lambda: forward.redispatch(keys, torch.ones(1, 4, 4), box, index, 2),
            lambda: forward.redispatch(keys, torch.ones(1, 4, 4, 2), box, index, 2),
            lambda: back.redispatch(keys, torch.ones(1, 2, 2), box, index, 1, 4, 4),
            lambda: back.redispatch(keys, torch.ones(1, 2, 2, 2), box, index, 1, 4, 4),
        )
        for call in calls:
            try:
                call()
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "fila::crop_resize: expected features of shape [B, h, w, C], got [1, 4, 4]",
        "fila::crop_resize: expected features on a CUDA device, got the CPU",
        "fila::crop_resize_backward: expected grad of shape [T, size, size, C], got [1, 2, 2]",
        "fila::crop_resize_backward: expected grad on a CUDA device, got the CPU",
    ], done.stderr


STREAM = """
#include "cuda/launch.h"
extern "C" long stream_of(int device) {
  try {
    return reinterpret_cast<long>(fila::current_stream(device));
  } catch (const std::exception&) {
    return -1;
  }
}
"""
# As libtorch_cuda has it: loaded before this library, but not for it.
TORCH_CUDA = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(64L + device);
  return 0;
}
"""


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_stream_is_found_in_a_library_that_is_loaded_for_others(tmp_path, has_cuda):
    found = cuda_units.discover()
    nvcc, include = found["CMAKE_CUDA_COMPILER"], f"{found['FILA_TORCH_DIR']}/include"
    shared = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    (tmp_path / "torch_cuda.cpp").write_text(TORCH_CUDA)
    (tmp_path / "stream.cpp").write_text("#include <stdexcept>\n" + STREAM)
    torch_cuda, stream = tmp_path / "libtorch_cuda.so", tmp_path / "stream.so"
    subprocess.run(
        [*shared, "-Xlinker=-soname=libtorch_cuda.so", str(tmp_path / "torch_cuda.cpp"), "-o", str(torch_cuda)],
        check=True,
    )
    sources = [str(tmp_path / "stream.cpp"), str(ROOT / "csrc" / "cuda" / "launch.cpp")]
    subprocess.run(
        [*shared, f"-I{ROOT / 'csrc'}", f"-I{include}", "-DTORCH_TARGET_VERSION=0x020b000000000000", *sources, "-o",
         str(stream)], check=True,
    )  # fmt: skip
    script = f"import ctypes; {f'ctypes.CDLL({str(torch_cuda)!r}); ' if has_cuda else ''}"
    script += f"f = ctypes.CDLL({str(stream)!r}).stream_of; f.restype = ctypes.c_long; print(f(3))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ("67" if has_cuda else "-1"), done.stderr


LAUNCH = """
#include <cstdio>
#include <exception>
#include "cuda/crop_resize.h"
int main() {
  const fila::FeatureMaps<float> maps{nullptr, 240, 40, 4, 2, 6, 10, 4};
  const fila::TileBoxes boxes{nullptr, 4, 1, nullptr, true, 1, 3};
  const fila::CropTables tables{3, 5, 2, 6, 10, nullptr, nullptr, nullptr, nullptr};
  for (const bool forward : {true, false}) {
    try {
      if (forward) {
        fila::launch_crop_resize<float>(maps, boxes, 5, {nullptr, 100, 4}, nullptr);
      } else {
        fila::launch_crop_resize_backward<float>({nullptr, 100, 20, 4, 5, 4}, boxes, tables, nullptr, nullptr);
      }
    } catch (const std::exception& error) {
      std::puts(error.what());
    }
  }
}
"""


@needs_nvcc
@pytest.mark.slow
def test_a_launch_that_fails_names_kernel_and_shape(tmp_path):
    """Without a device every launch fails."""
    found = cuda_units.discover()
    (tmp_path / "launch_main.cu").write_text(LAUNCH)
    folder = ROOT / "csrc" / "cuda"
    sources = [folder / "launch.cpp", folder / "crop_resize.cu", folder / "crop_resize_backward.cu"]
    subprocess.run(
        [found["CMAKE_CUDA_COMPILER"], "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", f"-I{ROOT / 'csrc'}",
         f"-I{found['FILA_TORCH_DIR']}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000",
         str(tmp_path / "launch_main.cu"), *map(str, sources), "-ldl", "-o", str(tmp_path / "launch")], check=True,
    )  # fmt: skip
    done = subprocess.run(
        [str(tmp_path / "launch")],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert re.match(r"crop_resize_fwd_kernel for \[3, 5, 2, 6, 10, 4, 4\] failed: .+ \(cudaError\w+\)$", first)
    assert re.match(r"crop_tables_kernel for \[3, 5, 2, 6, 10\] failed: .+ \(cudaError\w+\)$", second)


@needs_nvcc
@pytest.mark.slow
def test_it_holds_code_for_every_architecture(library):
    command = [cuda_units.disassembler(), "--list-elf", str(library)]
    listing = subprocess.check_output(command, text=True)
    assert set(re.findall(r"sm_(\w+)\.cubin", listing)) == {"80", "90a", "100a"}, shlex.join(command)
