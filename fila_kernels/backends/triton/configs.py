"""Tile shapes: short lists of configs that compile without spills, and the heuristic that chooses among them.

A launch takes the config measured on the device, if there is one and `supports` allows it, otherwise `default`. The
tuner tries `candidates`. Nothing here needs Triton or a GPU.
"""

import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from fila_kernels.call import TRITON_SINGLE_PASS_WIDTH

GATHERS = ("crop_resize", "crop_resize_backward", "gate_backward")
TAILED = ("fc1", "fc1_projected", "fc2")  # products whose tiles may have a second block of rows
TALL = ("input_gradient", "weight_gradient")  # those with the lightest epilogues
KERNELS = (*GATHERS, *TAILED, "single_pass", "hidden_gradient", "input_gradient", "weight_gradient")


@dataclass(frozen=True)
class Device:
    """The limits that a config depends on: compute capability, multiprocessors, bytes of shared memory per block."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int

    @property
    def copies_tiles(self) -> bool:
        """Whether tensor cores take whole tiles from shared memory, where the copy engine (TMA) puts them.

        The others, compute capability 12 among them, multiply from registers and are fed by asynchronous loads.
        """
        return self.capability[0] in (9, 10, 11)


# The architectures that kernels are compiled for without a GPU, and the stand-in for the interpreter.
ARCHITECTURES = {
    80: Device("sm_80", (8, 0), 108, 166_912),
    89: Device("sm_89", (8, 9), 128, 101_376),
    90: Device("sm_90", (9, 0), 132, 232_448),
    100: Device("sm_100", (10, 0), 148, 232_448),
    120: Device("sm_120", (12, 0), 170, 101_376),
}
INTERPRETER = Device("interpreter", (9, 0), 2, 232_448)


@cache
def device_of(device: torch.device) -> Device:
    """The device's limits, asked once per process; shared memory by CUDA's table of technical specifications."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    found = Device(properties.name, capability, properties.multi_processor_count, 101_376)
    if capability in ((8, 0), (8, 7)):
        return replace(found, shared_memory=166_912)
    return replace(found, shared_memory=232_448) if found.copies_tiles else found


@dataclass(frozen=True)
class Problem:
    """One launch: rows m, columns n, depth k, and the stored dtype.

    Gathers count samples or cells as m and channels as n, with k = 0. `aligned` says that every operand that a
    descriptor could read has its base and its strides on 16 bytes.
    """

    kernel: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    aligned: bool = True

    @property
    def vectorised(self) -> bool:
        """Whether pointers load 16 bytes per access: Triton sees that a size is a multiple of 16, and nothing less.

        The sizes are those along which memory is dense: rows and columns of a weight's gradient, else columns, depth.
        """
        dense = (self.m, self.n) if self.kernel == "weight_gradient" else (self.n, self.k)
        return self.aligned and not any(size % 16 for size in dense)


@dataclass(frozen=True)
class GatherConfig:
    """Samples or cells by channels, per program."""

    block_rows: int
    block_columns: int
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the product, and how it is fed.

    tma: operands come through tensor descriptors.
    persistent: as many programs as run at a time, which go from tile to tile.
    split_epilogue: the columns leave in so many groups, which saves registers.
    split_k: the depth is cut into so many parts, whose sums are added in a fixed order.
    tail_m: rows of a second accumulator, for tiles whose height is not a power of two.
    warp_specialize: one warp loads and one issues products.
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

