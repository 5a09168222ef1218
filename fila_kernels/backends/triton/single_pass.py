"""The whole forward pass in one kernel: crop, resize, both layers, gate and residual; no intermediate is stored.

A program owns BLOCK_M rows. Its accumulator holds the whole hidden width, so that Z is one accumulator and A one
operand of the second product; widths end at `call.TRITON_SINGLE_PASS_WIDTH`. Each row samples each channel once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fila_kernels.backends.triton import epilogue, host
from fila_kernels.backends.triton.configs import GemmConfig, Problem, power_of_two
from fila_kernels.backends.triton.gemm import Term, add_product
from fila_kernels.backends.triton.host import blocks, dense_rows
from fila_kernels.backends.triton.primitives import (
    at,
    bilinear,
    clamped_image,
    gelu,
    sample_taps,
    token_rows,
    upper_tap,
)
from fila_kernels.call import Call


@triton.jit
def single_pass_fwd_kernel(
    p_tokens, p_features, p_boxes, p_index, p_w1, p_b1, p_w2, p_alpha, p_hidden,
    size, images, height, width, feature_width, stride_b, stride_h, stride_w, stride_c, stride_w2,
    term, hidden_extent, extent, args,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_H is no less than the hidden width. `hidden_extent` is Z's, `extent` and `args` are fc2's epilogue's."""
    i_m = tl.program_id(0)
    i_row = i_m * BLOCK_M
    row = i_row + tl.arange(0, BLOCK_M)
    hidden = tl.arange(0, BLOCK_H)
    hidden_width = hidden_extent.num_columns
    in_hidden = hidden < hidden_width
    tile, patch, sample, is_patch = token_rows(row, extent.num_rows, extent.length, extent.prefix)
    # Before the accumulator exists: a division in double precision is a call, around which registers are kept.
    top, weight_y, left, weight_x = sample_taps(p_boxes, tile, patch, is_patch, size, height, width)
    image = clamped_image(p_index, tile, images, is_patch) * stride_b
    lower = (image + upper_tap(top, weight_y).to(tl.int64) * stride_h)[:, None]
    upper = (image + top.to(tl.int64) * stride_h)[:, None]
    right = (upper_tap(left, weight_x).to(tl.int64) * stride_w)[:, None]
    left = (left.to(tl.int64) * stride_w)[:, None]
    # The accumulator starts with the bias, which would not fit into registers beside a full one.
    bias = tl.load(p_b1 + hidden, mask=in_hidden, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32) + bias[None, :]
    acc = add_product(acc, p_tokens, p_w1, term, row, i_row, 0, hidden_extent, True, False, False, PRECISION, BLOCK_K)
    p_w1_s = p_w1 + term.depth + hidden.to(tl.int64)[None, :] * term.stride_b
    for k in tl.range(0, feature_width, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        in_channels = channel < feature_width
        inside = is_patch[:, None] & in_channels[None, :]
        p_channels = p_features + channel.to(tl.int64)[None, :] * stride_c
        s = bilinear(p_channels, upper, lower, left, right, weight_y[:, None], weight_x[:, None], inside)
        b_w1 = tl.load(p_w1_s + channel[:, None], mask=in_channels[:, None] & in_hidden[None, :], other=0.0)
        acc = tl.dot(s.to(b_w1.dtype), b_w1, acc, input_precision=PRECISION)
    if p_hidden is not None:
        p_rows = at(p_hidden, sample, hidden_width, hidden)
        tl.store(p_rows, acc.to(p_hidden.dtype.element_ty), mask=is_patch[:, None] & in_hidden[None, :])
    activated = gelu(acc, p_w2.dtype.element_ty == tl.float32).to(p_w2.dtype.element_ty)
    alpha = tl.load(p_alpha).to(tl.float32)
    for i_col in tl.range(0, extent.num_columns, BLOCK_N):
        column = i_col + tl.arange(0, BLOCK_N)
        p_columns = p_w2 + column.to(tl.int64)[None, :] * stride_w2 + hidden[:, None]
        b_w2 = tl.load(p_columns, mask=in_hidden[:, None] & (column < extent.num_columns)[None, :], other=0.0)
        product = tl.dot(activated, b_w2, input_precision=PRECISION)
        EPILOGUE(product, row, i_m, i_col, alpha, extent, args)


def single_pass(call: Call, out: Tensor, hidden: Tensor | None, branch: Tensor | None) -> None:
    """The fused tokens into `out` [T, L, D], Z into `hidden` [T * N, H] and M into `branch` [T * N, D]."""
    shape, tokens = call.shape, call.tokens
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    w1, w2 = dense_rows(call.fc1_weight), dense_rows(call.fc2_weight)
    problem = Problem("single_pass", rows, shape.hidden_width, shape.token_width, call.dtype)
    config = host.choose(problem, tokens.device, call.plan.configs)
    assert isinstance(config, GemmConfig)
    strides = tokens.stride(0), tokens.stride(1)
    args = epilogue.Fc2(out, branch, call.fc2_bias.contiguous(), tokens, *strides, epilogue.IS_PRODUCT[call.gate])
    host.run(
        single_pass_fwd_kernel, (blocks(rows, config.block_m),),
        tokens, call.features, call.boxes.contiguous(), call.image_index.contiguous(),
        w1, call.fc1_bias.contiguous(), w2, call.alpha, hidden,
        shape.grid, *shape.maps, shape.feature_width, *call.features.stride(), w2.stride(0),
        Term(shape.token_width, *strides, w1.stride(0)),
        epilogue.Extent(rows, shape.hidden_width, length, shape.prefix),
        epilogue.Extent(rows, shape.token_width, length, shape.prefix), args,
        EPILOGUE=epilogue.fc2_fwd, PRECISION=host.precision(call.dtype),
        BLOCK_H=max(16, power_of_two(shape.hidden_width)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
