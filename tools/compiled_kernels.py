"""Compiles the Triton kernels ahead of time, for architectures that need not be here, and checks the machine code.

    python tools/compiled_kernels.py [--arch 90]     # the default configs, as a table; compile_configs.py does all

The launchers run as in a process with a GPU, on memory that nobody reads: `compiling` replaces the launch by a
compilation for the wanted architecture. `faults` says what is wrong with a compiled kernel. Tests use both.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fila_kernels.backends.triton import configs, crop_resize, gemm, host, pointwise, single_pass
from fila_kernels.call import DIRECTIONS, Call, Plan, Shape

ROOT = Path(__file__).resolve().parent.parent
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)  # of which everything is compiled; of sm_89 and sm_120 the defaults
# Registers and bytes of shared memory of a multiprocessor; a block's shared memory costs another kilobyte.
REGISTERS = 65_536
SHARED_MEMORY = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
THREADS = {80: 2_048, 89: 1_536, 90: 2_048, 100: 2_048, 120: 1_536}
# The instructions that the tensor cores and the copy engines of an architecture are driven by.
BY_REGISTERS = ("HMMA", "LDGSTS")
INTENDED = {
    80: BY_REGISTERS, 89: BY_REGISTERS, 90: ("HGMMA", "UTMALDG"), 100: ("UTCHMMA", "UTMALDG"), 120: BY_REGISTERS,
}  # fmt: skip
# No config reads through descriptors here: row blocks of a single pass gather, and its weights stay in L2.
WITHOUT_DESCRIPTORS = {arch: instructions[:1] for arch, instructions in INTENDED.items()}


@dataclass
class Kernel:
    """One compiled kernel: what it is, and what the assembler made of it."""

    name: str
    arch: int
    dtype: torch.dtype
    config: configs.Config | None
    num_warps: int
    shared: int
    tensor_memory: int
    registers: int = 0
    stack: int = 0
    ptx: str = ""
    code: str = ""
    instructions: Counter[str] = field(default_factory=Counter)
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)  # of the launch, constants too

    def count(self, prefix: str) -> int:
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))

    @property
    def spills(self) -> int:
        """Registers stored away; a double precision division is a call, whose frame holds one."""
        return max(0, max(self.count("STL"), self.count("LDL")) - bool(self.count("DFMA")))

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds, by registers, shared memory and threads."""
        per_warp = -(-self.registers // 8) * 8 * 32
        return min(
            REGISTERS // (per_warp * self.num_warps),
            SHARED_MEMORY[self.arch] // (self.shared + 1024),
            THREADS[self.arch] // (32 * self.num_warps),
            32,
        )

    @property
    def occupancy(self) -> float:
        """Resident warps of the most a multiprocessor holds."""
        return self.resident * self.num_warps * 32 / THREADS[self.arch]


class _Driver:
    """Stands in for a GPU's driver as far as compiling goes."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what compilations are remembered by

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(
    arch: int, found: list[Kernel], leave_out: tuple[str, ...] = (), config: configs.Config | None = None
) -> Iterator[None]:
    """Within, launchers choose for `arch`, and what they launch is compiled and added to `found`.

    `config` is taken for every launch that chooses one.
    """
    device = configs.ARCHITECTURES[arch]
    chosen: list[configs.Config] = []
    choose = host.choose

    def remember(*arguments: Any) -> configs.Config:
        chosen.append(config or choose(*arguments))
        return chosen[-1]

    def compile_instead(kernel: Any, grid: Any, *arguments: Any, **settings: Any) -> None:
        if kernel.__name__ in leave_out:
            return
        compiled = kernel.warmup(*arguments, grid=grid, **settings)
        tensors = (a.base if hasattr(a, "base") and not isinstance(a, torch.Tensor) else a for a in arguments)
        dtype = next(t.dtype for t in tensors if isinstance(t, torch.Tensor))
        label = compiled.metadata.name.removesuffix("_kernel") + (" (one image)" if settings.get("TAIL_M") else "")
        kernel_found = Kernel(
            label, arch, dtype, chosen.pop() if chosen else None, settings["num_warps"], compiled.metadata.shared,
            getattr(compiled.metadata, "tmem_size", 0) or 0, ptx=compiled.asm["ptx"], grid=grid,
            arguments=dict(zip(kernel.arg_names, arguments, strict=False)) | settings,
        )  # fmt: skip
        kernel_found.registers, kernel_found.stack, kernel_found.code = _disassembled(compiled.asm["cubin"])
        kernel_found.instructions = Counter(_INSTRUCTION.findall(kernel_found.code))
        found.append(kernel_found)

    with (
        mock.patch.object(configs, "device_of", return_value=device),
        mock.patch.object(host, "choose", remember),
        mock.patch.object(host, "run", compile_instead),
    ):
        driver.set_active(_Driver(arch))  # type: ignore[arg-type]
        try:
            yield
        finally:
            driver._active = None


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@lru_cache(maxsize=256)
def _disassembled(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def told(*command: str) -> str:
            tool = str(BINARIES / command[0])
            return subprocess.run([tool, *command[1:], file.name], capture_output=True, text=True, check=True).stdout

        usage, code = told("cuobjdump", "--dump-resource-usage"), told("nvdisasm", "-c")
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    return int(numbers[1]), int(numbers[2]), code


def least_products(kernel: Kernel) -> int:
    """Tensor core instructions that one step through the depth takes in each of a product's loops, counted per warp."""
    config = kernel.config
    assert isinstance(config, configs.GemmConfig)
    if kernel.name.startswith("single_pass"):
        return 1
    steps = config.block_k // 16 * (2 if kernel.name.startswith("fc1_fwd") else 1)
    if INTENDED[kernel.arch] == BY_REGISTERS:  # 16 x 8 results each
        return steps * config.block_m * config.block_n // (128 * config.num_warps)
    if kernel.arch == 90:  # 64 rows for four warps, up to 256 columns
        return steps * (max(1, config.block_m // (16 * config.num_warps)) + bool(config.tail_m))
    return steps * max(1, config.block_m // 128)


def faults(kernel: Kernel) -> list[str]:
    """The faults of a compiled kernel, in words; none if it is as intended."""
    found = []
    limit = configs.ARCHITECTURES[kernel.arch].shared_memory
    if kernel.shared > limit:
        found.append(f"{kernel.shared} bytes of shared memory, the limit is {limit}")
    if kernel.tensor_memory > 512:
        found.append(f"{kernel.tensor_memory} columns of tensor memory, the limit is 512")
    if not kernel.count("STG") + kernel.count("UTMASTG"):
        found.append("nothing is stored")
    if kernel.count("BPT.TRAP") and not kernel.count("STG"):
        found.append("a trap in place of the body")
    if kernel.dtype != torch.float32 and kernel.spills > 0:
        found.append(f"registers spill: {kernel.count('STL')} stores, {kernel.count('LDL')} loads")
    if isinstance(kernel.config, configs.GemmConfig) and kernel.dtype != torch.float32:
        descriptors = kernel.config.tma or INTENDED[kernel.arch] == BY_REGISTERS
        wanted = INTENDED if descriptors and not kernel.name.startswith("single_pass") else WITHOUT_DESCRIPTORS
        found += [f"no {name}" for name in wanted[kernel.arch] if not kernel.count(name)]
        counted, expected = kernel.count(wanted[kernel.arch][0]), least_products(kernel)
        if 0 < counted < expected:
            found.append(f"{counted} {wanted[kernel.arch][0]}, a step takes {expected}")
    if kernel.dtype == torch.float32 and "tf32" in kernel.ptx:
        found.append("float32 is multiplied in TF32")
    return [f"{kernel.name} on sm_{kernel.arch}, {kernel.config}: {fault}" for fault in found]


def example(
    dtype: torch.dtype = torch.bfloat16, width: int = 1024, channels: int = 768, side: int = 48, tiles: int = 40,
    gate: str = "product",
) -> Call:  # fmt: skip
    """A call of the real kind: eight images of five tiles, stage 3 on a 768-pixel raster. Its memory is never read."""
    shape = Shape(tiles, 1, 24, width, width, channels, max(tiles // 5, 1), side, side)

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype)

    return Call(
        empty(tiles, 577, width), empty(shape.images, side, side, channels), torch.zeros(tiles, 4),
        torch.zeros(tiles, dtype=torch.int64), empty(width, width + channels), empty(width), empty(width, width),
        empty(width), empty(1), shape, gate, Plan(**dict.fromkeys(DIRECTIONS, "sample_first"), reasons={}),
    )  # fmt: skip


def product_launches(call: Call) -> dict[str, Callable[[], object]]:
    """Every product's kernel as training launches it, by the name that configs knows it by."""
    shape, dtype = call.shape, call.tokens.dtype

    def flat(width: int) -> torch.Tensor:
        return torch.empty((shape.tiles, 577, width), dtype=dtype)

    def samples(width: int) -> torch.Tensor:
        return torch.empty((shape.samples, width), dtype=dtype)

    d, c, h = shape.token_width, shape.feature_width, shape.hidden_width
    taps, weights = torch.empty((shape.tiles, 2, 24), dtype=torch.int32), torch.empty((shape.tiles, 2, 24))
    narrow = example(dtype, 512, tiles=5)
    return {
        "fc1": lambda: gemm.fc1(call, flat(c), samples(h), flat(h)),
        "fc1_projected": lambda: gemm.fc1_projected(
            call, torch.empty((shape.cells, h), dtype=dtype), taps, weights, samples(h), flat(h)
        ),
        "fc2": lambda: gemm.fc2(call, flat(h), flat(d), samples(d)),
        "single_pass": lambda: single_pass.single_pass(narrow, torch.empty_like(narrow.tokens), None, None),
        "hidden_gradient": lambda: gemm.hidden_gradient(call, flat(d), samples(h), flat(h), flat(h), True, False),
        "input_gradient": lambda: gemm.input_gradient(call, flat(h), flat(d), flat(d), flat(c)),
        "weight_gradient": lambda: gemm.weight_gradient(
            call, flat(h)[:, 1:], flat(d)[:, 1:], torch.empty((h, d), dtype=dtype)
        ),
    }


def other_launches(call: Call) -> None:
    """The kernels other than products, and the tiles that one image alone takes."""
    shape, dtype = call.shape, call.tokens.dtype
    samples = torch.empty((shape.tiles, 577, shape.feature_width), dtype=dtype)[:, 1:]
    tables = crop_resize.crop_tables(call.boxes, call.image_index, 24, shape.maps, True)
    crop_resize.crop_resize_fwd(call.features, tables, call.image_index, 24, samples)
    grad = samples.unflatten(1, (24, 24))
    crop_resize.crop_resize_bwd(grad, tables, 24, torch.empty_like(call.features), call.alpha)
    flat, branch = torch.empty_like(call.tokens), torch.empty((shape.samples, shape.token_width), dtype=dtype)
    pointwise.gate_gradient(call, flat, branch, torch.empty_like(flat), True, True)
    pointwise.activate(call, branch, flat)
    one_image = product_launches(example(dtype, tiles=5))
    for name in ("fc1", "fc2"):
        one_image[name]()


def inference_and_frozen(call: Call) -> None:
    """Two products without what only training or unfrozen features want of them."""
    flat = torch.empty_like(call.tokens)
    gemm.fc2(call, flat, torch.empty_like(flat), None)
    gemm.input_gradient(call, flat, flat, torch.empty_like(flat), None)


def compile_defaults(arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Kernel]:
    """The kernels with the configs that an untuned process takes; those other than products for sm_90 alone."""
    found: list[Kernel] = []
    call = example(dtype)
    with compiling(arch, found, () if arch == 90 else ("reduce_kernel",)):
        launches = product_launches(call)
        if arch == 80:
            del launches["fc2"], launches["input_gradient"]
            inference_and_frozen(call)
        for launch in launches.values():
            launch()
        if arch == 90:
            other_launches(call)
    return found


def tile_of(config: configs.Config | None) -> tuple[str, str]:
    """The tile and the stages of the pipeline, in words."""
    if isinstance(config, configs.GemmConfig):
        rows = f"({config.block_m} + {config.tail_m})" if config.tail_m else str(config.block_m)
        return f"{rows} x {config.block_n} x {config.block_k}", str(config.num_stages)
    if isinstance(config, configs.GatherConfig):
        return f"{config.block_rows} x {config.block_columns}", "-"
    return "-", "-"


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table."""
    lines = [
        "| Kernel | Architecture | Tile | Warps | Stages | Registers | Spills | Shared memory | Occupancy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in kernels:
        tile, stages = tile_of(kernel.config)
        lines.append(
            f"| `{kernel.name}` | sm_{kernel.arch} | {tile} | {kernel.num_warps} | {stages} | {kernel.registers} | "
            f"{kernel.spills} | {kernel.shared:,} B | {kernel.occupancy:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=tuple(INTENDED))
    options = parser.parse_args()
    kernels = [kernel for arch in options.arch for kernel in compile_defaults(arch)]
    wrong = [fault for kernel in kernels for fault in faults(kernel)]
    print(table(kernels))
    print("\n".join(wrong) or f"{len(kernels)} kernels by Triton {triton.__version__}, nothing wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
