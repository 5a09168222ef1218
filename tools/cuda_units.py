"""Compiles the units of csrc/cuda one by one for each architecture, and checks the binaries; needs no GPU.

    python tools/cuda_units.py                  # compile all, name the faults, record, fill docs/cuda.md
    python tools/cuda_units.py -k crop_resize   # compile some; records nothing
    python tools/cuda_units.py --table          # write only the table, from the record

The commands are CMake's own, one architecture at a time. The record holds kernels, registers, spills, stack, the
instructions that the unit's name promises, processor seconds and peak memory. `faults` names a unit's faults.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc" / "cuda"
RECORD = ROOT / "bench" / "results" / "cuda_units.csv"
PAGE = ROOT / "docs" / "cuda.md"
MARKS = "<!-- compiled units: written by tools/cuda_units.py -->", "<!-- end of compiled units -->"
ARCHITECTURES = ("8.0", "9.0a", "10.0a")
MOST_MEGABYTES = 4096  # a unit may take
MOST_SECONDS = 600  # the whole build may take, on two cores
STORES = ("STG", "UTMASTG", "UTMAREDG")
# Instructions that a unit has to hold, by the beginning or the end of its name: 16-byte accesses; the tensor cores and
# copy engines of an architecture.
VECTOR = ("LDG.E.128", "STG.E.128")
INTENDED = {
    "crop_resize": VECTOR,
    "gate_backward": VECTOR,
    "_sm80": ("HMMA", "LDGSTS"),
    "_sm90a": ("HGMMA", "UTMALDG"),
    "_sm100a": ("UTCHMMA", "UTMALDG"),
}


@dataclass
class Unit:
    """One unit compiled for one architecture. Of several kernels the largest registers and sums of the rest."""

    unit: str
    architecture: str
    kernels: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # static; what a launch asks for beside it is not in the binary
    instructions: str  # those intended, such as "HGMMA 64, UTMALDG 8"
    storeless: int  # kernels that write nothing, hence do nothing
    seconds: float  # of one processor
    megabytes: int
    nvcc: str
    cutlass: str


def find_tool(name: str) -> str | None:
    """A program of this Python's environment, else of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def discover(**variables: str) -> dict[str, str]:
    """The variables that csrc/discover.cmake prints when CUDA kernels are demanded.

    Raises:
        RuntimeError: something is missing, with CMake's message.
    """
    cmake = find_tool("cmake")
    if cmake is None:
        raise RuntimeError("CMake was not found")
    settings = {"FILA_PYTHON": sys.executable, "FILA_CUDA": "1", **variables}
    command = [cmake, *(f"-D{key}={value}" for key, value in settings.items())]
    done = subprocess.run(
        [*command, "-P", str(ROOT / "csrc" / "discover.cmake")], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(" ".join(re.split(r"CMake Error at .*:\n", done.stderr)[-1].split()))
    return dict(re.findall(r"^(\w+)=(.*)$", done.stderr, re.MULTILINE))


def missing_tool(disassemble: bool = True) -> str | None:
    """The tool that this machine lacks to compile the units or to take binaries apart, or None."""
    try:
        discover()
    except RuntimeError as error:
        return str(error)
    if find_tool("ninja") is None:
        return "ninja was not found"
    if disassemble and disassembler() is None:
        return "cuobjdump was found neither beside nvcc nor in the package triton"
    return None


def disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or of Triton."""
    found = shutil.which("cuobjdump", path=str(Path(discover()["CMAKE_CUDA_COMPILER"]).parent))
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def configure(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES, units: str = "") -> None:
    """A build folder for these architectures; `units` is a regular expression of the files to compile, "" for all."""
    settings = {
        "CMAKE_BUILD_TYPE": "Release", "CMAKE_EXPORT_COMPILE_COMMANDS": "ON", "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "FILA_PYTHON": sys.executable, "FILA_CUDA": "1", "FILA_CUDA_ARCHITECTURES": ";".join(architectures),
        "FILA_CUDA_UNITS": units,
    }  # fmt: skip
    command = [str(find_tool("cmake")), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    command += [f"-D{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"configuring csrc failed:\n{done.stdout}{done.stderr}")


def compile_commands(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> dict[str, list[str]]:
    """CMake's command for every unit that it would compile."""
    configure(folder, architectures)
    entries = json.loads((folder / "compile_commands.json").read_text())
    return {
        Path(entry["file"]).stem: shlex.split(entry["command"])
        for entry in entries
        if Path(entry["file"]).suffix == ".cu"
    }


def split_architectures(command: list[str]) -> dict[str, list[str]]:
    """The command for each of its architectures alone: {"90a": [...]}."""
    rest = [part for part in command if not part.startswith("-gencode")]
    found = {re.search(r"code=sm_(\w+)", part): part for part in command if part.startswith("-gencode")}
    return {match[1]: [*rest, part] for match, part in found.items() if match}


def run_measured(command: list[str], folder: Path) -> tuple[str, float, int]:
    """Run, and return what it printed, the processor seconds and the megabytes that it and its children took."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\nfailed:\n{text}")
    return text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def count_instructions(sass: str) -> dict[str, Counter[str]]:
    """Counts the instructions of every kernel in a disassembly."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        function = re.match(r"\s*Function : (\S+)", line)
        if function:
            counts = found.setdefault(function[1], Counter())
            continue
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)
        if instruction:
            counts[instruction[1]] += 1
    return found


def total(kernels: dict[str, Counter[str]], prefix: str) -> int:
    return sum(n for counts in kernels.values() for name, n in counts.items() if name.startswith(prefix))


