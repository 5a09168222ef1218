"""Baselines of `cvfm` and `crop_resize`: eager PyTorch (E0, E1), library calls (L), torchvision, quack.

E2 (E1 in a CUDA graph) and C (E1 through torch.compile) are made from E1 in `bench.variants`. Slicing needs boxes on
whole cells, so every baseline takes rounded ones. The CVFM baselines take boxes and indices as Python lists, which a
careful user keeps beside the tensors, since reading them back would synchronise a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.sampling import axis_taps

Boxes = Tensor | Sequence[Sequence[int]]
Indices = Tensor | Sequence[int]


def rounded(boxes: Tensor) -> Tensor:
    """Boxes rounded outwards to whole cells; only the global view's box changes."""
    return torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1)


def listed(boxes: Boxes, image_index: Indices) -> list[tuple[int, int, int, int, int]]:
    """Image, y0, x0, y1, x1 of each tile as Python integers."""
    edges = boxes.int().tolist() if isinstance(boxes, Tensor) else boxes
    images = image_index.tolist() if isinstance(image_index, Tensor) else image_index
    return [(image, *box) for image, box in zip(images, edges, strict=True)]


def sliced_resize(features: Tensor, boxes: Boxes, image_index: Indices, size: int) -> Tensor:
    """Slices: each run of boxes of one size is one channels-last `F.interpolate`."""
    maps = features.permute(0, 3, 1, 2)
    resized = []
    pending: list[Tensor] = []
    for image, y0, x0, y1, x1 in listed(boxes, image_index):
        crop = maps[image, :, y0:y1, x0:x1]
        if pending and pending[0].shape != crop.shape:
            resized.append(_resize(pending, size))
            pending = []
        pending.append(crop)
    resized.append(_resize(pending, size))
    return torch.cat(resized).permute(0, 2, 3, 1)


def _resize(crops: list[Tensor], size: int) -> Tensor:
    if crops[0].shape[1:] == (size, size):
        return torch.stack(crops)
    batch = torch.stack(crops) if len(crops) > 1 else crops[0][None]
    batch = batch.contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(size, size), mode="bilinear", align_corners=False)


def tapped_resize(features: Tensor, boxes: Boxes, image_index: Indices, size: int) -> Tensor:
    """Slices as an expert makes them: one call for a 2 x 2 grid of tiles that fills the maps of all images.

    An odd whole scale s takes every s-th cell, an even one the mean of 4 cells per s x s; the rest is interpolated.
    """
    crops = listed(boxes, image_index)
    images, side = features.shape[:2]
    half = side // 2
    grid = [(image, y, x, y + half, x + half) for image in range(images) for y in (0, half) for x in (0, half)]
    scale = half // size
    if half != scale * size or crops[: len(grid)] != grid:
        return sliced_resize(features, boxes, image_index, size)
    start = (scale - 1) // 2
    if scale % 2:
        taps = features[:, start::scale, start::scale]
    else:
        taps = features[:, start:, start:].unfold(1, 2, scale).unfold(2, 2, scale).mean((-1, -2))
    tiles = taps.unflatten(1, (2, size)).unflatten(3, (2, size)).transpose(2, 3).flatten(0, 2)
    views = crops[len(grid) :]
    if not views:
        return tiles
    rest = sliced_resize(features, [box for _, *box in views], [image for image, *_ in views], size)
    return torch.cat([tiles, rest])


