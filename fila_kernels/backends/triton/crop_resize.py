"""Crop and resize: samples gathered from a map, and the transpose, in which each cell gathers from the samples.

features [B, h, w, C] of any strides; boxes [T, 4] float32; samples [T, N, C], N = G * G. Neither direction needs
atomics: a sample has one writer, a cell has one writer, and a cell adds up its samples in a fixed order.

Both read tables that `crop_tables_kernel` makes in one small launch; the transpose reads all of them:

    taps    [T, 2, G]     int32    lower tap of sample i along y (0) or x (1)
    weights [T, 2, G]     float32  the weight of the cell after it
    ranges  [T, 2, h + w] int32    first and past-the-last sample that reads a cell along y, then along x

A range is exact: taps never fall from one sample to the next, so it is the number of taps below a cell.

Strides and channels reach the kernels in units of VECTOR elements, the largest power of two up to 16 bytes that divides
them all; this tells the compiler that it may access so many elements at a time.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fila_kernels.backends.triton import host
from fila_kernels.backends.triton.configs import GatherConfig, Problem, power_of_two
from fila_kernels.backends.triton.host import blocks
from fila_kernels.backends.triton.primitives import axis_tap, bilinear, clamped_image, split_rows, upper_tap
from fila_kernels.call import UNMEASURED, Measured


@triton.jit
def crop_resize_fwd_kernel(
    p_features, p_taps, p_weights, p_index, p_out,
    num_tiles, images, channels, size, stride_b, stride_h, stride_w, stride_c, stride_out_t, stride_out_n,
    CHANNELS_FIRST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of samples, of any tiles, by one block of channels; channels go fastest."""
    samples = size * size
    channels = channels * VECTOR
    blocks_c = tl.cdiv(channels, BLOCK_C)
    i_c = tl.program_id(0) % blocks_c
    i_s = tl.program_id(0) // blocks_c
    row = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = row < num_tiles * samples
    tile, sample = split_rows(row, samples)
    line, place = split_rows(sample, size)
    at_y = tile * 2 * size + line
    at_x = tile * 2 * size + size + place
    top = tl.load(p_taps + at_y, mask=in_rows, other=0)
    left = tl.load(p_taps + at_x, mask=in_rows, other=0)
    weight_y = tl.load(p_weights + at_y, mask=in_rows, other=0.0)
    weight_x = tl.load(p_weights + at_x, mask=in_rows, other=0.0)
    p_map = p_features
    image = clamped_image(p_index, tile, images, in_rows) * stride_b
    bottom = (image + upper_tap(top, weight_y).to(tl.int64) * stride_h) * VECTOR
    top = (image + top.to(tl.int64) * stride_h) * VECTOR
    right = upper_tap(left, weight_x).to(tl.int64) * stride_w * VECTOR
    left = left.to(tl.int64) * stride_w * VECTOR
    if CHANNELS_FIRST:
        # Lanes run along x, where neighbours are near in memory: the tile is [BLOCK_C, BLOCK_S].
        inside = (channel < channels)[:, None] & in_rows[None, :]
        p_map += channel.to(tl.int64)[:, None] * stride_c
        top, bottom, left, right = top[None, :], bottom[None, :], left[None, :], right[None, :]
        weight_y, weight_x = weight_y[None, :], weight_x[None, :]
    else:
        inside = in_rows[:, None] & (channel < channels)[None, :]
        p_map += channel[None, :] * stride_c
        top, bottom, left, right = top[:, None], bottom[:, None], left[:, None], right[:, None]
        weight_y, weight_x = weight_y[:, None], weight_x[:, None]
    value = bilinear(p_map, top, bottom, left, right, weight_y, weight_x, inside)
    if CHANNELS_FIRST:
        value = tl.trans(value)
    p_rows = p_out + (tile.to(tl.int64) * stride_out_t + sample.to(tl.int64) * stride_out_n) * VECTOR
    written = in_rows[:, None] & (channel < channels)[None, :]
    tl.store(p_rows[:, None] + channel[None, :], value.to(p_out.dtype.element_ty), mask=written)


