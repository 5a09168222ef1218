"""Tile shapes: frozen dataclasses, where each can run, which are worth trying, and which is taken untuned.

`supports(config, problem, device)` is the one predicate; the launcher, the tuner and the tests ask nothing else. A
kernel is launched with a config that the caller gives, else the tuned table's, else `default`.
"""

import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch

from fila_kernels.call import TRITON_SINGLE_PASS_WIDTH

KERNELS = (
    "crop_resize", "crop_resize_backward", "fc1", "fc1_projected", "fc2", "single_pass",
    "gate_backward", "hidden_gradient", "input_gradient", "weight_gradient",
)  # fmt: skip
TAILED = ("fc1", "fc1_projected", "fc2")  # those whose tiles may have a second block of rows


@dataclass(frozen=True)
class Device:
    """What a config depends on: compute capability, multiprocessors, bytes of shared memory a block may have."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int


# Limits of the architectures that kernels are compiled for without a GPU, and the stand-in for the interpreter.
ARCHITECTURES = {
    80: Device("sm_80", (8, 0), 108, 166_912),
    89: Device("sm_89", (8, 9), 128, 101_376),
    90: Device("sm_90", (9, 0), 132, 232_448),
    100: Device("sm_100", (10, 0), 148, 232_448),
    120: Device("sm_120", (12, 0), 170, 101_376),
}
# Compute capabilities whose tensor cores take whole tiles from shared memory, where the copy engine puts them. The
# others, 12 among them, multiply from registers and are fed by asynchronous loads.
COPY_ENGINE = (9, 10, 11)
INTERPRETER = Device("interpreter", (9, 0), 2, 232_448)


def _shared_memory(capability: tuple[int, int]) -> int:
    """What CUDA's table of technical specifications grants a block, by compute capability."""
    if capability in ((8, 0), (8, 7)):
        return 166_912
    return 232_448 if capability[0] in COPY_ENGINE else 101_376


@cache
def device_of(device: torch.device) -> Device:
    """The device's limits, asked once a process."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Device(properties.name, capability, properties.multi_processor_count, _shared_memory(capability))


@dataclass(frozen=True)
class Problem:
    """One launch: rows m, columns n, depth k, the stored dtype, and whether tensors suit the tensor copy engine.

    Gathers count samples or cells as m and channels as n, with k = 0. `aligned` says that all operands that could be
    read through descriptors have bases and strides on 16 bytes.
    """

    kernel: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    aligned: bool = True

    @property
    def vectorised(self) -> bool:
        """Whether pointers load 16 bytes an access: Triton knows whether a size is a multiple of 16, and nothing less.

        Asked of the sizes along which memory is dense: rows and columns of a weight's gradient, else columns and depth.
        """
        dense = (self.m, self.n) if self.kernel == "weight_gradient" else (self.n, self.k)
        return self.aligned and not any(size % 16 for size in dense)


@dataclass(frozen=True)
class GatherConfig:
    """Samples or cells by channels in one program."""

    block_rows: int
    block_columns: int
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the product, and how it is fed.

    tma: operands through tensor descriptors. persistent: one program a multiprocessor, which goes from tile to tile.
    split_epilogue: the accumulator's columns leave in so many parts, which saves registers. split_k: the depth is cut
    into so many parts, whose sums are added in a fixed order. tail_m: rows of a second accumulator below the first one,
    which shares its columns' operand, for tiles whose height is no power of two. warp_specialize: one warp loads, one
    issues products, on compute capability 10.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    split_epilogue: int = 1
    split_k: int = 1
    tail_m: int = 0
    warp_specialize: bool = False

    @property
    def rows(self) -> int:
        return self.block_m + self.tail_m

    def tiles(self, problem: Problem) -> int:
        return -(-problem.m // self.rows) * -(-problem.n // self.block_n)


Config = GatherConfig | GemmConfig
GATHERS = ("crop_resize", "crop_resize_backward", "gate_backward")


def config_from(kernel: str, values: dict[str, Any]) -> Config | None:
    """A config from a table's plain values; None, with a warning, where this version does not know their names."""
    try:
        return (GatherConfig if kernel in GATHERS else GemmConfig)(**values)
    except TypeError as error:
        warnings.warn(f"fila_kernels: the tuned config of {kernel} is not used: {error}", stacklevel=2)
        return None


