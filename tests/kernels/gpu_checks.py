"""The checks of a backend on a device: test_gpu.py runs them on a GPU, test_gpu_checks.py on a CPU.

The definition runs in float64 on the CPU, so that a driver's fault cannot make both sides wrong alike.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fila_kernels import cvfm, reference
from fila_kernels.testing import DIFFERENTIABLE, Case, alpha_terms, assert_close, gradients, in_double, options

Inputs = Mapping[str, Tensor]
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
ROOM = 16  # elements beside a slice: a multiple of 16 bytes in every dtype


def unchanged(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs


def channels_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps as a convolution leaves them: [B, C, h, w] in memory, seen as [B, h, w, C]."""
    return inputs | {"features": inputs["features"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}


def aligned_slice(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens that are the middle of wider rows, every row at a multiple of 16 bytes, as descriptors need it."""
    tokens = inputs["tokens"]
    tiles, length, width = tokens.shape
    wide = tokens.new_full((tiles, length + 1, width + 2 * ROOM), float("nan"))
    wide[:, 1:, ROOM:-ROOM] = tokens
    return inputs | {"tokens": wide[:, 1:, ROOM:-ROOM]}


def placed(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and offset; what lies before, between and after its rows is NaN."""
    if tensor.is_contiguous() or not tensor.is_floating_point():
        return tensor.to(device, copy=True)
    offset = tensor.storage_offset()
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.full((offset + size + ROOM,), float("nan"), dtype=tensor.dtype, device=device)
    return storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def on_device(inputs: Inputs, device: str) -> dict[str, Tensor]:
    return {name: placed(tensor, device) for name, tensor in inputs.items()}


def gradient_for(inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(inputs["tokens"].shape, generator=generator, dtype=torch.float64).to(inputs["tokens"].dtype)


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    gate: str = "product",
    wanted=DIFFERENTIABLE,
    *,
    device: str = "cuda",
    change: Change = unchanged,
    function: Callable[..., Tensor] = cvfm,
    **settings,
) -> None:
    """The result and every wanted gradient within the bound."""
    inputs = change(case.inputs(dtype))
    wide, grad = in_double(inputs), gradient_for(inputs)
    common = options(case) | {"gate": gate}
    exact_out, exact = gradients(reference.cvfm, wide, grad, wanted, **common)
    there, grad_there = on_device(inputs, device), grad.to(device)
    eager_out, eager = gradients(reference.cvfm, there, grad_there, wanted, **common)
    out, found = gradients(function, there, grad_there, wanted, backend=backend, **common, **settings)
    assert_close("out", out.cpu(), exact_out, eager_out.cpu())
    for name in wanted:
        largest = alpha_terms(wide, grad, gate, case.prefix) if name == "alpha" else None
        assert_close(name, found[name].cpu(), exact[name], eager[name].cpu(), largest)
