"""CUTLASS's device code on our operands, executed on the host: needs its headers and CUDA's, and no GPU."""

import subprocess
from pathlib import Path

import pytest

from tools import cuda_units

ROOT = Path(__file__).resolve().parents[2]
MISSING = cuda_units.missing_tool()


def compile_and_run(source: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    found = cuda_units.discover()
    program = folder / source.stem
    command = [found["CMAKE_CUDA_COMPILER"], "-std=c++20", "-O1", "-DNDEBUG", "-w", *flags]
    subprocess.run([*command, f"-isystem={found['FILA_CUTLASS_DIR']}", source, "-o", program], check=True, timeout=300)
    return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("turns", [True, False], ids=["as_it_is", "fault"])
def test_two_operand_iterator_loads_every_element_once(tmp_path, turns):
    """The fault turns to a second operand that is not there: its masks come back on behind the main loop's back."""
    # nvcc hands a .cpp to the host's compiler, with the toolkit's headers. CUTLASS's classes name members after types,
    # which g++ does not let pass without being told.
    flags = ["-Xcompiler=-fpermissive,-w", *([] if turns else ["-DTURN=tiles.first"])]
    done = compile_and_run(ROOT / "csrc" / "tests" / "two_operand_iterator.cpp", tmp_path, *flags)
    assert (done.returncode == 0) == turns, done.stderr


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_single_pass_lies_in_memory_as_the_hardware_has_it(tmp_path):
    flags = "-x=cu", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"
    done = compile_and_run(ROOT / "csrc" / "tests" / "single_pass_layout.cpp", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
