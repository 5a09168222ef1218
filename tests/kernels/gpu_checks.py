"""The checks of a backend on a device: test_gpu.py runs them on a GPU, test_gpu_checks.py on a CPU.

The definition runs in float64 on the CPU, so that a driver's fault cannot make both sides wrong alike.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fila_kernels import cvfm, planner, reference, rounding
from fila_kernels.call import Plan
from fila_kernels.testing import (
    DIFFERENTIABLE,
    FROZEN,
    LAYOUTS,
    Case,
    Expected,
    gradients,
    in_double,
    options,
    refill,
)

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
    return refill(storage.as_strided(tensor.shape, tensor.stride(), offset), tensor)


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
    autocast: bool = False,
    **settings,
) -> None:
    """The result and every wanted gradient within the bound; with `autocast` the tokens stay in float32."""
    inputs = change(case.inputs(dtype))
    if autocast:
        inputs["tokens"] = case.inputs(torch.float32)["tokens"]
    wide, grad = in_double(inputs), gradient_for(inputs)
    common = options(case) | {"gate": gate}
    exact_out, exact = gradients(reference.cvfm, wide, grad, wanted, **common)
    there, grad_there = on_device(inputs, device), grad.to(device)
    with torch.autocast(torch.device(device).type, dtype if autocast else None, enabled=autocast):
        eager_out, eager = gradients(reference.cvfm, there, grad_there, wanted, **common)
        out, found = gradients(function, there, grad_there, wanted, backend=backend, **common, **settings)
    assert out.dtype == eager_out.dtype
    roundings = rounding.of_cvfm(wide, dtype, grad, wanted, tokens_dtype=inputs["tokens"].dtype, **common)
    by_eager = {name: tensor.cpu() for name, tensor in ({"out": eager_out} | eager).items()}
    expected = Expected({"out": exact_out} | exact, by_eager, roundings)
    expected.check({name: tensor.cpu() for name, tensor in ({"out": out} | found).items()})


# Tokens, hidden activation and features: every row at a multiple of 16 bytes; none; D not while D + C is; one column.
WIDTHS = {"whole": (16, 24, 32), "odd": (7, 13, 5), "joint": (10, 16, 14), "one": (1, 5, 1), "one and odd": (1, 8, 15)}
# Of all directions, or of the forward pass, the weights' and the features' gradient.
PLANS = (
    None, "sample_first", "project_first", "single_pass", ("sample_first", "project_first", "sample_first"),
    ("project_first", "sample_first", "project_first"),
)  # fmt: skip


def matrix(dtypes: Mapping[str, torch.dtype], plans=PLANS) -> dict[str, tuple[Any, ...]]:
    """The factors of layouts and what is computed of them; a name of `dtypes` that is "autocast" has float32 tokens.

    A gate that is open by a hundredth shows what happens to the residual: the branch's own roundings are far below.
    """
    return {
        "frozen": tuple(FROZEN), "layout": LAYOUTS, "plan": plans, "widths": tuple(WIDTHS),
        "dtype": tuple(dtypes.items()), "images": (1, 3), "tiles": (3, 1), "gate": ("product", "scale"),
        "prefix": (1, 0, 2), "alpha": (0.7, 0.0, 0.01),
    }  # fmt: skip


def cell_id(cell: Mapping[str, Any]) -> str:
    """A choice in words, for pytest."""
    return "-".join("/".join(value[:1] if name == "dtype" else value) if isinstance(value, tuple) else str(value)
                    for name, value in cell.items())  # fmt: skip


def one_image_or_several(dtype: tuple[str, torch.dtype]) -> list[dict[str, Any]]:
    """All layouts by one image and several, everything wanted: what pairs alone need not hold."""
    rest = {
        "frozen": "nothing",
        "widths": "whole",
        "dtype": dtype,
        "tiles": 2,
        "gate": "product",
        "prefix": 1,
        "alpha": 0.7,
    }
    return [rest | {"layout": layout, "images": images, "plan": "project_first"}
            for layout in LAYOUTS for images in (1, 3)]  # fmt: skip


def check_cell(cell: Mapping[str, Any], backend: str, device: str = "cpu", grid: int = 2) -> None:
    """One choice of `matrix`."""
    token_width, hidden_width, feature_width = WIDTHS[cell["widths"]]
    name, dtype = cell["dtype"]
    case = Case(
        "cell", tiles=cell["tiles"], prefix=cell["prefix"], grid=grid, token_width=token_width,
        hidden_width=hidden_width, feature_width=feature_width, images=cell["images"], height=5, width=6,
        boxes="overlapping", layout=cell["layout"], alpha=cell["alpha"],
    )  # fmt: skip
    plan, planned = cell["plan"], nullcontext()  # type: Any, AbstractContextManager
    if isinstance(plan, tuple):
        chosen, plan = Plan(*plan, {}, backend, backend), None
        planned = mock.patch.object(planner, "choose", return_value=chosen)
    with planned:
        check(
            case, backend, dtype, cell["gate"], FROZEN[cell["frozen"]], device=device, autocast=name == "autocast",
            plan=plan,
        )  # fmt: skip
