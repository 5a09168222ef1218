"""The checker of csrc/cuda's units: planted faults, the units that are quick to compile, and the record of all.

Tests that compile need nvcc and the headers of CUTLASS, and no GPU; they are skipped without these.
"""

import re
from pathlib import Path

import pytest

from tools import cuda_units

MISSING = cuda_units.missing_tool()
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def compiled(name: str, source: str, folder: Path) -> cuda_units.Unit:
    """A unit of one's own for sm_80."""
    path = folder / f"{name}.cu"
    path.write_text(source)
    nvcc = cuda_units.discover()["CMAKE_CUDA_COMPILER"]
    command = [nvcc, "-std=c++17", "-O3", "-gencode=arch=compute_80,code=sm_80", "-c", str(path), "-o", f"{name}.cu.o"]
    return cuda_units.compile_unit(name, "80", command, folder)


GOOD = """
__global__ void copy(const uint4* from, uint4* to) { __stwb(to + threadIdx.x, from[threadIdx.x]); }
"""
NARROW = """
__global__ void copy(const unsigned* from, unsigned* to) { to[threadIdx.x] = from[threadIdx.x]; }
"""
NOTHING = """
__global__ void copy(const uint4* from, uint4* to) { if (from == to) __trap(); }
"""
SPILLS = """
__global__ void __launch_bounds__(1024, 2) copy(const uint4* from, uint4* to) {
  uint4 kept[32];
  for (int i = 0; i < 32; ++i) kept[i] = from[threadIdx.x + i * 1024];
  __syncthreads();
  for (int i = 0; i < 32; ++i) __stwb(to + threadIdx.x + (31 - i) * 1024, kept[31 - i]);
}
"""
INDEXED = """
__global__ void copy(const uint4* from, uint4* to, int n) {
  uint4 kept[8];
  for (int i = 0; i < 8; ++i) kept[i * n & 7] = from[threadIdx.x + i * 1024];
  for (int i = 0; i < 8; ++i) __stwb(to + threadIdx.x + i * 1024, kept[i + n & 7]);
}
"""


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "found"),
    [
        (GOOD, ""),
        (NARROW, "has no LDG.E.128"),
        (NOTHING, "1 kernels write nothing"),
        (SPILLS, r"spills \d+ bytes of registers"),
        (INDEXED, r"has a stack frame of \d+ bytes"),
    ],
    ids=["good", "narrow", "nothing", "spills", "indexed"],
)
def test_planted_faults_are_found(source, found, tmp_path):
    faults = cuda_units.faults(compiled("crop_resize_planted", source, tmp_path))
    assert bool(faults) == bool(found), faults
    assert not found or any(re.search(found, fault) for fault in faults), faults


def test_a_unit_without_its_tensor_cores_or_beyond_its_memory_is_found():
    good = dict(
        unit="fc1_bf16_sm90a", architecture="sm_90a", kernels=1, registers=168, spill_bytes=0, stack_bytes=0,
        shared_bytes=0, instructions="HGMMA 64, UTMALDG 8", storeless=0, seconds=30.0, megabytes=1800, nvcc="13.0",
        cutlass="4.2.0",
    )  # fmt: skip
    assert cuda_units.faults(cuda_units.Unit(**good)) == []
    assert cuda_units.intended("fc1_bf16_sm90a") == ("HGMMA", "UTMALDG")
    assert cuda_units.intended("crop_resize_backward") == ("LDG.E.128", "STG.E.128")
    bad = cuda_units.Unit(**good | dict(instructions="HGMMA 0, UTMALDG 8", megabytes=5000))
    assert cuda_units.faults(bad) == [
        "fc1_bf16_sm90a for sm_90a: has no HGMMA",
        "fc1_bf16_sm90a for sm_90a: takes 5000 MB to compile, more than 4096",
    ]


def test_instructions_are_counted_by_kernel():
    sass = """
        Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;           /* 0x00 */
        /*0020*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;                  /* 0x00 */
        Function : second
        /*0000*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4] ; /* 0x00 */
    """
    counts = cuda_units.count_instructions(sass)
    assert counts["first"] == {"LDC": 1, "LDG.E.128": 1, "UTMALDG.2D": 1}
    assert counts["second"] == {"HGMMA.64x256x16.F32.BF16": 1}


@needs_nvcc
@pytest.mark.slow
def test_a_units_name_says_what_it_is_compiled_for(tmp_path):
    found = {}
    for name, command in cuda_units.compile_commands(tmp_path, ("8.6", "9.0a+PTX", "12.0")).items():
        found[name] = [part.split("code=")[-1] for part in command if part.startswith("-gencode")]
    assert found["crop_resize"] == ["sm_86", "sm_90a", "compute_90a", "sm_120"]
    assert found["fc1_bf16_sm80"] == ["sm_86", "sm_120"], "everything without units of its own"
    assert found["fc1_bf16_sm90a"] == ["sm_90a", "compute_90a"]
    assert not [name for name in found if name.endswith("_sm100a")]


@needs_nvcc
@pytest.mark.slow
def test_the_quick_units_are_as_intended(tmp_path):
    """Without spills, with 16-byte accesses; `make test-cuda` looks at all units."""
    commands = cuda_units.compile_commands(tmp_path)
    for name in ("crop_resize", "crop_resize_backward"):
        for architecture, command in cuda_units.split_architectures(commands[name]).items():
            unit = cuda_units.compile_unit(name, architecture, command, tmp_path)
            assert cuda_units.faults(unit) == []


def test_the_record_is_of_every_unit_and_the_document_shows_it():
    """`make test-cuda` writes both; it also says what is wrong, which must be nothing."""
    recorded = cuda_units.read_record()
    assert {unit.unit for unit in recorded} == {path.stem for path in cuda_units.FOLDER.glob("*.cu")}
    assert [fault for unit in recorded for fault in cuda_units.faults(unit)] == []
    assert sum(unit.seconds for unit in recorded) / 2 < cuda_units.MOST_SECONDS, "on two cores"
    page = cuda_units.PAGE.read_text()
    between = page.split(cuda_units.MARKS[0])[1].split(cuda_units.MARKS[1])[0]
    assert between.strip() == cuda_units.table(recorded).strip()
