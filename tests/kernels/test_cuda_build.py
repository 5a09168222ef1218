"""How the CUDA half of csrc/ is built: what setup.py decides, and one library for any torch.

Compiling needs nvcc and the headers of CUTLASS, and no GPU; without them those tests are skipped.
"""

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


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with no variable of the caller's that it listens to."""
    for name in ("CUDACXX", "CUDA_HOME", "CUTLASS_PATH", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "FILA_KERNELS_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return cuda_units.setup_module()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8.0;9.0a;10.0a", ["8.0", "9.0a", "10.0a"]),
        ("8.0 9.0a", ["8.0", "9.0a"]),
        (" 8.6, 8.9+PTX ;8.6", ["8.6", "8.9+PTX"]),
        ("7.5 12.0", ["12.0"]),
        ("10.0f", ["10.0f"]),
    ],
)
def test_architectures_are_written_as_pytorch_writes_them(build, text, found):
    assert build.parse_architectures(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hopper", "expected numbers such as 8.0, 9.0a or 10.0a.PTX, separated by semicolons or spaces, got 'Hopper'"),
        ("8.0;90a", "got '90a' in '8.0;90a'"),
        ("sm_80", "got 'sm_80'"),
        ("7.0;7.5", "an architecture of 8.0 or above, got '7.0;7.5'"),
        (" ", "got ''"),
    ],
)
def test_other_architectures_are_refused(build, text, message):
    with pytest.raises(SystemExit, match=message):
        build.parse_architectures(text)


def torch_of(folder: Path, cuda: str) -> Path:
    (folder / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda}\nhip = None\n")
    return folder


