"""The backward pass: element-wise derivatives in the epilogues of the products that need them, sums in a fixed order.

    dM = alpha (1 - tanh^2(alpha M)) dY            gate_backward; under the scale gate dM = dY, and the factor
                                                   tanh(alpha) goes onto what is made of it
    dZ = (dM W2) gelu'(Z),  A = gelu(Z)            hidden_gradient
    dX = dY + dZ W1x,  dS = dZ W1s                 input_gradient, one product over the columns of both
    dW2 = dM' A,  dW1x = dZ' X,  dW1s = dZ' S      weight_gradient, the depth cut into parts

Rows are flat as in `forward`; those of prefix tokens are zero in dM, dZ and A. Sums over rows go through partial sums
with one writer each, which `reduce_kernel` adds up in their order: the same bits at every run, and no atomics. A gate
of zero lets nothing through, not even 0 * NaN: every result of the branch is then exactly zero.
"""

import triton
import triton.language as tl

from fila_kernels.backends.triton.primitives import (
    add_product,
    finite_or_zero,
    gelu,
    gelu_slope,
    halves,
    row_offsets,
    tanh,
    tanh_slope,
    token_rows,
)


@triton.jit
def gate_bwd_kernel(
    p_grad, p_branch, p_alpha, p_bias, p_branch_grad, p_bias_sums, p_alpha_sums,
    num_rows, length, prefix, token_width, stride_t, stride_l,
    PRODUCT: tl.constexpr, WRITE: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dM [T, L, D], and for each block of rows its columns' sums, for each program its part of alpha's gradient."""
    blocks_n = tl.cdiv(token_width, BLOCK_N)
    i_m = tl.program_id(0) // blocks_n
    alpha = tl.load(p_alpha).to(tl.float32)
    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < token_width
    _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
    inside = is_patch[:, None] & in_columns[None, :]
    p_rows = p_grad + row_offsets(row, length, stride_t, stride_l)[:, None] + column[None, :]
    grad = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT or SUM_ALPHA:
        # Under the scale gate M is there, and looked at, only if the gate is closed.
        seen = inside if PRODUCT else tl.where(inside, alpha, 1.0) == 0.0
        p_rows = p_branch + (sample * token_width)[:, None] + column[None, :]
        branch = tl.load(p_rows, mask=seen, other=0.0).to(tl.float32)
        branch = tl.where(alpha == 0.0, finite_or_zero(branch), branch)
    if PRODUCT:
        slope = tanh_slope(alpha * branch) * grad
        # An infinite entry has saturated the gate; a NaN stays one.
        felt = tl.where(tl.abs(branch) == float("inf"), 0.0, branch)
        branch_grad = tl.where(alpha == 0.0, 0.0, alpha * slope)
    else:
        slope = grad
        if SUM_ALPHA:
            # sum dY M = sum (dY W2) A + sum dY b2, of which the first part is hidden_gradient's.
            bias = tl.load(p_bias + column, mask=in_columns, other=0.0).to(tl.float32)
            felt = tl.where(alpha == 0.0, branch, bias[None, :])
        branch_grad = grad
    if SUM_ALPHA:
        tl.store(p_alpha_sums + tl.program_id(0), tl.sum(tl.sum(tl.where(inside, slope * felt, 0.0), 1), 0))
    if SUM_BIAS:
        tl.store(p_bias_sums + i_m * token_width + column, tl.sum(branch_grad, 0), mask=in_columns)
    if WRITE:
        p_rows = p_branch_grad + (row.to(tl.int64) * token_width)[:, None] + column[None, :]
        written = (row < num_rows)[:, None] & in_columns[None, :]
        tl.store(p_rows, branch_grad.to(p_branch_grad.dtype.element_ty), mask=written)


@triton.jit
def gelu_kernel(
    p_hidden, p_activated, num_rows, length, prefix, hidden_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A [T, L, H] from Z [T * N, H]."""
    blocks_n = tl.cdiv(hidden_width, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < hidden_width
    _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
    p_rows = p_hidden + (sample * hidden_width)[:, None] + column[None, :]
    z = tl.load(p_rows, mask=is_patch[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    p_rows = p_activated + (row.to(tl.int64) * hidden_width)[:, None] + column[None, :]
    tl.store(p_rows, gelu(z).to(p_activated.dtype.element_ty), mask=(row < num_rows)[:, None] & in_columns[None, :])


@triton.jit
def hidden_epilogue(
    acc, row, i_row, i_col, alpha, p_hidden, p_hidden_grad, p_activated, p_bias_sums, num_rows, length, prefix,
    hidden_width,
    PRODUCT: tl.constexpr, WRITE: tl.constexpr, WRITE_ACTIVATED: tl.constexpr, SUM_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes a tile of dZ and A; returns sum dA A by rows, the scale gate's part of alpha's gradient."""
    if SPLIT > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        dot = hidden_epilogue(
            left, row, i_row, i_col, alpha, p_hidden, p_hidden_grad, p_activated, p_bias_sums, num_rows, length, prefix,
            hidden_width, PRODUCT, WRITE, WRITE_ACTIVATED, SUM_BIAS, SPLIT // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        dot += hidden_epilogue(
            right, row, i_row, i_col + BLOCK_N // 2, alpha, p_hidden, p_hidden_grad, p_activated, p_bias_sums, num_rows,
            length, prefix, hidden_width, PRODUCT, WRITE, WRITE_ACTIVATED, SUM_BIAS, SPLIT // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        return dot
    else:
        column = i_col + tl.arange(0, BLOCK_N)
        in_columns = column < hidden_width
        _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
        inside = is_patch[:, None] & in_columns[None, :]
        written = (row < num_rows)[:, None] & in_columns[None, :]
        p_rows = p_hidden + (sample * hidden_width)[:, None] + column[None, :]
        z = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
        activated = gelu(z)
        # Under a closed gate and on rows that are no patch tokens, nothing of the product is taken.
        counts = tl.where(inside, alpha, 0.0) != 0.0
        dot = tl.sum(tl.where(counts, acc * activated, 0.0), 1)
        offsets = (row.to(tl.int64) * hidden_width)[:, None] + column[None, :]
        if WRITE_ACTIVATED:
            tl.store(p_activated + offsets, activated.to(p_activated.dtype.element_ty), mask=written)
        factor = 1.0 if PRODUCT else tanh(alpha)
        hidden_grad = tl.where(counts, acc * factor * gelu_slope(z), 0.0)
        if SUM_BIAS:
            tl.store(p_bias_sums + i_row * hidden_width + column, tl.sum(hidden_grad, 0), mask=in_columns)
        if WRITE:
            tl.store(p_hidden_grad + offsets, hidden_grad.to(p_hidden_grad.dtype.element_ty), mask=written)
        return dot


@triton.jit
def hidden_grad_kernel(
    branch_grad, w, p_alpha, p_hidden, p_hidden_grad, p_activated, p_bias_sums, p_alpha_sums,
    num_rows, length, prefix, token_width, hidden_width, stride_w,
    PRODUCT: tl.constexpr, WRITE: tl.constexpr, WRITE_ACTIVATED: tl.constexpr, SUM_BIAS: tl.constexpr,
    SUM_ALPHA: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dZ [T, L, H] = (dM W2) gelu'(Z), and on the way A, the columns' sums by blocks of rows, and sum dA A."""
    alpha = tl.load(p_alpha).to(tl.float32)
    blocks_n = tl.cdiv(hidden_width, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M) * blocks_n, tl.num_programs(0)):
        i_m = i_tile // blocks_n
        i_col = i_tile % blocks_n * BLOCK_N
        row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = add_product(
            acc, branch_grad, w, row, i_m * BLOCK_M, i_col, num_rows, hidden_width, token_width, length,
            length * token_width, token_width, stride_w, False, TMA, SPECIALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        dot = hidden_epilogue(
            acc, row, i_m, i_col, alpha, p_hidden, p_hidden_grad, p_activated, p_bias_sums, num_rows, length, prefix,
            hidden_width, PRODUCT, WRITE, WRITE_ACTIVATED, SUM_BIAS, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if SUM_ALPHA:
            tl.store(p_alpha_sums + i_tile, tl.sum(dot, 0))


@triton.jit
def input_epilogue(
    acc, row, i_col, is_token, closed, p_grad, p_tokens_grad, p_sampled_grad, num_rows, length, prefix,
    token_width, feature_width, stride_t, stride_l,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if SPLIT > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        input_epilogue(
            left, row, i_col, is_token, closed, p_grad, p_tokens_grad, p_sampled_grad, num_rows, length, prefix,
            token_width, feature_width, stride_t, stride_l, TOKENS, FEATURES, ACCUMULATE, SPLIT // 2, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
        input_epilogue(
            right, row, i_col + BLOCK_N // 2, is_token, closed, p_grad, p_tokens_grad, p_sampled_grad, num_rows, length,
            prefix, token_width, feature_width, stride_t, stride_l, TOKENS, FEATURES, ACCUMULATE, SPLIT // 2, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
    else:
        column = i_col + tl.arange(0, BLOCK_N)
        in_rows = (row < num_rows)[:, None]
        flat = row.to(tl.int64)
        acc = tl.where(closed, 0.0, acc)
        # What is known at compile time first: beneath it stand pointers that need not be there.
        if TOKENS:  # noqa: SIM102
            if is_token:
                inside = in_rows & (column < token_width)[None, :]
                p_rows = p_grad + row_offsets(row, length, stride_t, stride_l)[:, None] + column[None, :]
                grad = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
                is_patch = (row % length >= prefix)[:, None]
                total = tl.where(is_patch, grad + acc, grad)
                p_rows = p_tokens_grad + (flat * token_width)[:, None] + column[None, :]
                tl.store(p_rows, total.to(p_tokens_grad.dtype.element_ty), mask=inside)
        if FEATURES:  # noqa: SIM102
            if not is_token:
                p_rows = p_sampled_grad + (flat * feature_width)[:, None] + column[None, :]
                inside = in_rows & (column < feature_width)[None, :]
                if ACCUMULATE:
                    acc += tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
                tl.store(p_rows, acc.to(p_sampled_grad.dtype.element_ty), mask=inside)


@triton.jit
def input_grad_kernel(
    hidden_grad, w, p_alpha, p_grad, p_tokens_grad, p_sampled_grad,
    num_rows, length, prefix, token_width, feature_width, hidden_width, stride_t, stride_l, stride_w,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, ACCUMULATE: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX [T, L, D] and dS [T, L, C], or the map's own rows: blocks of W1's columns, the tokens' first.

    ACCUMULATE adds the map's rows to what is there.
    """
    closed = tl.load(p_alpha).to(tl.float32) == 0.0
    blocks_x = tl.cdiv(token_width, BLOCK_N) if TOKENS else 0
    blocks_n = blocks_x + (tl.cdiv(feature_width, BLOCK_N) if FEATURES else 0)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M) * blocks_n, tl.num_programs(0)):
        i_row = i_tile // blocks_n * BLOCK_M
        i_n = i_tile % blocks_n
        is_token = i_n < blocks_x
        i_col = tl.where(is_token, i_n, i_n - blocks_x) * BLOCK_N
        row = i_row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = add_product(
            acc, hidden_grad, w, row, i_row, tl.where(is_token, i_col, token_width + i_col), num_rows,
            token_width + feature_width, hidden_width, length, length * hidden_width, hidden_width, stride_w,
            False, TMA, SPECIALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        input_epilogue(
            acc, row, i_col, is_token, closed, p_grad, p_tokens_grad, p_sampled_grad, num_rows, length, prefix,
            token_width, feature_width, stride_t, stride_l, TOKENS, FEATURES, ACCUMULATE, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def weight_epilogue(
    acc, p_out, i_m, i_col, rows, columns, stride_out, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    if SPLIT > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        weight_epilogue(left, p_out, i_m, i_col, rows, columns, stride_out, SPLIT // 2, BLOCK_M, BLOCK_N // 2)
        weight_epilogue(
            right, p_out, i_m, i_col + BLOCK_N // 2, rows, columns, stride_out, SPLIT // 2, BLOCK_M, BLOCK_N // 2
        )
    else:
        row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = i_col + tl.arange(0, BLOCK_N)
        p_rows = p_out + (row.to(tl.int64) * stride_out)[:, None] + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(p_rows, acc.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad_kernel(
    a, b, p_alpha, p_out, num_tiles, patches, rows, columns, stride_a_t, stride_a_l, stride_b_t, stride_b_l, stride_out,
    splits, FACTOR: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a' b [rows, columns], summed over the patch tokens of all tiles; program (tile of the result, part of the sum).

    Operands are [T, N, width] with the prefix tokens left out by their bases, so that nothing has to be zero there.
    With one part (`FACTOR` not None) the result itself is written, else float32 sums [splits, rows, columns].
    """
    blocks_n = tl.cdiv(columns, BLOCK_N)
    i_split = tl.program_id(1)
    i_m = tl.program_id(0) // blocks_n
    i_col = tl.program_id(0) % blocks_n * BLOCK_N
    steps_tile = tl.cdiv(patches, BLOCK_K)
    steps = num_tiles * steps_tile
    each = tl.cdiv(steps, splits)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = i_col + tl.arange(0, BLOCK_N)
    for step in tl.range(i_split * each, tl.minimum((i_split + 1) * each, steps), warp_specialize=SPECIALIZE):
        tile = step // steps_tile
        first = step % steps_tile * BLOCK_K
        if TMA:
            b_a = a.load([tile, first, i_m * BLOCK_M]).reshape(BLOCK_K, BLOCK_M)
            b_b = b.load([tile, first, i_col]).reshape(BLOCK_K, BLOCK_N)
        else:
            patch = first + tl.arange(0, BLOCK_K)
            in_tile = (patch < patches)[:, None]
            offset_a = tl.cast(tile, tl.int64) * stride_a_t + patch.to(tl.int64) * stride_a_l
            offset_b = tl.cast(tile, tl.int64) * stride_b_t + patch.to(tl.int64) * stride_b_l
            b_a = tl.load(a + offset_a[:, None] + m[None, :], mask=in_tile & (m < rows)[None, :], other=0.0)
            b_b = tl.load(b + offset_b[:, None] + n[None, :], mask=in_tile & (n < columns)[None, :], other=0.0)
        acc = tl.dot(b_a.T, b_b, acc, input_precision=PRECISION)
    if FACTOR is not None:
        acc = factored(acc, tl.load(p_alpha).to(tl.float32), FACTOR)
    p_part = p_out + i_split.to(tl.int64) * rows * columns
    weight_epilogue(acc, p_part, i_m, i_col, rows, columns, stride_out, SPLIT, BLOCK_M, BLOCK_N)


@triton.jit
def factored(total, alpha, FACTOR: tl.constexpr):
    """What a sum still lacks: nothing under a closed gate, tanh(alpha) for the scale gate's parameters, its slope."""
    if FACTOR == "parameter":
        total = tl.where(alpha == 0.0, 0.0, total)
    elif FACTOR == "scaled":
        total = tl.where(alpha == 0.0, 0.0, total * tanh(alpha))
    elif FACTOR == "slope":
        total = total * tanh_slope(alpha)
    return total


@triton.jit
def reduce_kernel(
    p_parts, p_alpha, p_out, parts, rows, columns, stride_out,
    FACTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums of float32 parts [parts, rows, columns] in their order, into rows of `out`."""
    elements = rows * columns
    element = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = element < elements
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        p_block = p_parts + part.to(tl.int64)[:, None] * elements + element[None, :]
        total += tl.sum(tl.load(p_block, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    total = factored(total, tl.load(p_alpha).to(tl.float32), FACTOR)
    p_elements = p_out + (element // columns).to(tl.int64) * stride_out + element % columns
    tl.store(p_elements, total.to(p_out.dtype.element_ty), mask=inside)
