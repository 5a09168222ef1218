"""The epilogues of `gemm_kernel`: one jit function and one tuple of arguments per product, called on a finished tile.

    fc1, fc1_projected   Z = acc + b1,  or Z = acc + R(P);  A = gelu(Z)
    fc2                  M = acc + b2;  out = X + gate(M) on patch tokens, X on prefix tokens
    hidden_gradient      dZ = acc gelu'(Z);  A = gelu(Z) again
    input_gradient       dX = dY + acc in the columns of W1x,  dS = acc in those of W1s
    weight_gradient      dW = acc

Each takes `(acc, row, i_m, i_col, alpha, extent, args)`: a float32 tile [rows, columns], its rows, the number of its
block of rows, its first column, the gate's parameter, the product's `Extent`, and its own tuple. It returns one value
per row, which the kernel sums over the tile, or 0. A field that is None is not computed, read or written.

Z, M are [T * N, width], a row per sample; A, dZ, dX, dS and the result are [T, L, width], a row per token, and those of
prefix tokens are zero in dZ and of no account in A and dS.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fila_kernels.backends.triton.primitives import (
    at,
    bilinear,
    clamped_image,
    gated,
    gelu,
    gelu_and_slope,
    precise_tanh,
    row_offsets,
    split_rows,
    token_rows,
    upper_tap,
)

IS_PRODUCT = {"product": tl.constexpr(True), "scale": tl.constexpr(False)}


class Extent(NamedTuple):
    """Sizes of a product's result, and how its rows are tokens: L per tile, the first P of them prefix tokens."""

    num_rows: int
    num_columns: int
    length: int
    prefix: int


class Fc1(NamedTuple):
    p_hidden: Tensor | None  # Z
    p_activated: Tensor | None  # A
    p_bias: Tensor


class Fc1Projected(NamedTuple):
    p_hidden: Tensor | None
    p_activated: Tensor | None
    p_projected: Tensor  # P [B, h, w, H], bias included
    p_taps: Tensor  # both as in crop_resize.py
    p_weights: Tensor
    p_index: Tensor
    size: int
    images: int
    height: int
    width: int


class Fc2(NamedTuple):
    p_out: Tensor | None
    p_branch: Tensor | None  # M
    p_bias: Tensor
    p_tokens: Tensor
    stride_t: int
    stride_l: int
    PRODUCT: Any  # IS_PRODUCT of the gate


class HiddenGradient(NamedTuple):
    p_hidden_grad: Tensor | None  # dZ
    p_activated: Tensor | None  # A
    p_bias_sums: Tensor | None  # [blocks of rows, H]
    p_hidden: Tensor  # Z
    PRODUCT: Any


class InputGradient(NamedTuple):
    p_tokens_grad: Tensor | None  # dX
    p_sampled_grad: Tensor | None  # dS, or the map's own gradient
    p_grad: Tensor  # dY
    stride_t: int
    stride_l: int
    token_columns: int  # the first columns of the product are dX's, as many as this


@triton.jit
def _store_hidden(z, row, column, extent, args):
    in_columns = column < extent.num_columns
    if args.p_hidden is not None:
        _, _, sample, is_patch = token_rows(row, extent.num_rows, extent.length, extent.prefix)
        p_rows = at(args.p_hidden, sample, extent.num_columns, column)
        tl.store(p_rows, z.to(args.p_hidden.dtype.element_ty), mask=is_patch[:, None] & in_columns[None, :])
    if args.p_activated is not None:
        inside = (row < extent.num_rows)[:, None] & in_columns[None, :]
        p_rows = at(args.p_activated, row, extent.num_columns, column)
        activated = gelu(z, args.p_activated.dtype.element_ty == tl.float32)
        tl.store(p_rows, activated.to(args.p_activated.dtype.element_ty), mask=inside)


@triton.jit
def fc1_fwd(acc, row, i_m, i_col, alpha, extent, args):
    column = i_col + tl.arange(0, acc.shape[1])
    bias = tl.load(args.p_bias + column, mask=column < extent.num_columns, other=0.0).to(tl.float32)
    _store_hidden(acc + bias[None, :], row, column, extent, args)
    return 0.0


@triton.jit
def fc1_projected_fwd(acc, row, i_m, i_col, alpha, extent, args):
    """Adds R(P): resizing the projection is projecting the resized map, and a constant bias passes through both."""
    column = i_col + tl.arange(0, acc.shape[1])
    num_columns = extent.num_columns
    tile, patch, _, is_patch = token_rows(row, extent.num_rows, extent.length, extent.prefix)
    at_y = tile * 2 * args.size + patch // args.size
    at_x = (tile * 2 + 1) * args.size + patch % args.size
    top = tl.load(args.p_taps + at_y, mask=is_patch, other=0)
    left = tl.load(args.p_taps + at_x, mask=is_patch, other=0)
    weight_y = tl.load(args.p_weights + at_y, mask=is_patch, other=0.0)
    weight_x = tl.load(args.p_weights + at_x, mask=is_patch, other=0.0)
    image = clamped_image(args.p_index, tile, args.images, is_patch)
    upper = (image * args.height + top) * args.width * num_columns
    lower = (image * args.height + upper_tap(top, weight_y)) * args.width * num_columns
    right = upper_tap(left, weight_x) * num_columns
    left = left * num_columns
    interpolated = bilinear(
        args.p_projected + column[None, :], upper[:, None], lower[:, None], left[:, None], right[:, None],
        weight_y[:, None], weight_x[:, None], is_patch[:, None] & (column < num_columns)[None, :],
    )  # fmt: skip
    _store_hidden(acc + interpolated, row, column, extent, args)
    return 0.0