def plain(config: Config) -> dict[str, Any]:
    """What `config_from` takes back."""
    return asdict(config)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def shared_memory(config: GemmConfig, problem: Problem) -> int:
    """Bytes that the operands' pipeline takes, by the arrays' sizes."""
    size = problem.dtype.itemsize
    if problem.kernel == "single_pass":
        columns = power_of_two(problem.n)
        first = config.num_stages * (config.block_m + columns) * config.block_k * size
        second = (config.block_m + config.num_stages * config.block_n) * columns * size
        return max(first, second)
    stage = (config.rows + config.block_n) * config.block_k * size
    return config.num_stages * stage


def _compiles_well(config: GemmConfig, problem: Problem, device: Device) -> bool:
    """What compiling showed below float32, by Triton 3.6 and 3.7: nothing that is let through here spills.

    By kernel, since it is the epilogues that differ: those of `fc1_projected` and `hidden_gradient` hold most.
    """
    kernel, major = problem.kernel, device.capability[0]
    if problem.dtype == torch.float32 or device == INTERPRETER:
        return not config.warp_specialize
    if not (config.tma or problem.vectorised or kernel == "single_pass"):
        # Each element has an address of its own, which takes two registers: one tile a kernel leaves room for them.
        small = kernel == "fc1_projected" or (kernel == "weight_gradient" and major == 10)
        only = GemmConfig(64, 64 if small else 128, 32, 8, 4, split_epilogue=2, split_k=config.split_k)
        return config == only
    heavy = kernel in ("fc1_projected", "hidden_gradient")
    square = config.rows * config.block_n == 128 * 32 * config.num_warps and config.block_n == 128
    if kernel == "single_pass":
        wide = power_of_two(problem.n) > 256
        if wide and config.block_k > 32:
            return False
        if wide and major not in COPY_ENGINE and config.block_m * power_of_two(problem.n) > 64 * 32 * config.num_warps:
            return False
        if wide and major == 9 and config.num_stages > 1:
            return False
        return major not in COPY_ENGINE or config.block_m >= 64  # fewer rows go past the matrix unit that is meant
    if square and (heavy or kernel in ("fc1", "fc2")):
        return False
    if config.warp_specialize:
        right = config.tma and major == 10 and config.num_warps == 8 and config.block_m == 128
        return right and not (heavy and config.block_n > 128)
    tile = config.block_m, config.block_n, config.num_warps
    if heavy and (tile == (128, 64, 4) or (major == 10 and tile == (64, 256, 4))):
        return False
    if not config.tma and tile == (64, 128, 4) and major == 10 and kernel in ("fc1", "fc2", "hidden_gradient"):
        return False
    return not (kernel == "hidden_gradient" and not config.tma and tile == (128, 256, 8))