# Tiles of 16-bit operands through descriptors. A step is 64 deep, one row of 128 bytes, the widest that the copy engine
# swizzles. Four stages in flight fill the shared memory of a multiprocessor with the largest tile. The epilogue leaves
# in groups of 64 columns, which keeps the largest tile's registers below 255.
DESCRIPTOR_TILES = tuple(
    GemmConfig(m, n, 64, num_warps, 4, tma=True, persistent=True, split_epilogue=n // 64)
    for m, n, num_warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4))
)
# One image's 2885 rows by 1024 columns are 128 tiles of 192 x 128, one wave of a Hopper's 132 multiprocessors; in tiles
# of 128 x 128 they are 184, and the second wave is more than half empty.
ONE_IMAGE_TILE = replace(DESCRIPTOR_TILES[1], tail_m=64)
SPECIALIZED_TILE = replace(DESCRIPTOR_TILES[1], warp_specialize=True)
# For few columns, where the epilogue leaves registers for it.
TALL_TILE = replace(DESCRIPTOR_TILES[1], block_m=256)
# Through pointers, 16 bytes per access: half the depth, since addresses take registers too.
POINTER_TILES = tuple(
    GemmConfig(m, n, k, num_warps, stages, split_epilogue=n // 64)
    for m, n, k, num_warps, stages in (
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (64, 128, 32, 4, 4),
        (64, 64, 32, 4, 4),
    )
)
# Through pointers, one element per access: each has an address of its own, which takes two registers.
ELEMENT_TILES = (GemmConfig(64, 64, 32, 8, 4, split_epilogue=2),)
# IEEE float32 does not run on tensor cores: small tiles, or registers run out.
FLOAT32_TILES = (GemmConfig(64, 64, 32, 4, 2), GemmConfig(32, 64, 32, 4, 2), GemmConfig(32, 32, 32, 4, 2))


def config_from(kernel: str, values: dict[str, Any]) -> Config | None:
    """A config from a table's plain values; None, with a warning, where this version does not know their names."""
    try:
        return (GatherConfig if kernel in GATHERS else GemmConfig)(**values)
    except TypeError as error:
        warnings.warn(f"fila_kernels: the tuned config of {kernel} is not used: {error}", stacklevel=2)
        return None


def plain(config: Config) -> dict[str, Any]:
    """The plain values that `config_from` takes back."""
    return asdict(config)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def _columns(config: GemmConfig, problem: Problem) -> int:
    """Columns of the accumulator: a single pass holds the whole hidden width."""
    return power_of_two(problem.n) if problem.kernel == "single_pass" else config.block_n


def shared_memory(config: GemmConfig, problem: Problem) -> int:
    """Bytes that the operands' pipeline takes, by the arrays' sizes."""
    stages, size = config.num_stages, problem.dtype.itemsize
    columns = _columns(config, problem)
    first = stages * (config.rows + columns) * config.block_k * size
    if problem.kernel != "single_pass":
        return first
    return max(first, (config.block_m + stages * config.block_n) * columns * size)


def supports(config: Config, problem: Problem, device: Device) -> bool:
    """Whether `config` can run `problem` on `device`: the right kind, legal sizes, and room for all of it.

    It does not say that the config is fast; that is for the lists above, and for the tuner.
    """
    sizes = [getattr(config, field.name) for field in fields(config) if field.name.startswith("block")]
    if not all(_is_power_of_two(size) for size in (*sizes, config.num_warps)) or not 1 <= config.num_warps <= 16:
        return False
    registers = 128 * 32 * config.num_warps  # float32 values, half of what a thread can have
    if isinstance(config, GatherConfig):
        return problem.kernel in GATHERS and config.block_rows * config.block_columns <= registers
    single_pass = problem.kernel == "single_pass"
    if problem.kernel in GATHERS or min(sizes) < 16 or min(config.num_stages, config.split_k) < 1:
        return False
    if single_pass and max(problem.n, problem.k) > TRITON_SINGLE_PASS_WIDTH:
        return False
    if config.split_k > 1 and problem.kernel != "weight_gradient":
        return False
    if not _is_power_of_two(config.split_epilogue) or config.block_n // config.split_epilogue < 16:
        return False
    if config.tma and (single_pass or not problem.aligned or not device.copies_tiles or max(sizes) > 256):
        return False
    if config.tail_m and not (
        # Tried on compute capability 9 alone.
        (problem.kernel in TAILED and config.tma and device.capability[0] == 9)
        and (_is_power_of_two(config.tail_m) and 16 <= config.tail_m < config.block_m)
    ):
        return False
    if config.warp_specialize and not (
        # Some other shapes compile to a kernel that only traps.
        config.tma and device.capability[0] == 10 and config.num_warps == 8 and config.block_m == 128
    ):
        return False
    if config.rows * _columns(config, problem) > registers:
        return False
    return shared_memory(config, problem) <= device.shared_memory


def _listed(problem: Problem, device: Device) -> list[Config]:
    """The configs that suit a kind of problem, whether or not this one and this device have room for each."""
    if problem.kernel in GATHERS:
        whole = problem.n & -problem.n  # the largest power of two that divides the channels: no lane is idle
        columns = min(128, max(16, whole if whole >= 32 else power_of_two(problem.n)))
        if problem.kernel == "crop_resize_backward":
            # Most cells get nothing but their zero: few warps with much to store each.
            return [GatherConfig(r, min(columns, 64) * w // 4, w) for w in (4, 8) for r in (64, 32, 16)]
        rows = (32, 16, 64) if problem.kernel == "gate_backward" else (32, 16, 8)
        return [GatherConfig(r, c, w) for w in (4, 8) for c in dict.fromkeys((columns, 2 * columns)) for r in rows]
    if problem.kernel == "single_pass":
        return list(_single_pass(problem, device))
    if problem.dtype == torch.float32:
        return list(FLOAT32_TILES)
    if device.copies_tiles and problem.aligned:
        tall = [TALL_TILE] if problem.kernel in TALL else []
        tiles = [*DESCRIPTOR_TILES, *tall, ONE_IMAGE_TILE]
        return [*tiles, SPECIALIZED_TILE, *(replace(tile, persistent=False) for tile in tiles)]
    return list(POINTER_TILES if problem.vectorised else ELEMENT_TILES)


def _single_pass(problem: Problem, device: Device) -> list[GemmConfig]:
    """Rows, most first, whose accumulator leaves registers for addresses; a pipeline before none.

    Tensor cores that multiply from shared memory want 64 rows; a Hopper's accumulator of 64 by more than 256 leaves no
    registers for a pipeline. Those that multiply from registers have room for half of it, float32 for less.
    """
    if problem.dtype == torch.float32:
        return [GemmConfig(16, 16, 32, 8, stages) for stages in (2, 1)]
    width = power_of_two(problem.n)
    if device.copies_tiles:
        stages = (1,) if device.capability[0] == 9 and width > 256 else (2, 1)
        return [GemmConfig(64, 64, 32, 8, s) for s in stages]
    return [GemmConfig(rows, 64, 32, 8, s) for rows in (64, 32, 16) if rows * width <= 64 * 256 for s in (2, 1)]


def _time(config: GemmConfig, problem: Problem, device: Device) -> float:
    """The relative time of all waves of tiles: a step multiplies an area and loads two edges for it.

    An edge's element counts as 24 products, a guess that makes large tiles win until a wave is too empty.
    """
    tiles = config.tiles(problem)
    if problem.kernel == "weight_gradient":
        waves = tiles / device.num_sms  # the depth is cut until the device is full
    else:
        together = resident(config, problem, device)
        waves = -(-tiles // (device.num_sms * together)) * together
    return waves * (config.rows * config.block_n + 24 * (config.rows + config.block_n))


def _splits(config: GemmConfig, problem: Problem, device: Device) -> int:
    """Parts of the depth that fill the device once, of at least eight steps each."""
    most = max(1, problem.k // (8 * config.block_k))
    return max(1, min(most, device.num_sms // config.tiles(problem), 32))


@cache
def default(problem: Problem, device: Device) -> Config:
    """The config without a measurement: of those that can run, the one whose waves of tiles take least."""
    if device == INTERPRETER:
        return _interpreted(problem)
    found = [config for config in _listed(problem, device) if supports(config, problem, device)]
    assert found, f"no config can run {problem} on {device.name}"
    tiles = [config for config in found if isinstance(config, GemmConfig) and not config.warp_specialize]
    if not tiles or problem.kernel == "single_pass" or problem.dtype == torch.float32:
        best = found[0]
    else:
        best = min(tiles, key=lambda config: _time(config, problem, device))
    if problem.kernel == "weight_gradient":
        assert isinstance(best, GemmConfig)
        return replace(best, split_k=_splits(best, problem, device))
    return best


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Every config worth measuring for `problem` on `device`, the default first."""
    found = _listed(problem, device)
    if problem.kernel == "weight_gradient":
        found = [replace(c, split_k=s) for c in found if isinstance(c, GemmConfig) for s in (1, 2, 4, 8, 16)]
    first = default(problem, device)
    return [first, *(config for config in found if config != first and supports(config, problem, device))]


def resident(config: GemmConfig, problem: Problem, device: Device) -> int:
    """Programs that a multiprocessor holds at a time: as shared memory allows, eight warps at most."""
    return max(1, min(device.shared_memory // shared_memory(config, problem), 8 // config.num_warps))


@cache
def programs(config: GemmConfig, problem: Problem, device: Device) -> int:
    """One per tile or, with a persistent config, as many as run at a time."""
    tiles = config.tiles(problem)
    return min(tiles, device.num_sms * resident(config, problem, device)) if config.persistent else tiles


def _interpreted(problem: Problem) -> Config:
    """Few large programs: the interpreter's cost is per operation, not per element."""
    if problem.kernel in GATHERS:
        # The interpreter adds one by one, a GPU in a tree: more rows than these, and float32 shows it.
        rows = 32 if problem.kernel == "gate_backward" else 256
        return GatherConfig(rows, min(64, max(16, power_of_two(problem.n))), 16)
    if problem.kernel == "single_pass":
        return GemmConfig(64, 64, 64, 8, 2)
    return GemmConfig(
        64, 64, 64, 4, 2, tma=problem.aligned, persistent=problem.aligned, split_epilogue=2,
        split_k=2 if problem.kernel == "weight_gradient" else 1,
    )  # fmt: skip
