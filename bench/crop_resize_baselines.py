"""What `crop_resize` alone is measured against: slices and F.interpolate, F.grid_sample, and torchvision's roi_align.

Each takes [B, h, w, C] maps and gives [T, size, size, C], whatever layout the library itself prefers.
`scattered_backward` is the atomic counterpart of this package's gathering backward pass; it is no part of the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.sampling import axis_taps


def wide(features: Tensor) -> Tensor:
    """Both libraries take positions in the map's own dtype, and 8 bits cannot place a sample on a map of 384 cells."""
    return features if features.dtype in (torch.float32, torch.float64) else features.float()


def grid_sample(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """One call, an image's tiles one below the other in its grid; every image must have as many tiles.

    Positions are clamped to the box, as the definition does.
    """
    images, height, width, channels = features.shape
    maps = wide(features).permute(0, 3, 1, 2)
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


def torchvision_reason() -> str | None:
    """Why torchvision's roi_align cannot be called, or None."""
    try:
        from torchvision.ops import roi_align  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a CUDA-linked build beside a CPU torch dies of its missing operators
        return f"torchvision cannot be imported ({str(error).splitlines()[0]})"
    return None


def roi_align(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """torchvision's, one sample a bin and half-pixel centres.

    Where a tile is enlarged it reads neighbours beyond the box's edge, so that the gate leaves it out there.
    """
    from torchvision.ops import roi_align as align

    maps = wide(features).permute(0, 3, 1, 2)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes[:, [1, 0, 3, 2]]], dim=1).to(maps.dtype)
    sampled = align(maps, rois, (size, size), sampling_ratio=1, aligned=True)
    return sampled.permute(0, 2, 3, 1).to(features.dtype)


def scattered_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """dF [B, h, w, C] by adding every sample's four parts to their cells: atomics on a GPU, in float32."""
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
