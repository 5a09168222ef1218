"""The host side that all launchers share: the config of a launch, descriptors, and the launch itself."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fila_kernels.backends.triton import configs
from fila_kernels.backends.triton.configs import Config, GemmConfig, Problem
from fila_kernels.call import UNMEASURED, Measured


def device_guard(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose(
    problem: Problem, device: torch.device, config: Config | None = None, measured: Measured = UNMEASURED
) -> Config:
    """The caller's config, else the one measured for a problem as large, else the default.

    Raises:
        ValueError: a config that was asked for cannot run here.
    """
    limits = configs.device_of(device)
    if config is not None:
        if not configs.supports(config, problem, limits):
            raise ValueError(f"{config} cannot run {problem} on {limits.name}")
        return config
    nearest = measured.nearest(problem.kernel, (problem.m, problem.n, problem.k))
    found = None if nearest is None else configs.config_from(problem.kernel, nearest[0])
    if found is not None and configs.supports(found, problem, limits):
        return found
    return configs.default(problem, limits)


def aligned(*tensors: Tensor) -> bool:
    """Whether the tensor copy engine can read all of them: base and strides on 16 bytes, the last stride 1."""
    for tensor in tensors:
        *outer, inner = tensor.stride()
        if inner != 1 or tensor.data_ptr() % 16 or not tensor.numel():
            return False
        size = tensor.element_size()
        for stride in outer:
            if stride <= 0 or stride * size % 16:
                return False
    return True


@lru_cache(maxsize=1024)
def _described(device: torch.device, dtype: torch.dtype, shape: tuple, stride: tuple, block: tuple) -> dict[str, Any]:
    """The fields of a descriptor of any such tensor, checked once by its constructor."""
    base = torch.empty(0, dtype=dtype, device=device)
    return vars(TensorDescriptor(base, list(shape), list(stride), list(block)))


def operand(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Any:
    """What a kernel loads tiles from: a descriptor that reads zeros outside the tensor, or the pointer."""
    if not tma:
        return tensor
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(_described(tensor.device, tensor.dtype, tensor.shape, tensor.stride(), block))
    descriptor.base = tensor
    return descriptor


def tail(tensor: Tensor | None, config: GemmConfig) -> Any:
    """The descriptor for a tile's second block of rows, where the config has one."""
    if tensor is None or not config.tail_m:
        return None
    return operand(tensor, (config.tail_m, config.block_k), True)


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32 unless PyTorch's own are allowed not to be."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


class Product(NamedTuple):
    """How a product is launched: its config, programs, and what its kernel is specialised on. Shared by all calls."""

    config: GemmConfig
    grid: tuple[int, ...]
    constants: dict[str, Any]


def product(
    problem: Problem, device: torch.device, config: Config | None = None, measured: Measured = UNMEASURED
) -> Product:
    """One program for each tile, or, with a persistent config, as many as run at a time."""
    config = choose(problem, device, config, measured)
    assert isinstance(config, GemmConfig)
    return _product(problem, configs.device_of(device), config, precision(problem.dtype))


@lru_cache(maxsize=1024)
def _product(problem: Problem, limits: configs.Device, config: GemmConfig, precision: str) -> Product:
    tiles = config.tiles(problem)
    if config.persistent and problem.kernel != "weight_gradient":
        tiles = min(tiles, limits.num_sms * configs.resident(config, problem, limits))
    constants = {
        "TMA": config.tma, "SPECIALIZE": config.warp_specialize, "PRECISION": precision,
        "SPLIT": config.split_epilogue,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if problem.kernel in configs.TAILED:
        constants["TAIL_M"] = config.tail_m
    return Product(config, (tiles,), constants)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """The one place where kernels are launched; empty grids are not."""
    if all(grid):
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last stride is 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def flat_rows(tokens: Tensor) -> Tensor | None:
    """[T, L, width] as a matrix [T * L, width] over the same memory, if it is one."""
    tiles, length, width = tokens.shape
    if tiles > 1 and tokens.stride(0) != length * tokens.stride(1):
        return None
    return tokens.as_strided((tiles * length, width), (tokens.stride(1), 1))


def blocks(count: int, size: int) -> int:
    return -(-count // size)