@triton.jit
def fc2_fwd(acc, row, i_m, i_col, alpha, extent, args):
    column = i_col + tl.arange(0, acc.shape[1])
    in_columns = column < extent.num_columns
    _, _, sample, is_patch = token_rows(row, extent.num_rows, extent.length, extent.prefix)
    branch = acc + tl.load(args.p_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if args.p_branch is not None:
        p_rows = at(args.p_branch, sample, extent.num_columns, column)
        tl.store(p_rows, branch.to(args.p_branch.dtype.element_ty), mask=is_patch[:, None] & in_columns[None, :])
    if args.p_out is not None:
        inside = (row < extent.num_rows)[:, None] & in_columns[None, :]
        offsets = row_offsets(row, extent.length, args.stride_t, args.stride_l)
        x = tl.load(args.p_tokens + offsets[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if alpha != 0.0:  # a closed gate lets nothing through, whatever the branch holds
            passed = gated(branch, alpha, args.PRODUCT, args.p_bias.dtype.element_ty == tl.float32)
            x += tl.where(is_patch[:, None], passed, 0.0)
        p_rows = at(args.p_out, row, extent.num_columns, column)
        tl.store(p_rows, x.to(args.p_out.dtype.element_ty), mask=inside)
    return 0.0


@triton.jit
def hidden_grad(acc, row, i_m, i_col, alpha, extent, args):
    """Returns sum dA A by rows, the scale gate's part of alpha's gradient.

    On rows that are not patch tokens dM is zero, and so is what is made of it. Under a closed gate acc and Z may hold
    anything, and none of it is used.
    """
    column = i_col + tl.arange(0, acc.shape[1])
    in_columns = column < extent.num_columns
    _, _, sample, is_patch = token_rows(row, extent.num_rows, extent.length, extent.prefix)
    inside = is_patch[:, None] & in_columns[None, :]
    written = (row < extent.num_rows)[:, None] & in_columns[None, :]
    z = tl.load(at(args.p_hidden, sample, extent.num_columns, column), mask=inside, other=0.0).to(tl.float32)
    activated, slope = gelu_and_slope(z, args.p_hidden.dtype.element_ty == tl.float32)
    offsets = (row.to(tl.int64) * extent.num_columns)[:, None] + column[None, :]
    if args.p_activated is not None:
        tl.store(args.p_activated + offsets, activated.to(args.p_activated.dtype.element_ty), mask=written)
    factor = alpha if args.PRODUCT else precise_tanh(alpha)
    dot = tl.sum(acc * activated, 1)
    grad = acc * slope
    if not args.PRODUCT:
        grad *= factor
    if factor == 0.0:
        dot = tl.zeros((acc.shape[0],), dtype=tl.float32)
        grad = tl.zeros(acc.shape, dtype=tl.float32)
    if args.p_bias_sums is not None:
        tl.store(args.p_bias_sums + i_m * extent.num_columns + column, tl.sum(grad, 0), mask=in_columns)
    if args.p_hidden_grad is not None:
        tl.store(args.p_hidden_grad + offsets, grad.to(args.p_hidden_grad.dtype.element_ty), mask=written)
    return dot


@triton.jit
def input_grad(acc, row, i_m, i_col, alpha, extent, args):
    """A tile may hold the last columns of dX and the first of dS: each part is written where it has columns."""
    column = i_col + tl.arange(0, acc.shape[1])
    in_rows = (row < extent.num_rows)[:, None]
    if alpha == 0.0:
        acc = tl.zeros(acc.shape, dtype=tl.float32)
    # The test of a constant stands outside: what is beneath it may be no pointer.
    if args.p_tokens_grad is not None:  # noqa: SIM102
        if i_col < args.token_columns:
            inside = in_rows & (column < args.token_columns)[None, :]
            offsets = row_offsets(row, extent.length, args.stride_t, args.stride_l)
            grad = tl.load(args.p_grad + offsets[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            _, place = split_rows(row, extent.length)
            is_patch = (place >= extent.prefix)[:, None]
            total = tl.where(is_patch, grad + acc, grad)
            p_rows = at(args.p_tokens_grad, row, args.token_columns, column)
            tl.store(p_rows, total.to(args.p_tokens_grad.dtype.element_ty), mask=inside)
    if args.p_sampled_grad is not None:  # noqa: SIM102
        if i_col + acc.shape[1] > args.token_columns:
            channels = extent.num_columns - args.token_columns
            channel = column - args.token_columns
            p_rows = at(args.p_sampled_grad, row, channels, channel)
            inside = in_rows & ((channel >= 0) & (channel < channels))[None, :]
            tl.store(p_rows, acc.to(args.p_sampled_grad.dtype.element_ty), mask=inside)
    return 0.0


@triton.jit
def weight_grad(acc, row, i_m, i_col, alpha, extent, args):
    p_out, stride_out = args
    column = i_col + tl.arange(0, acc.shape[1])
    inside = (row < extent.num_rows)[:, None] & (column < extent.num_columns)[None, :]
    tl.store(at(p_out, row, stride_out, column), acc.to(p_out.dtype.element_ty), mask=inside)
    return 0.0
