"""Turns boxes into taps (the cells that each sample reads) and weights, and finds the samples that read each cell.

One table serves both directions: the forward pass adds up the taps of each sample, the backward pass the samples of
each cell. Both are weighted bags of rows, the one primitive that a backend needs, and neither needs atomics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

REACH = 2.0**40


class Bags(NamedTuple):
    """Row r of the result is the sum over k in [offset[r], offset[r + 1]) of weight[k] * source[row[k]]."""

    row: Tensor  # [K] int32 or int64, a row of the source
    weight: Tensor  # [K], in the source's dtype
    offset: Tensor  # [rows + 1], of row's dtype


def axis_taps(start: Tensor, end: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Two taps and their weights along one axis for the box edges `start`, `end` [T]: [T, size, 2] int64 and float64.

    Positions are computed in the box's own frame, so that a far-away box is sampled as finely as one at the origin.
    """
    start, end = start.double()[:, None], end.double()[:, None]
    # A box from beyond any map's reach has no digits to lose: its frame is the map's.
    origin = torch.where(start.abs() < REACH, start.floor(), 0.0)
    fraction, extent = start - origin, end - start
    # Multiplied before divided: a sample on a cell's centre then comes out exactly, and reads no neighbour.
    centre = (torch.arange(size, dtype=torch.float64, device=start.device) + 0.5) * extent / size
    local = fraction + (centre - 0.5)
    local = torch.where(
        extent >= 1,
        torch.minimum(torch.maximum(local, fraction), fraction + extent - 1),
        fraction + (extent - 1) / 2,
    )
    local = torch.minimum(torch.maximum(local, -origin), cells - 1 - origin)
    below = local.floor()
    weight = local - below
    lower = below + origin
    upper = torch.minimum(lower + 1, end.ceil() - 1)
    taps = torch.stack([lower, upper], dim=-1).nan_to_num_(0.0).clamp_(0, cells - 1).long()
    return taps, torch.stack([1 - weight, weight], dim=-1)


def sample_bags(
    boxes: Tensor, image_index: Tensor, size: int, strides: tuple[int, int, int], shape: tuple[int, int, int], dtype
) -> Bags:
    """The taps of every sample, as bags over the rows of a map of `shape` (B, h, w) with row `strides` (B, h, w).

    Taps of weight zero are dropped: a box on whole cells at scale 1 reads one cell a sample, at even scales four, and a
    neighbour that does not count is not touched. Below float32 a weight that the dtype cannot hold is split in two,
    which keeps interpolation at 16 bits or more.
    """
    images, height, width = shape
    taps_y, weights_y = axis_taps(boxes[:, 0], boxes[:, 2], size, height)
    taps_x, weights_x = axis_taps(boxes[:, 1], boxes[:, 3], size, width)
    image = image_index.long().clamp(0, images - 1) * strides[0]
    cell = image[:, None, None, None, None] + (
        (taps_y * strides[1])[:, :, None, :, None] + (taps_x * strides[2])[:, None, :, None, :]
    )  # [T, G, G, 2, 2]
    weight = weights_y[:, :, None, :, None] * weights_x[:, None, :, None, :]
    # int32 rows are read faster, and suffice for anything but enormous maps.
    index_dtype = torch.int32 if images * max(strides[0], 1) < 2**31 else torch.int64
    cell = cell.flatten(3).flatten(0, 2).to(index_dtype)  # [T * N, 4]
    weight = weight.flatten(3).flatten(0, 2)
    if dtype in (torch.bfloat16, torch.float16):
        high = weight.to(dtype)
        low = (weight - high).to(dtype)
        cell, weight = torch.cat([cell, cell], dim=1), torch.cat([high, low], dim=1)
    weight = weight.to(dtype)
    kept = weight != 0
    offset = torch.zeros(kept.shape[0] + 1, dtype=index_dtype, device=boxes.device)
    torch.cumsum(kept.sum(1), 0, out=offset[1:])
    return Bags(cell[kept], weight[kept], offset)


def _by_cell(samples: Bags) -> tuple[Tensor, Bags]:
    """The transposed table: sorted cells, and for each entry the sample that reads it, in a fixed order over tiles."""
    num_samples = samples.offset.numel() - 1
    numbers = torch.arange(num_samples, dtype=samples.row.dtype, device=samples.row.device)
    sample = torch.repeat_interleave(numbers, samples.offset.diff(), output_size=samples.row.numel())
    cell, order = torch.sort(samples.row, stable=True)
    return cell, Bags(sample[order], samples.weight[order], samples.offset)


def cell_bags(samples: Bags, num_cells: int) -> Bags:
    """The transpose of `sample_bags`: a bag of samples for each of the map's cells."""
    cell, transposed = _by_cell(samples)
    edges = torch.arange(num_cells + 1, dtype=cell.dtype, device=cell.device)
    offset = torch.searchsorted(cell, edges, out_int32=cell.dtype == torch.int32)
    return transposed._replace(offset=offset)


def touched(samples: Bags) -> tuple[Tensor, Bags]:
    """The cells that any sample reads [K] int64, and a bag of samples for each of them alone."""
    cell, transposed = _by_cell(samples)
    cells, counts = torch.unique_consecutive(cell, return_counts=True)
    offset = torch.zeros(cells.numel() + 1, dtype=cell.dtype, device=cell.device)
    torch.cumsum(counts, 0, out=offset[1:])
    return cells.long(), transposed._replace(offset=offset)


def tile_slice(bags: Bags, first: int, last: int, bounds: list[int], patches: int) -> Bags:
    """The bags of tiles [first, last) of `patches` samples each, `bounds` being the offsets at the tiles' starts."""
    low, high = bounds[first], bounds[last]
    return Bags(bags.row[low:high], bags.weight[low:high], bags.offset[first * patches : last * patches + 1] - low)