def _wide(features: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is: 16 bits cannot place a sample among 384 cells."""
    return features if features.dtype in (torch.float32, torch.float64) else features.float()


def grid_sample(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """One `F.grid_sample` with the tiles of an image stacked in its grid; every image must have as many tiles."""
    images, height, width, channels = features.shape
    maps = _wide(features).permute(0, 3, 1, 2)
    boxes = boxes.to(maps.dtype)
    places = []
    for low, high, cells in ((0, 2, height), (1, 3, width)):
        start, end = boxes[:, low, None], boxes[:, high, None]
        centre = start + (torch.arange(size, device=boxes.device) + 0.5) * (end - start) / size - 0.5
        centre = torch.minimum(torch.maximum(centre, start), end - 1).clamp(0, cells - 1)
        places.append((2 * centre + 1) / cells - 1)
    y, x = places[0][:, :, None].expand(-1, -1, size), places[1][:, None, :].expand(-1, size, -1)
    order = torch.argsort(image_index, stable=True)
    grid = torch.stack([x, y], dim=-1)[order].view(images, -1, size, 2)
    sampled = F.grid_sample(maps, grid, align_corners=False, padding_mode="border").permute(0, 2, 3, 1)
    out = torch.empty(len(boxes), size, size, channels, dtype=features.dtype, device=features.device)
    return out.index_copy(0, order, sampled.reshape(out.shape).to(out.dtype))


def torchvision_obstacle() -> str | None:
    """Why `roi_align` cannot be called, or None."""
    try:
        from torchvision.ops import roi_align  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a CUDA-linked build beside a CPU torch lacks its operators
        return f"torchvision cannot be imported ({str(error).splitlines()[0]})"
    return None


def roi_align(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """torchvision's `roi_align` with one sample per bin and half-pixel centres.

    It reads cells beyond the box's edge where a tile is enlarged, so that the gate leaves it out there.
    """
    from torchvision.ops import roi_align as align

    maps = _wide(features).permute(0, 3, 1, 2)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes[:, [1, 0, 3, 2]]], dim=1).to(maps.dtype)
    sampled = align(maps, rois, (size, size), sampling_ratio=1, aligned=True)
    return sampled.permute(0, 2, 3, 1).to(features.dtype)


def scattered_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """dF [B, h, w, C] by adding every sample's four parts to their cells in float32: atomics on a GPU."""
    images, height, width = maps
    size = grad.shape[1]
    rows, row_weights = axis_taps(boxes[:, 0], boxes[:, 2], size, height)
    columns, column_weights = axis_taps(boxes[:, 1], boxes[:, 3], size, width)
    image = image_index.long()[:, None, None]
    found = torch.zeros(images * height * width, grad.shape[3], device=grad.device)
    for i in (0, 1):
        for j in (0, 1):
            cell = (image * height + rows[:, :, None, i]) * width + columns[:, None, :, j]
            weight = (row_weights[:, :, None, i] * column_weights[:, None, :, j]).float()
            found.index_add_(0, cell.flatten(), (grad.float() * weight[..., None]).flatten(0, 2))
    return found.view(images, height, width, -1).to(grad.dtype)


def naive_eager(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """E0: a loop over tiles on NCHW maps, as one first writes it."""
    maps = features.permute(0, 3, 1, 2).contiguous()
    out = []
    for tile, (image, y0, x0, y1, x1) in enumerate(listed(boxes, image_index)):
        patches = tokens[tile, num_prefix_tokens:]
        size = int(patches.shape[0] ** 0.5)
        crop = maps[image : image + 1, :, y0:y1, x0:x1]
        sampled = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)
        joint = torch.cat([patches, sampled[0].flatten(1).t()], dim=-1)
        branch = F.linear(F.gelu(F.linear(joint, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        out.append(torch.cat([tokens[tile, :num_prefix_tokens], patches + torch.tanh(alpha * branch)]))
    return torch.stack(out)


def tuned_eager(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
    resize: Callable[..., Tensor] = sliced_resize,
) -> Tensor:  # fmt: skip
    """E1: one batch of resized slices, one cat, two linear layers; boxes of one size next to each other are fastest."""
    patches = tokens[:, num_prefix_tokens:]
    sampled = resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    hidden = F.gelu(F.linear(torch.cat([patches, sampled], dim=-1), fc1_weight, fc1_bias))
    fused = patches + torch.tanh(alpha * F.linear(hidden, fc2_weight, fc2_bias))
    return torch.cat([tokens[:, :num_prefix_tokens], fused], dim=1)


def tapped_eager(**arguments: Any) -> Tensor:
    """E1 with `tapped_resize`."""
    return tuned_eager(**arguments, resize=tapped_resize)


class _GatedMlp(torch.autograd.Function):
    """tanh(alpha (gelu(J W1' + b1) W2' + b2)) for rows J [rows, D + C], with its derivative written by hand.

    cuBLASLt's GELU epilogue keeps nothing to differentiate by, so that GELU is a pass of its own. alpha is folded into
    W2 and b2, and the gate's tanh is kept in place of M.
    """

    @staticmethod
    def forward(ctx: Any, joint: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, alpha: Tensor) -> Tensor:
        z = torch.addmm(b1, joint, w1.t())
        a = F.gelu(z)
        gate = torch.addmm(b2 * alpha, a, (w2 * alpha).t()).tanh_()
        ctx.save_for_backward(joint, w1, w2, b2, alpha, z, a, gate)
        return gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        joint, w1, w2, b2, alpha, z, a, gate = ctx.saved_tensors
        du = torch.ops.aten.tanh_backward(grad, gate)  # of u = alpha M
        du_sum, products = du.sum(0), du.t() @ a
        # sum du M = <du' a, W2> + <sum du, b2>
        dalpha = (products * w2).sum() + (du_sum * b2).sum()
        dz = torch.ops.aten.gelu_backward(du @ (w2 * alpha), z)
        return dz @ w1, dz.t() @ joint, dz.sum(0), products * alpha, du_sum * alpha, dalpha.reshape(1)


def _joint(tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, prefix: int) -> tuple[Tensor, Tensor]:
    """The patch tokens, and rows [X ; S] by `tapped_resize`."""
    patches = tokens[:, prefix:]
    sampled = tapped_resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    return patches, torch.cat([patches, sampled], dim=-1).flatten(0, 1)


def library(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """L: what an expert assembles from library calls, differentiable; alpha is folded into fc2.

    For inference cuBLASLt's products have bias and GELU epilogues, on a GPU GELU's tanh form; the gate leaves the
    variant out where that is too far from the definition.
    """
    patches, joint = _joint(tokens, features, boxes, image_index, num_prefix_tokens)
    if torch.is_grad_enabled():
        gate = _GatedMlp.apply(joint, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha).view(patches.shape)
        return torch.cat([tokens[:, :num_prefix_tokens], patches + gate], dim=1)
    hidden = torch._addmm_activation(fc1_bias, joint, fc1_weight.t(), use_gelu=True)
    gate = torch.addmm(fc2_bias * alpha, hidden, (fc2_weight * alpha).t()).tanh_().view(patches.shape)
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    out[:, :num_prefix_tokens] = tokens[:, :num_prefix_tokens]
    torch.add(patches, gate, out=out[:, num_prefix_tokens:])
    return out


def quack(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """L for inference with quack's CuTe GEMMs: tanh-form GELU in the first epilogue, the gate's tanh in the second."""
    from quack.gemm_interface import gemm_act

    patches, joint = _joint(tokens, features, boxes, image_index, num_prefix_tokens)
    _, hidden = gemm_act(joint, fc1_weight.t(), bias=fc1_bias, activation="gelu_tanh_approx", store_preact=False)
    weight, bias = (fc2_weight * alpha).t(), fc2_bias * alpha
    _, gate = gemm_act(hidden, weight, bias=bias, activation="tanh", store_preact=False)
    return torch.cat([tokens[:, :num_prefix_tokens], patches + gate.view(patches.shape)], dim=1)
