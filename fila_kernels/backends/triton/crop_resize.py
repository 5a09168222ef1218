"""Crop and resize: samples gathered from a map, and the transpose, in which each cell gathers from the samples.

features [B, h, w, C] of any strides; boxes [T, 4] float32; samples [T, N, C], N = G * G. Neither direction needs
atomics: a sample has one writer, a cell has one writer, and a cell adds up its samples in a fixed order.

The transpose reads tables that `crop_tables_kernel` makes in one small launch, from the forward pass's own taps:

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
from fila_kernels.backends.triton.primitives import axis_tap, bilinear, clamped_image, sample_taps, upper_tap
from fila_kernels.call import UNMEASURED, Measured


@triton.jit
def crop_resize_fwd_kernel(
    p_features, p_boxes, p_index, p_out,
    num_tiles, images, height, width, channels, size,
    stride_b, stride_h, stride_w, stride_c, stride_out_t, stride_out_n,
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
    tile = row // samples
    sample = row % samples
    top, weight_y, left, weight_x = sample_taps(p_boxes, tile, sample, in_rows, size, height, width)
    image = clamped_image(p_index, tile, images, in_rows)
    bottom = (image * stride_b + upper_tap(top, weight_y).to(tl.int64) * stride_h) * VECTOR
    top = (image * stride_b + top.to(tl.int64) * stride_h) * VECTOR
    right = upper_tap(left, weight_x).to(tl.int64) * stride_w * VECTOR
    left = left.to(tl.int64) * stride_w * VECTOR
    p_map = p_features
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
    is_lower = tl.load(p_taps + sample, mask=mask, other=0) == cell
    return tl.where(mask, tl.where(is_lower, 1.0 - weight, weight), 0.0)


@triton.jit
def crop_resize_bwd_kernel(
    p_grad, p_taps, p_weights, p_ranges, p_order, p_bounds, p_alpha, p_out,
    height, width, channels, size, stride_t, stride_y, stride_x, stride_c,
    VECTOR: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of cells of one map by one block of channels; cells that no sample reads get their zero here."""
    channels = channels * VECTOR
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_cells = tl.cdiv(height * width, BLOCK_CELLS)
    i_c = tl.program_id(0) % blocks_c
    i_cells = tl.program_id(0) // blocks_c % blocks_cells
    i_b = tl.program_id(0) // blocks_c // blocks_cells
    cell = i_cells * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    channel = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_map = cell < height * width
    in_channels = channel < channels
    y = cell // width
    x = cell % width
    total = tl.zeros((BLOCK_CELLS, BLOCK_C), dtype=tl.float32)
    past = height + width  # from a cell's first sample to its last in `ranges`
    for slot in range(tl.load(p_bounds + i_b), tl.load(p_bounds + i_b + 1)):
        i_t = tl.load(p_order + slot).to(tl.int64)
        p_range = p_ranges + i_t * 2 * past
        first_y = tl.load(p_range + y, mask=in_map, other=0)
        count_y = tl.load(p_range + past + y, mask=in_map, other=0) - first_y
        first_x = tl.load(p_range + height + x, mask=in_map, other=0)
        count_x = tl.load(p_range + past + height + x, mask=in_map, other=0) - first_x
        # A cell that no row or no column of samples reaches is left out of both loops.
        touched = (count_y > 0) & (count_x > 0)
        most_y = tl.max(tl.where(touched, count_y, 0), 0)
        most_x = tl.max(tl.where(touched, count_x, 0), 0)
        p_axis = p_taps + i_t * 2 * size
        p_axis_weights = p_weights + i_t * 2 * size
        for step_y in range(most_y):
            sample_y = first_y + step_y
            reads_y = touched & (step_y < count_y)
            weight_y = tap_weight(p_axis, p_axis_weights, sample_y, y, reads_y)
            p_row = p_grad + (i_t * stride_t + sample_y.to(tl.int64) * stride_y) * VECTOR
            for step_x in range(most_x):
                sample_x = first_x + step_x
                reads = reads_y & (step_x < count_x)
                weight = weight_y * tap_weight(p_axis + size, p_axis_weights + size, sample_x, x, reads)
                p_sample = p_row + sample_x.to(tl.int64) * stride_x * VECTOR
                p_samples = p_sample[:, None] + channel.to(tl.int64)[None, :] * stride_c
                wanted = reads[:, None] & in_channels[None, :]
                total += weight[:, None] * tl.load(p_samples, mask=wanted, other=0.0).to(tl.float32)
    if p_alpha is not None:
        # A closed gate lets nothing through, not even 0 * NaN.
        total = tl.where(tl.load(p_alpha).to(tl.float32) == 0.0, 0.0, total)
    row = i_b.to(tl.int64) * height * width + cell
    p_cells = p_out + row[:, None] * channels + channel[None, :]
    tl.store(p_cells, total.to(p_out.dtype.element_ty), mask=in_map[:, None] & in_channels[None, :])


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
    features: Tensor, boxes: Tensor, image_index: Tensor, size: int, out: Tensor, measured: Measured = UNMEASURED
) -> None:
    """Samples into `out` [T, N, C] of any outer strides."""
    images, height, width, channels = features.shape
    tiles, samples = boxes.shape[0], size * size
    problem = Problem("crop_resize", tiles * samples, channels, 0, features.dtype)
    config = host.choose(problem, features.device, measured)
    assert isinstance(config, GatherConfig)
    *strides, last = features.stride()
    strides += [out.stride(0), out.stride(1)]
    vector = vector_of(features.dtype, channels, tuple(strides), last)
    host.run(
        crop_resize_fwd_kernel,
        (blocks(tiles * samples, config.block_rows) * blocks(channels, config.block_columns),),
        features, boxes.contiguous(), image_index.contiguous(), out,
        tiles, images, height, width, channels // vector, size, *(stride // vector for stride in strides[:3]), last,
        strides[3] // vector, strides[4] // vector,
        CHANNELS_FIRST=last != 1 and channels > 1, VECTOR=vector,
        BLOCK_S=config.block_rows, BLOCK_C=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def crop_tables(boxes: Tensor, image_index: Tensor, size: int, maps: tuple[int, int, int], transpose: bool) -> Tables:
    """Taps and weights of every sample; with `transpose` also the rest, which `crop_resize_bwd` reads."""
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
    host.run(
        crop_resize_bwd_kernel,
        (images * blocks(height * width, config.block_rows) * blocks(channels, config.block_columns),),
        grad, *tables, alpha, out, height, width, channels // vector, size, *(n // vector for n in strides), last,
        VECTOR=vector, BLOCK_CELLS=config.block_rows, BLOCK_C=config.block_columns,
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
        crop_resize_fwd(features, boxes, image_index, size, out.flatten(1, 2))
    return out


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """The transpose: [T, size, size, C] of any strides to a dense [B, h, w, C], for `maps` = (B, h, w)."""
    out = grad.new_empty((*maps, grad.shape[3]))
    with host.device_guard(grad.device):
        tables = crop_tables(boxes, image_index, grad.shape[1], maps, True)
        crop_resize_bwd(grad, tables, grad.shape[1], out)
    return out
