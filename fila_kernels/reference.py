"""The definition of the operation in plain PyTorch. Tests judge every backend against this file run in float64.

Shapes: B images, T tiles, P prefix tokens, G grid side, N = G * G, D token width, C feature channels, H hidden width.
It is written to be read beside the equations in ``docs`` and is never optimised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.call import grid_side


def axis_positions(start: Tensor, end: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower tap, upper tap and the upper tap's weight of `size` samples between the box edges `start` and `end` [T].

    Cell i spans [i, i + 1). Returns int64, int64 and float64 tensors [T, size].
    """
    start, end = start.double()[:, None], end.double()[:, None]
    # Multiplied before divided: a sample on a cell's centre then comes out exactly, and reads no neighbour.
    centre = (torch.arange(size, dtype=torch.float64, device=start.device) + 0.5) * (end - start) / size
    position = start + centre - 0.5
    position = torch.where(
        end - start >= 1,
        torch.minimum(torch.maximum(position, start), end - 1),
        ((start + end - 1) / 2).expand_as(position),
    )
    position = position.clamp(0, cells - 1)
    lower = position.floor()
    weight = position - lower
    upper = torch.minimum(lower + 1, end.ceil() - 1)
    # A tap of weight zero is not read, so that a non-finite neighbour cannot reach a sample on a cell's centre.
    upper = torch.where(weight == 0, lower, upper)
    # A NaN box keeps its NaN weight; its taps only have to be memory-safe.
    lower, upper = (tap.nan_to_num(0.0).clamp(0, cells - 1).long() for tap in (lower, upper))
    return lower, upper, weight


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """Crop each box from its image's map and resize it bilinearly to `size` x `size`.

    Args:
        features: [B, h, w, C], any float dtype. boxes: [T, 4] y0, x0, y1, x1 in cells. image_index: [T].
        size: samples per side.

    Returns: [T, size, size, C] in the dtype of `features`, interpolated in at least float32.
    """
    images, height, width, _ = features.shape
    accumulate = torch.promote_types(features.dtype, torch.float32)
    y0, x0, y1, x1 = boxes.unbind(-1)
    top, bottom, weight_y = axis_positions(y0, y1, size, height)
    left, right, weight_x = axis_positions(x0, x1, size, width)
    image = image_index.long().clamp(0, images - 1)[:, None, None]

    def cell(rows: Tensor, columns: Tensor) -> Tensor:
        return features[image, rows[:, :, None], columns[:, None, :]].to(accumulate)

    def mix(near: Tensor, far: Tensor, weight: Tensor) -> Tensor:
        weight = weight[..., None].to(accumulate)
        return torch.where(weight == 0, near, (1 - weight) * near + weight * far)

    weight_y, weight_x = weight_y[:, :, None], weight_x[:, None, :]
    upper_row = mix(cell(top, left), cell(top, right), weight_x)
    lower_row = mix(cell(bottom, left), cell(bottom, right), weight_x)
    return mix(upper_row, lower_row, weight_y).to(features.dtype)


def gated(branch: Tensor, alpha: Tensor, gate: str) -> Tensor:
    """tanh(alpha * branch) or tanh(alpha) * branch; a zero gate silences non-finite entries instead of making NaN.

    The derivative by alpha takes a non-finite entry as zero when alpha is zero. For other alpha, an infinite entry
    has saturated tanh(alpha * branch), so that its derivative is the limit, zero; a NaN stays a NaN.
    """
    closed = alpha == 0
    branch = torch.where(closed & ~torch.isfinite(branch), torch.zeros_like(branch), branch)
    if gate == "scale":
        return torch.tanh(alpha) * branch
    # Autograd would multiply the zero slope by the infinite entry; sign() is the same value with no slope at all.
    saturated = torch.isinf(branch)
    inner = torch.tanh(alpha * torch.where(saturated, torch.zeros_like(branch), branch))
    return torch.where(saturated, torch.sign(alpha.detach()) * torch.sign(branch.detach()), inner)


def cvfm(
    tokens: Tensor,
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    alpha: Tensor,
    *,
    num_prefix_tokens: int = 1,
    gate: str = "product",
) -> Tensor:
    """Fuse each tile's tokens [T, P+N, D] with its region of the feature map [B, h, w, C]; see `fila_kernels.cvfm`.

    Under autocast `tokens` may have another dtype than the rest; the residual and the result keep it.
    """
    prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    size = grid_side(patches.shape[1])
    sampled = crop_resize(features, boxes, image_index, size).flatten(1, 2)
    rows = torch.cat([patches.to(fc1_weight.dtype), sampled], dim=-1)
    hidden = F.gelu(F.linear(rows, fc1_weight, fc1_bias))
    branch = F.linear(hidden, fc2_weight, fc2_bias)
    if not branch.is_meta and bool((alpha == 0).all()):
        # The branch is switched off: its inputs get a gradient of exactly zero, also where 0 * inf would be NaN.
        # Sums over no elements tie them to the graph without reading a value.
        inputs = (tokens, features, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        branch = branch.detach() + sum(tensor.flatten()[:0].sum() for tensor in inputs)
    return torch.cat([prefix, (patches + gated(branch, alpha, gate)).to(tokens.dtype)], dim=1)