def supports(config: Config, problem: Problem, device: Device) -> bool:
    """Whether `config` can run `problem` on `device`: the right kind, legal tiles, and what the device has room for."""
    sizes = [getattr(config, field.name) for field in fields(config) if field.name.startswith("block")]
    if not all(_is_power_of_two(size) for size in (*sizes, config.num_warps)) or not 1 <= config.num_warps <= 16:
        return False
    if isinstance(config, GatherConfig):
        if problem.kernel == "crop_resize_backward" and config.num_warps < 8:
            return False  # the compiler stores registers of four warps away
        # 128 float32 values a thread.
        return problem.kernel in GATHERS and config.block_rows * config.block_columns <= 128 * 32 * config.num_warps
    if problem.kernel in GATHERS or min(sizes) < 16 or config.num_stages < 1:
        return False
    wide = problem.kernel == "single_pass"
    if wide and max(problem.n, problem.k) > TRITON_SINGLE_PASS_WIDTH:
        return False
    if (config.split_k > 1 and problem.kernel != "weight_gradient") or config.split_k < 1:
        return False
    if not _is_power_of_two(config.split_epilogue) or config.block_n // config.split_epilogue < 16:
        return False
    if config.tma and (wide or not problem.aligned or device.capability[0] not in COPY_ENGINE or max(sizes) > 256):
        return False
    if not _compiles_well(config, problem, device):
        return False
    if config.tail_m and not (
        problem.kernel in TAILED
        and config.tma
        and device.capability[0] == 9
        and _is_power_of_two(config.tail_m)
        and 16 <= config.tail_m < config.block_m
    ):
        return False
    columns = power_of_two(problem.n) if wide else config.block_n
    if config.rows * columns > 128 * 32 * config.num_warps:
        return False
    return shared_memory(config, problem) <= device.shared_memory


