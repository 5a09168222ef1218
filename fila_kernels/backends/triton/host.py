"""The host side that all launchers share: a launch's config, descriptors, rows as matrices, and the launch itself."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fila_kernels.backends.triton import configs
from fila_kernels.backends.triton.configs import Config, Problem
from fila_kernels.call import Measured


def device_guard(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose(problem: Problem, device: torch.device, measured: Measured) -> Config:
    """The config that was measured for a problem as large, if it can run here, else the default."""
    limits = configs.device_of(device)
    nearest = measured.nearest(problem.kernel, (problem.m, problem.n, problem.k))
    found = None if nearest is None else configs.config_from(problem.kernel, nearest[0])
    if found is not None and configs.supports(found, problem, limits):
        return found
    return configs.default(problem, limits)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """The one place where kernels are launched; empty grids are not."""
    if all(grid):
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


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


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor from which a kernel loads blocks of a tensor; elements outside it are read as zero."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(_described(tensor.device, tensor.dtype, tensor.shape, tensor.stride(), block))
    found.base = tensor
    return found


def precision(dtype: torch.dtype) -> str:
    """Float32 products are IEEE unless PyTorch's own are allowed not to be."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last stride is 1, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def flat_rows(rows: Tensor) -> Tensor | None:
    """[T, L, width] as a matrix [T * L, width] over the same memory, if it is one."""
    tiles, length, width = rows.shape
    if tiles > 1 and rows.stride(0) != length * rows.stride(1):
        return None
    return rows.as_strided((tiles * length, width), (rows.stride(1), 1))


def blocks(count: int, size: int) -> int:
    return -(-count // size)