def intended(unit: str) -> tuple[str, ...]:
    return tuple(
        name for key, names in INTENDED.items() if unit.startswith(key) or unit.endswith(key) for name in names
    )


def compile_unit(name: str, architecture: str, command: list[str], folder: Path) -> Unit:
    """Compile for one architecture and take the binary apart."""
    binary = folder / f"{name}_{architecture}.o"
    command = [str(binary) if part.endswith(".cu.o") else part for part in command]
    text, seconds, megabytes = run_measured([*command, "-Xptxas=-v"], folder)
    cuobjdump = disassembler()
    assert cuobjdump is not None
    kernels = count_instructions(subprocess.check_output([cuobjdump, "-sass", str(binary)], text=True))

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, text)]

    nvcc = subprocess.check_output([discover()["CMAKE_CUDA_COMPILER"], "--version"], text=True)
    return Unit(
        unit=name, architecture=f"sm_{architecture}", kernels=len(kernels),
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        stack_bytes=sum(numbers(r"(\d+) bytes stack frame")),
        shared_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
        instructions=", ".join(f"{prefix} {total(kernels, prefix)}" for prefix in intended(name)),
        storeless=sum(1 for counts in kernels.values() if not any(k.startswith(STORES) for k in counts)),
        seconds=round(seconds, 1), megabytes=megabytes,
        nvcc=re.search(r"release [\d.]+, V([\d.]+)", nvcc)[1],  # type: ignore[index]
        cutlass=cutlass_version(),
    )  # fmt: skip


def cutlass_version() -> str:
    text = Path(discover()["FILA_CUTLASS_DIR"], "cutlass", "version.h").read_text()
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text))


def faults(unit: Unit) -> list[str]:
    """The faults of a compiled unit; none for a good one."""
    found = []
    if unit.kernels == 0:
        found.append("holds no kernel")
    if unit.spill_bytes:
        found.append(f"spills {unit.spill_bytes} bytes of registers")
    if unit.stack_bytes:
        found.append(f"has a stack frame of {unit.stack_bytes} bytes")
    if unit.storeless:
        found.append(f"{unit.storeless} kernels write nothing")
    found += [f"has no {part.split()[0]}" for part in unit.instructions.split(", ") if part.endswith(" 0")]
    if unit.megabytes > MOST_MEGABYTES:
        found.append(f"takes {unit.megabytes} MB to compile, more than {MOST_MEGABYTES}")
    return [f"{unit.unit} for {unit.architecture}: {fault}" for fault in found]


def read_record() -> list[Unit]:
    with RECORD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {field.name: field.type for field in fields(Unit)}
    return [Unit(**{key: kinds[key](value) for key, value in row.items()}) for row in rows]  # type: ignore[operator]


def write_record(units: list[Unit]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Unit)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(unit) for unit in units)


def table(units: list[Unit]) -> str:
    """The record as a Markdown table with a line about the whole build."""
    seconds = sum(unit.seconds for unit in units)
    largest = max(unit.megabytes for unit in units)
    lines = [
        f"Compiled by nvcc {units[0].nvcc} with CUTLASS {units[0].cutlass}: {seconds:.0f} processor seconds in all, "
        f"half of that for each of two cores; at most {largest:,} MB a unit. No spills and no stack frame "
        + ("anywhere." if not any(unit.spill_bytes or unit.stack_bytes for unit in units) else "but where named."),
        "",
        "| Unit | Architecture | Kernels | Registers | Spills | Stack | Instructions | Seconds | Memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for unit in units:
        lines.append(
            f"| `{unit.unit}` | {unit.architecture} | {unit.kernels} | {unit.registers} | {unit.spill_bytes} B | "
            f"{unit.stack_bytes} B | {unit.instructions or '-'} | {unit.seconds:.0f} | {unit.megabytes:,} MB |"
        )
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Put the table between the page's marks."""
    page = PAGE.read_text()
    start, end = (page.index(mark) for mark in MARKS)
    PAGE.write_text(f"{page[: start + len(MARKS[0])]}\n\n{text}\n\n{page[end:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only units whose name holds this; nothing is recorded")
    parser.add_argument("--arch", default=";".join(ARCHITECTURES), help="architectures; the default is recorded")
    parser.add_argument("--jobs", type=int, default=2, help="units compiled at a time")
    parser.add_argument("--table", action="store_true", help="write the table from the record, compile nothing")
    options = parser.parse_args()
    if options.table:
        write_page(table(read_record()))
        return 0
    missing = missing_tool()
    if missing:
        print(f"tools/cuda_units.py: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        commands = compile_commands(Path(temporary), tuple(options.arch.split(";")))
        pending = [
            pool.submit(compile_unit, name, architecture, command, Path(temporary))
            for name in sorted(name for name in commands if options.k in name)
            for architecture, command in split_architectures(commands[name]).items()
        ]
        units = []
        for future in pending:
            unit = future.result()
            units.append(unit)
            print(
                f"{unit.unit} {unit.architecture}: {unit.registers} registers, {unit.spill_bytes} bytes spilled, "
                f"{unit.instructions}; {unit.seconds} s, {unit.megabytes} MB",
                flush=True,
            )
    wrong = [fault for unit in units for fault in faults(unit)]
    if not options.k and sum(unit.seconds for unit in units) / 2 > MOST_SECONDS:
        wrong.append(f"the whole build takes more than {MOST_SECONDS} s on two cores")
    print("\n".join(wrong) or f"{len(units)} compiled, nothing wrong")
    if not options.k and options.arch == parser.get_default("arch"):
        write_record(units)
        write_page(table(units))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