def settings_of(build, monkeypatch, torch_dir: Path, **variables: str) -> dict[str, str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return dict(setting.removeprefix("-D").split("=", 1) for setting in build.cuda_settings(torch_dir))


@pytest.fixture
def tools(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(build, "find_cutlass", lambda: Path("/cutlass/include"))


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("choice", "cuda", "built"),
    [("auto", "'13.0'", True), ("auto", "None", False), ("1", "None", True), ("0", "'13.0'", False)],
)
def test_cuda_kernels_follow_the_setting_and_the_torch(build, monkeypatch, tmp_path, choice, cuda, built):
    found = settings_of(build, monkeypatch, torch_of(tmp_path, cuda), FILA_KERNELS_BUILD_CUDA=choice)
    assert ("FILA_CUDA_ARCHITECTURES" in found) == built
    assert ("FILA_WITHOUT_CUDA" in found) != built
    if built:
        assert found["FILA_CUDA_ARCHITECTURES"] == "8.0;9.0a;10.0a"
        assert found["FILA_CUTLASS_DIR"] == "/cutlass/include"
        assert int(found["FILA_CUDA_JOBS"]) >= 1


@pytest.mark.usefixtures("tools")
def test_variables_choose_architectures_and_jobs(build, monkeypatch, tmp_path):
    found = settings_of(
        build, monkeypatch, torch_of(tmp_path, "'12.8'"), TORCH_CUDA_ARCH_LIST="9.0a+PTX 8.0", MAX_JOBS="3"
    )
    assert found["FILA_CUDA_ARCHITECTURES"] == "9.0a+PTX;8.0"
    assert found["FILA_CUDA_JOBS"] == "3"
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number of 1 or more, got 'all'"):
        settings_of(build, monkeypatch, tmp_path, MAX_JOBS="all")
    with pytest.raises(SystemExit, match="FILA_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got 'yes'"):
        settings_of(build, monkeypatch, tmp_path, FILA_KERNELS_BUILD_CUDA="yes")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(("tool", "name"), [("find_nvcc", "nvcc"), ("find_cutlass", "headers of CUTLASS")])
def test_what_is_missing_is_named(build, monkeypatch, tmp_path, tool, name):
    monkeypatch.setattr(build, tool, lambda: None)
    torch_dir = torch_of(tmp_path, "'13.0'")
    assert f"{name} w" in settings_of(build, monkeypatch, torch_dir)["FILA_WITHOUT_CUDA"]
    with pytest.raises(build.CannotBuild, match=f"{name} (was|were) not found"):
        settings_of(build, monkeypatch, torch_dir, FILA_KERNELS_BUILD_CUDA="1")


def test_tools_are_looked_for_where_variables_say(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc
    header = tmp_path / "checkout" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    for folder in (tmp_path / "checkout", tmp_path / "checkout" / "include"):
        monkeypatch.setenv("CUTLASS_PATH", str(folder))
        assert build.find_cutlass() == header.parent.parent
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert build.find_cutlass() is None


def test_kernels_that_do_not_compile_are_left_out_unless_demanded(build, monkeypatch, tmp_path, capsys):
    def run_cmake(cmake, settings, folder):
        if any(setting.startswith("-DFILA_CUDA_ARCHITECTURES=") for setting in settings):
            raise build.CannotBuild("compiling csrc with CMake failed: error")
        return tuple(setting for setting in settings if setting.startswith("-DFILA_WITHOUT_CUDA"))

    monkeypatch.setattr(build, "find_torch", lambda: torch_of(tmp_path, "'13.0'"))
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(build, "find_cutlass", lambda: Path("/cutlass/include"))
    monkeypatch.setattr(build, "find_tool", lambda name: name)
    monkeypatch.setattr(build, "run_cmake", run_cmake)
    assert build.compile_library(tmp_path) == ("-DFILA_WITHOUT_CUDA=compiling csrc with CMake failed: error",)
    assert "warning: building without CUDA kernels: compiling csrc" in capsys.readouterr().err
    monkeypatch.setenv("FILA_KERNELS_BUILD_CUDA", "1")
    with pytest.raises(build.CannotBuild, match="compiling csrc"):
        build.compile_library(tmp_path)


def missing_for_objects() -> str | None:
    tools = cuda_units.setup_module()
    if not all(map(tools.find_tool, ("cmake", "ninja"))):
        return "CMake or ninja was not found"
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler was found"


@pytest.mark.skipif(missing_for_objects() is not None, reason=str(missing_for_objects()))
def test_a_compilers_complaint_does_not_break_the_library_without(build, tmp_path):
    """nvcc quotes signatures, whose `)"` ends a plain raw string; semicolons part CMake's lists."""
    complaint = 'no instance of function "f(int)" matches; a \\ and `x`\n'
    cmake, ninja = build.find_tool("cmake"), build.find_tool("ninja")
    (reason,) = build.without_cuda(build.CannotBuild(complaint + ')FILA"'))
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    subprocess.run([*configure, f"-DFILA_TORCH_DIR={build.find_torch()}", reason], check=True, capture_output=True)
    unit = "CMakeFiles/fila_kernels.dir/csrc/build_info.cpp.o"
    done = subprocess.run([ninja, "-C", str(tmp_path), unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    expected = 'without_cuda=no instance of function "f(int)" matches, a \\ and `x` )\n'
    assert expected in (tmp_path / "build_info.inc").read_text()
    # A compiler may copy a string's last bytes by instructions.
    assert expected[:-16].encode() in (tmp_path / unit).read_bytes()


def test_demanding_kernels_of_a_library_that_is_not_built_is_an_error(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
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
    cmake = cuda_units.setup_module().find_tool("cmake")
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
    tools = cuda_units.setup_module()
    nvcc, include = str(tools.find_nvcc()), str(tools.find_torch() / "include")
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
    tools = cuda_units.setup_module()
    (tmp_path / "launch_main.cu").write_text(LAUNCH)
    folder = ROOT / "csrc" / "cuda"
    sources = [folder / "launch.cpp", folder / "crop_resize.cu", folder / "crop_resize_backward.cu"]
    subprocess.run(
        [str(tools.find_nvcc()), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", f"-I{ROOT / 'csrc'}",
         f"-I{tools.find_torch() / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000",
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
