"""Argument checks of the public functions: `ValueError` with what was expected and what came."""

import torch
from torch import Tensor

from fila_kernels.call import GATES, PLANS, grid_side

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)


def _expect(condition: bool, name: str, expected: str, got: object, *sizes: object) -> None:
    """`sizes` go into the braces of `expected` only on failure: printing takes time, and fixes a symbolic size."""
    if not condition:
        got = list(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{name}: expected {expected.format(*sizes)}, got {got}")


def _check_maps(features: Tensor, boxes: Tensor, image_index: Tensor) -> None:
    for name, tensor in (("features", features), ("boxes", boxes), ("image_index", image_index)):
        _expect(isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
    device = features.device
    _expect(device.type != "meta" or torch.compiler.is_compiling(), "features", "a tensor with data", "a meta tensor")
    _expect(features.dim() == 4, "features", "shape [B, h, w, C]", features.shape)
    _expect(features.dtype in FLOATS, "features", "dtype float32, bfloat16, float16 or float64", features.dtype)
    _expect(boxes.dim() == 2 and boxes.shape[1] == 4, "boxes", "shape [T, 4]", boxes.shape)
    _expect(boxes.dtype == torch.float32, "boxes", "dtype torch.float32", boxes.dtype)
    tiles = boxes.shape[0]
    _expect(
        image_index.dim() == 1 and image_index.shape[0] == tiles,
        "image_index",
        "shape [{}]",
        image_index.shape,
        tiles,
    )
    _expect(image_index.dtype in INDICES, "image_index", "dtype int32 or int64", image_index.dtype)
    _expect(boxes.device == device, "boxes", "device {} (as features)", boxes.device, device)
    _expect(image_index.device == device, "image_index", "device {} (as features)", image_index.device, device)
    images, height, width, _ = features.shape
    _expect(
        tiles == 0 or (images > 0 and height > 0 and width > 0),
        "features", "at least one image and one cell where there are tiles", features.shape,
    )  # fmt: skip
    _check_values(boxes, image_index, images)


def _check_values(boxes: Tensor, image_index: Tensor, images: int) -> None:
    """Values are looked at on the CPU only: elsewhere it would cost a synchronisation, and in a graph a break."""
    if boxes.device.type != "cpu" or boxes.shape[0] == 0 or torch.compiler.is_compiling():
        return
    finite = torch.isfinite(boxes).all(1)
    if not bool(finite.all()):
        tile = int((~finite).nonzero()[0])
        raise ValueError(f"boxes: expected finite y0, x0, y1, x1, got {boxes[tile].tolist()} for tile {tile}")
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not bool(ordered.all()):
        tile = int((~ordered).nonzero()[0])
        raise ValueError(f"boxes: expected y0 < y1 and x0 < x1, got {boxes[tile].tolist()} for tile {tile}")
    inside = (image_index >= 0) & (image_index < images)
    if not bool(inside.all()):
        tile = int((~inside).nonzero()[0])
        raise ValueError(f"image_index: expected 0 to {images - 1}, got {int(image_index[tile])} for tile {tile}")


def check_crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> None:
    """Raise `ValueError` unless `crop_resize` can run on these arguments."""
    _check_maps(features, boxes, image_index)
    _expect(size >= 1, "size", "at least 1", size)


def check_cvfm(
    tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor,
    *, num_prefix_tokens: int, gate: str, plan: str | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise `ValueError` unless `cvfm` can run on these arguments.

    Args:
        dtype: of all float tensors but `tokens` and `boxes`: that of `tokens`, but under autocast its own.
    """
    _expect(gate in GATES, "gate", "one of {}", repr(gate), ", ".join(GATES))
    _expect(plan is None or plan in PLANS, "plan", "one of {} or None", repr(plan), ", ".join(PLANS))
    _check_maps(features, boxes, image_index)
    _expect(isinstance(tokens, Tensor), "tokens", "a tensor", type(tokens).__name__)
    _expect(tokens.dim() == 3, "tokens", "shape [T, P + N, D]", tokens.shape)
    tiles, length, width = tokens.shape
    _expect(tiles == boxes.shape[0], "boxes", "shape [{}, 4] (as tokens)", boxes.shape, tiles)
    _expect(num_prefix_tokens >= 0, "num_prefix_tokens", "0 or more", num_prefix_tokens)
    if not torch.compiler.is_compiling():  # a traced length is a symbol; the operator looks at the real one
        grid_side(length - num_prefix_tokens)
    _expect(tokens.dtype in FLOATS, "tokens", "dtype float32, bfloat16, float16 or float64", tokens.dtype)
    _expect(width <= 1 or tokens.stride(2) == 1, "tokens", "a last stride of 1", tokens.stride())
    hidden, channels = fc1_weight.shape[0], features.shape[3]
    expected = {
        "fc1_weight": (fc1_weight, (hidden, width + channels), "[H, D + C]"),
        "fc1_bias": (fc1_bias, (hidden,), "[H]"),
        "fc2_weight": (fc2_weight, (width, hidden), "[D, H]"),
        "fc2_bias": (fc2_bias, (width,), "[D]"),
        "alpha": (alpha, (1,), "[1]"),
    }
    for name, (tensor, shape, letters) in expected.items():
        _expect(tuple(tensor.shape) == shape, name, "shape {} = {}", tensor.shape, letters, list(shape))
    for name, tensor in [("features", features), *((name, entry[0]) for name, entry in expected.items())]:
        _expect(
            tensor.dtype == dtype, name, "dtype {} ({})", tensor.dtype, dtype,
            "as tokens" if dtype == tokens.dtype else "autocast's",
        )  # fmt: skip
        _expect(tensor.device == tokens.device, name, "device {} (as tokens)", tensor.device, tokens.device)
