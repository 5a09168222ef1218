"""Argument checks of the public functions: `ValueError` with what was expected and what came.

Shapes, dtypes, devices and strides are checked at the public edge, also where it is traced. Values of boxes and indices
are checked inside the operators, which no compiler can leave out; on a GPU only while `check_gpu_values` is on.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fila_kernels.call import GATES, PLANS, grid_side

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
_FLOAT_NAMES = "dtype float32, bfloat16, float16 or float64"
_INTEGERS = (int, torch.SymInt, np.integer)

_gpu_values = False


def check_gpu_values(enabled: bool = True) -> None:
    """Check the values of boxes and indices on GPUs, too, from now on in this process.

    It is off at the start: each check waits for the device. CUDA graphs cannot be captured while it is on.

    Example:
        >>> check_gpu_values()  # a box or an index out of range now raises ValueError on any device
        >>> check_gpu_values(False)
    """
    global _gpu_values
    _gpu_values = bool(enabled)


def _expect(condition: bool, name: str, expected: str, got: object, *sizes: object) -> None:
    """`sizes` go into the braces of `expected` only on failure: printing takes time, and fixes a symbolic size."""
    if not condition:
        got = list(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{name}: expected {expected.format(*sizes)}, got {got}")


def check_integer(name: str, value: object, least: int) -> None:
    """Raise `ValueError` unless `value` is an int (no bool, no float) of at least `least`."""
    whole = isinstance(value, _INTEGERS) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        expected = "an int of 0 or more" if least == 0 else f"an int of at least {least}"
        raise ValueError(f"{name}: expected {expected}, got {value if whole else repr(value)}")


def check_tensors(names: Sequence[str], values: Sequence[object]) -> None:
    """Raise `ValueError` unless all values are tensors."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_settings(gate: object, plan: object, recompute: object) -> None:
    """Raise `ValueError` unless the settings of `cvfm` are among those that exist."""
    _expect(isinstance(gate, str) and gate in GATES, "gate", "one of {}", repr(gate), ", ".join(GATES))
    check_plan(plan)
    _expect(isinstance(recompute, bool), "recompute", "True or False", repr(recompute))


def check_plan(plan: object) -> None:
    """Raise `ValueError` unless `plan` names a plan or is None."""
    known = plan is None or (isinstance(plan, str) and plan in PLANS)
    _expect(known, "plan", "one of {} or None", repr(plan), ", ".join(PLANS))


def _check_maps(features: Tensor, boxes: Tensor, image_index: Tensor) -> None:
    device = features.device
    _expect(device.type != "meta" or torch.compiler.is_compiling(), "features", "a tensor with data", "a meta tensor")
    _expect(features.dim() == 4, "features", "shape [B, h, w, C]", features.shape)
    _expect(features.dtype in FLOATS, "features", _FLOAT_NAMES, features.dtype)
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


def check_values(boxes: Tensor, image_index: Tensor, images: int) -> None:
    """Raise `ValueError` for a box that is not finite or has no extent, or for an index of no image."""
    if boxes.shape[0] == 0 or (boxes.device.type != "cpu" and not _gpu_values):
        return
    # Two looks suffice where all is well: a NaN or an infinity in a box shows in its extents.
    shortest, longest = (boxes[:, 2:] - boxes[:, :2]).aminmax()
    lowest, highest = image_index.aminmax()
    if not (float(shortest) > 0 and float(longest) < math.inf):
        _check_boxes(boxes)
    if not (int(lowest) >= 0 and int(highest) < images):
        tile = int(((image_index < 0) | (image_index >= images)).nonzero()[0])
        raise ValueError(f"image_index: expected 0 to {images - 1}, got {int(image_index[tile])} for tile {tile}")


def _check_boxes(boxes: Tensor) -> None:
    """The same for boxes in words; the extent of a finite box may be infinite, and of an ordered one round to zero."""
    for tile, box in enumerate(boxes.tolist()):
        if not all(map(math.isfinite, box)):
            raise ValueError(f"boxes: expected finite y0, x0, y1, x1, got {box} for tile {tile}")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"boxes: expected y0 < y1 and x0 < x1, got {box} for tile {tile}")


def check_crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> None:
    """Raise `ValueError` unless `crop_resize` can run on these arguments, whatever their values."""
    check_tensors(("features", "boxes", "image_index"), (features, boxes, image_index))
    _check_maps(features, boxes, image_index)
    check_integer("size", size, 1)


def check_cvfm(
    tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor,
    *, num_prefix_tokens: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise `ValueError` unless `cvfm` can run on these tensors, whatever their values.

    Args:
        dtype: of all float tensors but `tokens` and `boxes`: that of `tokens`, but under autocast its own.
    """
    _check_maps(features, boxes, image_index)
    _expect(tokens.dim() == 3, "tokens", "shape [T, P + N, D]", tokens.shape)
    tiles, length, width = tokens.shape
    _expect(tiles == boxes.shape[0], "boxes", "shape [{}, 4] (as tokens)", boxes.shape, tiles)
    check_integer("num_prefix_tokens", num_prefix_tokens, 0)
    if not torch.compiler.is_compiling():  # a traced length is a symbol; the operator looks at the real one
        grid_side(length - num_prefix_tokens)
    _expect(tokens.dtype in FLOATS, "tokens", "dtype float32, bfloat16, float16 or float64", tokens.dtype)
    _expect(width <= 1 or tokens.stride(2) == 1, "tokens", "a last stride of 1", tokens.stride())
    _expect(fc1_weight.dim() == 2, "fc1_weight", "shape [H, D + C]", fc1_weight.shape)
    hidden, channels = fc1_weight.shape[0], features.shape[3]
    _expect(width > 0, "tokens", "a width D of at least 1", tokens.shape)
    _expect(channels > 0, "features", "a width C of at least 1", features.shape)
    _expect(hidden > 0, "fc1_weight", "a hidden width H of at least 1", fc1_weight.shape)
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


def check_explain(
    tokens: object, features: object, hidden_width: object, dtype: object, num_prefix_tokens: int
) -> None:
    """Raise `ValueError` unless `explain` can answer for these shapes and this dtype."""
    for name, shape, letters in (("tokens", tokens, "[T, P + N, D]"), ("features", features, "[B, h, w, C]")):
        sizes = shape if isinstance(shape, (tuple, list)) else ()
        whole = all(isinstance(size, _INTEGERS) and not isinstance(size, bool) and size >= 0 for size in sizes)
        _expect(bool(whole) and len(sizes) == letters.count(",") + 1, name, "a shape {}", repr(shape), letters)
    if hidden_width is not None:
        check_integer("hidden_width", hidden_width, 1)
    check_integer("num_prefix_tokens", num_prefix_tokens, 0)
    _expect(dtype in FLOATS, "dtype", _FLOAT_NAMES, dtype)