@triton.jit
def crop_tables_kernel(
    p_boxes, p_index, p_taps, p_weights, p_ranges, p_order, p_bounds,
    num_tiles, images, height, width, size,
    TRANSPOSE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (i, axis): the tables of tile i along an axis; with TRANSPOSE also the tiles ordered by image.

    order [T] lists tiles by image, and by number within one; those of image b are order[bounds[b] : bounds[b + 1]].
    """
    i = tl.program_id(0)
    axis = tl.program_id(1)
    if i < num_tiles:
        sample = tl.arange(0, BLOCK_G)
        inside = sample < size
        cells = tl.where(axis == 0, height, width)
        low = tl.load(p_boxes + i * 4 + axis)
        high = tl.load(p_boxes + i * 4 + 2 + axis)
        lower, weight = axis_tap(low, high, sample, size, cells)
        row = (i * 2 + axis) * size + sample
        tl.store(p_taps + row, lower, mask=inside)
        tl.store(p_weights + row, weight, mask=inside)
        if TRANSPOSE:
            upper = upper_tap(lower, weight)
            p_first = p_ranges + i.to(tl.int64) * 2 * (height + width) + tl.where(axis == 0, 0, height)
            for start in range(0, cells, BLOCK_CELLS):
                cell = start + tl.arange(0, BLOCK_CELLS)
                before = (upper[None, :] < cell[:, None]) & inside[None, :]
                through = (lower[None, :] <= cell[:, None]) & inside[None, :]
                tl.store(p_first + cell, tl.sum(before.to(tl.int32), 1), mask=cell < cells)
                tl.store(p_first + height + width + cell, tl.sum(through.to(tl.int32), 1), mask=cell < cells)
    if TRANSPOSE:
        # Axis 0 finds the place of tile i in the order, axis 1 the first place of image i.
        is_tile = (axis == 0) & (i < num_tiles)
        own = clamped_image(p_index, i, images, is_tile)
        target = tl.where(axis == 0, own, i.to(tl.int64))
        count = 0
        for start in range(0, num_tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            image = clamped_image(p_index, tile, images, tile < num_tiles)
            ahead = (image < target) | ((image == target) & (tile < i) & (axis == 0))
            count += tl.sum((ahead & (tile < num_tiles)).to(tl.int32), 0)
        tl.store(p_order + count, i, mask=is_tile)
        tl.store(p_bounds + i, count, mask=(axis == 1) & (i <= images))


@triton.jit
def tap_weight(p_taps, p_weights, sample, cell, mask):
    """The weight of `cell`, one of the two taps, in `sample`."""
    weight = tl.load(p_weights + sample, mask=mask, other=0.0)
    is_lower = tl.load(p_taps + sample, mask=mask, other=-1) == cell  # beyond the mask no cell is
    return tl.where(is_lower, 1.0 - weight, weight)


@triton.jit
def crop_resize_bwd_kernel(
    p_grad, p_taps, p_weights, p_ranges, p_order, p_bounds, p_alpha, p_out,
    height, width, channels, size, stride_t, stride_y, stride_x, stride_c,
    VECTOR: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of a row's cells by one block of channels; program (block, row, map).

    Cells that no sample reads get their zero here. Most rows of a large map are not touched by most tiles: a tile is
    asked for the row, one number for the whole block, before anything is loaded for its cells.
    """
    channels = channels * VECTOR
    blocks_c = tl.cdiv(channels, BLOCK_C)
    y = tl.program_id(1)
    i_b = tl.program_id(2)
    x = tl.program_id(0) // blocks_c * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = x < width
    in_channels = channel < channels
    total = tl.zeros((BLOCK_CELLS, BLOCK_C), dtype=tl.float32)
    past = height + width  # from a cell's first sample to its last in `ranges`
    p_channels = p_grad + channel.to(tl.int64) * stride_c
    for slot in range(tl.load(p_bounds + i_b), tl.load(p_bounds + i_b + 1)):
        i_t = tl.load(p_order + slot)
        p_range = p_ranges + i_t.to(tl.int64) * 2 * past
        first_y = tl.load(p_range + y)
        end_y = tl.load(p_range + past + y)
        if first_y < end_y:
            first_x = tl.load(p_range + height + x, mask=in_row, other=0)
            count_x = tl.load(p_range + past + height + x, mask=in_row, other=0) - first_x
            most_x = tl.max(count_x, 0)
            at_y = i_t.to(tl.int64) * 2 * size
            at_x = at_y + size + first_x
            for sample_y in range(first_y, end_y):
                weight_y = tap_weight(p_taps, p_weights, at_y + sample_y, y, True)
                p_row = p_channels + (i_t.to(tl.int64) * stride_t + tl.cast(sample_y, tl.int64) * stride_y) * VECTOR
                for step_x in range(most_x):
                    reads = step_x < count_x
                    weight = weight_y * tap_weight(p_taps, p_weights, at_x + step_x, x, reads)
                    offset = (first_x + step_x).to(tl.int64) * stride_x * VECTOR
                    wanted = reads[:, None] & in_channels[None, :]
                    b_grad = tl.load(p_row[None, :] + offset[:, None], mask=wanted, other=0.0)
                    total += weight[:, None] * b_grad.to(tl.float32)
    if p_alpha is not None:  # noqa: SIM102
        # A closed gate lets nothing through, not even 0 * NaN.
        if tl.load(p_alpha).to(tl.float32) == 0.0:
            total = tl.zeros((BLOCK_CELLS, BLOCK_C), dtype=tl.float32)
    p_line = p_out + (i_b.to(tl.int64) * height + y) * width * channels
    p_cells = p_line + x.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(p_cells, total.to(p_out.dtype.element_ty), mask=in_row[:, None] & in_channels[None, :])


def vector_of(dtype: torch.dtype, channels: int, strides: tuple[int, ...], last: int) -> int:
    """Elements per access, at most 16 bytes, that divide channels and strides; 1 where channels are not dense."""
    return math.gcd(16 // dtype.itemsize, channels, *strides) if last == 1 else 1


class Tables(NamedTuple):
    """Made by `crop_tables_kernel`; the last three are empty unless the transpose is wanted."""

    taps: Tensor
    weights: Tensor
    ranges: Tensor
    order: Tensor
    bounds: Tensor


def crop_resize_fwd(
    features: Tensor, tables: Tables, image_index: Tensor, size: int, out: Tensor, measured: Measured = UNMEASURED
) -> None:
    """Samples into `out` [T, N, C] of any outer strides."""
    images, _, _, channels = features.shape
    tiles, samples = image_index.shape[0], size * size
    problem = Problem("crop_resize", tiles * samples, channels, 0, features.dtype)
    config = host.choose(problem, features.device, measured)
    assert isinstance(config, GatherConfig)
    *strides, last = features.stride()
    strides += [out.stride(0), out.stride(1)]
    vector = vector_of(features.dtype, channels, tuple(strides), last)
    host.run(
        crop_resize_fwd_kernel,
        (blocks(tiles * samples, config.block_rows) * blocks(channels, config.block_columns),),
        features, tables.taps, tables.weights, image_index.contiguous(), out,
        tiles, images, channels // vector, size, *(stride // vector for stride in strides[:3]), last,
        strides[3] // vector, strides[4] // vector,
        CHANNELS_FIRST=last != 1 and channels > 1, VECTOR=vector,
        BLOCK_S=config.block_rows, BLOCK_C=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def crop_tables(boxes: Tensor, image_index: Tensor, size: int, maps: tuple[int, int, int], transpose: bool) -> Tables:
    """Taps and weights of every sample; with `transpose` also the rest, which `crop_resize_bwd` reads too."""
    images, height, width = maps
    tiles = boxes.shape[0]

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape if transpose else (0,), dtype=torch.int32, device=boxes.device)

    tables = Tables(
        torch.empty((tiles, 2, size), dtype=torch.int32, device=boxes.device),
        torch.empty((tiles, 2, size), dtype=torch.float32, device=boxes.device),
        integers(tiles, 2, height + width), integers(tiles), integers(images + 1),
    )  # fmt: skip
    host.run(
        crop_tables_kernel, (max(tiles, images + 1) if transpose else tiles, 2),
        boxes.contiguous(), image_index.contiguous(), *tables, tiles, images, height, width, size,
        TRANSPOSE=transpose, BLOCK_G=power_of_two(size), BLOCK_CELLS=64, BLOCK_T=128, num_warps=4, num_stages=1,
    )  # fmt: skip
    return tables


def cells_of(width: int, most: int) -> int:
    """The largest block of cells whose last one in a row of `width` is not idle by more than a quarter of all."""
    sizes = [size for size in (most, most // 2, most // 4) if size >= 16] or [most]
    return next((size for size in sizes if 3 * size * blocks(width, size) <= 4 * width), sizes[-1])


def crop_resize_bwd(
    grad: Tensor, tables: Tables, size: int, out: Tensor, alpha: Tensor | None = None, measured: Measured = UNMEASURED
) -> None:
    """Samples' gradients [T, size, size, C] of any strides into the dense map `out` [B, h, w, C].

    With `alpha`, a gate of zero makes the result zero.
    """
    images, height, width, channels = out.shape
    *strides, last = grad.stride()
    vector = vector_of(grad.dtype, channels, tuple(strides), last)
    problem = Problem("crop_resize_backward", images * height * width, channels, 0, out.dtype)
    config = host.choose(problem, out.device, measured)
    assert isinstance(config, GatherConfig)
    cells = cells_of(width, config.block_rows)
    host.run(
        crop_resize_bwd_kernel,
        (blocks(width, cells) * blocks(channels, config.block_columns), height, images),
        grad, *tables, alpha, out, height, width, channels // vector, size, *(n // vector for n in strides), last,
        VECTOR=vector, BLOCK_CELLS=cells, BLOCK_C=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """Crops each box from its image's map and resizes it: [B, h, w, C] of any strides to [T, size, size, C].

    Args:
        features: channels-last; a map with channels first is read as it is, lanes along x.
        boxes: [T, 4] float32 y0, x0, y1, x1 in cells.
        image_index: [T] int32 or int64; an index that names no image is clamped.
        size: samples per side.
    """
    out = features.new_empty((boxes.shape[0], size, size, features.shape[3]))
    with host.device_guard(features.device):
        images, height, width, _ = features.shape
        tables = crop_tables(boxes, image_index, size, (images, height, width), False)
        crop_resize_fwd(features, tables, image_index, size, out.flatten(1, 2))
    return out


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """The transpose: [T, size, size, C] of any strides to a dense [B, h, w, C], for `maps` = (B, h, w)."""
    out = grad.new_empty((*maps, grad.shape[3]))
    with host.device_guard(grad.device):
        tables = crop_tables(boxes, image_index, grad.shape[1], maps, True)
        crop_resize_bwd(grad, tables, grad.shape[1], out)
    return out
