"""What the operation is measured against: E0 naive eager, E1 tuned eager, and the crop-resize of `bench.library`.

E2 (E1 in a CUDA graph) and C (E1 through torch.compile) are made of E1 in `bench.variants`. Slicing knows whole cells
only, so all of them take rounded boxes; on a GPU they take boxes and indices as Python lists, which a careful user
keeps beside the tensors, since reading them back would synchronise.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Boxes = Tensor | Sequence[Sequence[int]]
Indices = Tensor | Sequence[int]


def rounded(boxes: Tensor) -> Tensor:
    """Boxes on whole cells, since slicing knows no others; the global view is the only one that moves."""
    return torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1)


def listed(boxes: Boxes, image_index: Indices) -> list[tuple[int, int, int, int, int]]:
    """Image, y0, x0, y1, x1 of each tile as Python integers."""
    edges = boxes.int().tolist() if isinstance(boxes, Tensor) else boxes
    images = image_index.tolist() if isinstance(image_index, Tensor) else image_index
    return [(image, *box) for image, box in zip(images, edges, strict=True)]


def naive_eager(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """E0: `cvfm` as one first writes it, a loop over tiles on NCHW maps."""
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
) -> Tensor:  # fmt: skip
    """E1: `cvfm` by slices of equal size resized as one channels-last batch, one cat, two linear layers.

    `boxes` must be on whole cells, with boxes of one size next to each other.
    """
    patches = tokens[:, num_prefix_tokens:]
    sampled = sliced_resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    hidden = F.gelu(F.linear(torch.cat([patches, sampled], dim=-1), fc1_weight, fc1_bias))
    fused = patches + torch.tanh(alpha * F.linear(hidden, fc2_weight, fc2_bias))
    return torch.cat([tokens[:, :num_prefix_tokens], fused], dim=1)


def sliced_resize(features: Tensor, boxes: Boxes, image_index: Indices, size: int) -> Tensor:
    """`crop_resize` by slices: each run of boxes of one size is one channels-last `F.interpolate`."""
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
    """`crop_resize` as an expert slices it, one call for a 2 x 2 grid of tiles that fills the maps of all images.

    An even whole scale s is the mean of 4 cells in every s x s, an odd one every s-th cell; the rest is interpolated.
    """
    crops = listed(boxes, image_index)
    images, side = features.shape[:2]
    half = side // 2
    grid = [
        (image, y, x, y + half, x + half) for image in range(images) for y in (0, half) for x in (0, half)
    ]  # fmt: skip
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
