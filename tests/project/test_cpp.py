"""csrc's own unit tests, built and run by CTest; see csrc/tests/CMakeLists.txt."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tools.cuda_units import find_tool


@pytest.mark.slow
@pytest.mark.skipif(find_tool("cmake") is None or find_tool("ctest") is None, reason="CMake is not installed")
@pytest.mark.skipif(find_tool("c++") is None and "CXX" not in os.environ, reason="no C++ compiler")
def test_unit_tests(root):
    """A first build takes a minute or two, later ones what has changed."""
    build = root / "build" / "tests"
    torch_dir = Path(torch.__file__).parent
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"] if find_tool("ninja") else []
    if (build / "CMakeCache.txt").exists():
        generator = []  # whatever it was made with
    steps = [
        ["cmake", "-S", root, "-B", build, f"-DFILA_TORCH_DIR={torch_dir}", "-DFILA_BUILD_TESTS=ON", *generator],
        ["cmake", "--build", build, "-j", "2"],
        ["ctest", "--test-dir", build, "--output-on-failure"],
    ]
    for name, *arguments in steps:
        done = subprocess.run([find_tool(name), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    sources = list((root / "csrc" / "tests").glob("test_*.cpp"))
    (total,) = re.findall(r"100% tests passed(?:, 0 tests failed)? out of (\d+)", done.stdout)
    assert int(total) > len(sources)  # and the operators for each vector width