def _gemm_tiles(problem: Problem, device: Device) -> list[GemmConfig]:
    """Tiles by what the tensor cores of the device want, best guess first."""
    if problem.dtype == torch.float32:
        # Float32 is multiplied without tensor cores unless TF32 is allowed: small tiles, or registers run out.
        tiles = [(64, 64, 32, 4, 2), (32, 64, 32, 4, 2), (128, 64, 32, 8, 2), (32, 32, 32, 4, 2)]
        return [GemmConfig(*tile) for tile in tiles]
    if device.capability[0] in COPY_ENGINE:
        tma = [
            GemmConfig(m, n, 64, warps, stages, tma=True, persistent=persistent, split_epilogue=n // 64)
            for m, n, warps, stages in (
                (128, 256, 8, 4), (128, 128, 8, 4), (128, 128, 4, 4), (64, 256, 4, 4), (64, 128, 4, 4),
                (256, 128, 8, 4), (128, 256, 8, 3), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4),
            )
            for persistent in (True, False)
        ]  # fmt: skip
        tma += [
            GemmConfig(128, 128, 64, 8, stages, True, persistent, split_epilogue=2, tail_m=64)
            for stages in (4, 3)
            for persistent in (True, False)
        ]
        tma += [
            GemmConfig(128, n, 64, 8, stages, True, True, split_epilogue=n // 64, warp_specialize=True)
            for n, stages in ((256, 4), (128, 4), (256, 3))
        ]
    else:
        tma = []
    if not problem.vectorised:
        return tma + [GemmConfig(64, n, 32, 8, 4, split_epilogue=2) for n in (128, 64)]
    pointer = [
        GemmConfig(m, n, k, warps, stages, split_epilogue=n // 64)
        for m, n, k, warps, stages in (
            (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3), (64, 128, 32, 4, 4), (128, 64, 32, 4, 4),
            (64, 64, 32, 4, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (128, 128, 32, 8, 3), (32, 64, 32, 4, 4),
        )
    ]  # fmt: skip
    return tma + pointer


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Every config worth measuring for `problem` on `device`, the untuned choice first."""
    found: list[Config]
    if problem.kernel in GATHERS:
        blocks = [(rows, columns, warps) for rows in (16, 32, 8, 64) for columns in (64, 128, 256) for warps in (4, 8)]
        found = [GatherConfig(*block) for block in blocks]
    elif problem.kernel == "single_pass":
        found = [
            GemmConfig(m, 64, k, warps, stages)
            for m in (64, 32, 128)
            for k in (32, 64)
            for warps in (8, 4)
            for stages in (2, 1, 3)
        ]
    else:
        found = list(_gemm_tiles(problem, device))
        if problem.kernel == "weight_gradient":
            found = [GemmConfig(**{**asdict(c), "split_k": s}) for c in found for s in (1, 2, 4, 8, 16)]  # type: ignore[call-overload]
    first = default(problem, device)
    return [first, *(config for config in found if config != first and supports(config, problem, device))]


@cache
def default(problem: Problem, device: Device) -> Config:
    """The config without a measurement: what the shape, the dtype and the device suggest."""
    found = _suggested(problem, device)
    assert supports(found, problem, device), f"{found} cannot run {problem} on {device.name}"
    return found


def _suggested(problem: Problem, device: Device) -> Config:
    if device == INTERPRETER:
        return _interpreted(problem)
    if problem.kernel in GATHERS:
        columns = min(128, max(16, power_of_two(problem.n)))
        warps = 8 if problem.kernel == "crop_resize_backward" else 4
        return GatherConfig(16 if problem.kernel != "gate_backward" else 32, columns, warps)
    if problem.kernel == "single_pass":
        return _single_pass(problem, device)
    tiles = [config for config in _gemm_tiles(problem, device) if supports(config, problem, device)]
    if problem.dtype == torch.float32:
        best = tiles[0]
    else:
        best = min(tiles, key=lambda config: _waste(config, problem, device))
    if problem.kernel == "weight_gradient":
        best = GemmConfig(**{**asdict(best), "split_k": _splits(best, problem, device)})
    return best


def resident(config: GemmConfig, problem: Problem, device: Device) -> int:
    """Programs that a multiprocessor holds at a time: what shared memory has room for, eight warps at the most."""
    return max(1, min(device.shared_memory // shared_memory(config, problem), 8 // config.num_warps))


def _waste(config: GemmConfig, problem: Problem, device: Device) -> tuple[bool, float]:
    """Descriptors first; then the time that waves of tiles take, a small tile being fed less well than a large one."""
    tiles, area = config.tiles(problem), config.rows * config.block_n
    if problem.kernel == "weight_gradient":
        waves = tiles / device.num_sms  # the depth is cut until the chip is full
    else:
        together = resident(config, problem, device)
        waves = -(-tiles // (device.num_sms * together)) * together
    fed = 1 + 24 * (config.rows + config.block_n) / area
    registers = 0.1 if area > 64 * 32 * config.num_warps and not config.tma else 0.0
    idle = 0.01 * (4 - config.num_stages) + (0.005 if not config.persistent else 0.0)
    return not config.tma, waves * area * (fed + registers + idle)


def _splits(config: GemmConfig, problem: Problem, device: Device) -> int:
    """Parts of the depth that fill the chip once, of at least eight steps each."""
    tiles = config.tiles(problem)
    most = max(1, problem.k // (8 * config.block_k))
    return max(1, min(most, device.num_sms // tiles, 32))


def _single_pass(problem: Problem, device: Device) -> GemmConfig:
    """The first that can run, larger blocks of rows before smaller ones, a pipeline before none."""
    low = problem.dtype != torch.float32
    tries = [
        GemmConfig(rows, 64 if low else 16, 32, 8, stages)
        for rows in ((64, 32, 16) if low else (16,))
        for stages in (2, 1)
    ]
    return next((config for config in tries if supports(config, problem, device)), tries[-1])


def _interpreted(problem: Problem) -> Config:
    """Few large programs: the interpreter pays by the operation, not by the element."""
    if problem.kernel in GATHERS:
        # Sums go one by one there, where a GPU adds in a tree: fewer rows, or float32 shows it.
        rows = 32 if problem.kernel == "gate_backward" else 256
        return GatherConfig(rows, min(64, max(16, power_of_two(problem.n))), 16)
    if problem.kernel == "single_pass":
        return GemmConfig(64, 64, 64, 8, 2)
    return GemmConfig(
        64, 64, 64, 4, 2, tma=problem.aligned, persistent=problem.aligned, split_epilogue=2,
        split_k=2 if problem.kernel == "weight_gradient" else 1,
    )  # fmt: skip
