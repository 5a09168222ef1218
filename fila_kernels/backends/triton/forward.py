"""The forward pass in two products, each with everything around it in its epilogue.

    Z = [X ; S] W1' + b1,  A = gelu(Z)      fc1: two row operands and no concatenated copy; or, project-first,
    Z = X W1x' + R(P),     P = F W1s' + b1  the projection P [B, h, w, H] interpolated in the epilogue
    M = A W2' + b2,  out = X + gate(M)      fc2

or, where a block of rows of the hidden activation stays on chip, in one kernel that writes nothing but the result.

Products run over all T * L rows, since the patch tokens alone are not a matrix inside tokens [T, L, D]; S and A have
the same rows, those of prefix tokens being of no account. The hidden activation Z and the branch M that a backward
pass wants are written for the T * N samples only.

Operands come through tensor descriptors (TMA), whose pipeline Triton builds, or through pointers with masks. A tile's
rows are BLOCK_M, a power of two, and TAIL_M more in an accumulator of their own: 128 + 64 rows cut one image's tokens
into as many tiles as a large GPU has multiprocessors, where 128 would leave a second wave nearly empty.
"""

import triton
import triton.language as tl

from fila_kernels.backends.triton.primitives import (
    add_product,
    add_products,
    bilinear,
    clamped_image,
    gated,
    gelu,
    halves,
    row_offsets,
    sample_taps,
    token_rows,
    upper_tap,
)


@triton.jit
def interpolated(
    p_projected, p_taps, p_weights, p_index, row, column, num_rows, length, prefix, size, images, height, width,
    num_columns,
):  # fmt: skip
    """R(P) for a tile of flat rows and columns, [rows, columns] in float32."""
    tile, patch, _, is_patch = token_rows(row, num_rows, length, prefix)
    p_y = p_taps + tile * 2 * size + patch // size
    p_x = p_taps + (tile * 2 + 1) * size + patch % size
    top = tl.load(p_y, mask=is_patch, other=0)
    left = tl.load(p_x, mask=is_patch, other=0)
    weight_y = tl.load(p_weights + tile * 2 * size + patch // size, mask=is_patch, other=0.0)
    weight_x = tl.load(p_weights + (tile * 2 + 1) * size + patch % size, mask=is_patch, other=0.0)
    image = clamped_image(p_index, tile, images, is_patch)
    upper = (image * height + top) * width * num_columns
    lower = (image * height + upper_tap(top, weight_y)) * width * num_columns
    right = upper_tap(left, weight_x) * num_columns
    left = left * num_columns
    inside = is_patch[:, None] & (column < num_columns)[None, :]
    return bilinear(
        p_projected + column[None, :], upper[:, None], lower[:, None], left[:, None], right[:, None],
        weight_y[:, None], weight_x[:, None], inside,
    )  # fmt: skip


@triton.jit
def fc1_epilogue(
    acc, row, i_col, p_bias, p_hidden, p_activated, p_projected, p_taps, p_weights, p_index,
    num_rows, length, prefix, size, images, height, width, hidden_width,
    SAVE_HIDDEN: tl.constexpr, WRITE_ACTIVATED: tl.constexpr, PROJECTED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if SPLIT > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        fc1_epilogue(
            left, row, i_col, p_bias, p_hidden, p_activated, p_projected, p_taps, p_weights, p_index,
            num_rows, length, prefix, size, images, height, width, hidden_width,
            SAVE_HIDDEN, WRITE_ACTIVATED, PROJECTED, SPLIT // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        fc1_epilogue(
            right, row, i_col + BLOCK_N // 2, p_bias, p_hidden, p_activated, p_projected, p_taps, p_weights, p_index,
            num_rows, length, prefix, size, images, height, width, hidden_width,
            SAVE_HIDDEN, WRITE_ACTIVATED, PROJECTED, SPLIT // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        column = i_col + tl.arange(0, BLOCK_N)
        in_columns = column < hidden_width
        _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
        if PROJECTED:
            z = acc + interpolated(
                p_projected, p_taps, p_weights, p_index, row, column, num_rows, length, prefix, size, images, height,
                width, hidden_width,
            )  # fmt: skip
        else:
            z = acc + tl.load(p_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if SAVE_HIDDEN:
            p_rows = p_hidden + (sample * hidden_width)[:, None] + column[None, :]
            tl.store(p_rows, z.to(p_hidden.dtype.element_ty), mask=is_patch[:, None] & in_columns[None, :])
        if WRITE_ACTIVATED:
            p_rows = p_activated + (row.to(tl.int64) * hidden_width)[:, None] + column[None, :]
            inside = (row < num_rows)[:, None] & in_columns[None, :]
            tl.store(p_rows, gelu(z).to(p_activated.dtype.element_ty), mask=inside)


@triton.jit
def fc1_fwd_kernel(
    x, x_tail, s, s_tail, w_x, w_s, p_bias, p_hidden, p_activated, p_projected, p_taps, p_weights, p_index,
    num_rows, length, prefix, size, images, height, width, token_width, feature_width, hidden_width,
    stride_t, stride_l, stride_w,
    SAVE_HIDDEN: tl.constexpr, WRITE_ACTIVATED: tl.constexpr, PROJECTED: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Z and A = gelu(Z). Columns go fastest: the programs that run together share rows, and W1 stays in L2."""
    blocks_n = tl.cdiv(hidden_width, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M + TAIL_M) * blocks_n, tl.num_programs(0)):
        i_row = i_tile // blocks_n * (BLOCK_M + TAIL_M)
        i_col = i_tile % blocks_n * BLOCK_N
        row = i_row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TAIL_M:
            tail = tl.zeros((TAIL_M, BLOCK_N), dtype=tl.float32)
            acc, tail = add_products(acc, tail, x, x_tail, w_x, i_row, i_col, token_width, PRECISION, BLOCK_M, BLOCK_K)
            if not PROJECTED:
                acc, tail = add_products(
                    acc, tail, s, s_tail, w_s, i_row, i_col, feature_width, PRECISION, BLOCK_M, BLOCK_K
                )
            fc1_epilogue(
                tail, i_row + BLOCK_M + tl.arange(0, TAIL_M), i_col, p_bias, p_hidden, p_activated, p_projected,
                p_taps, p_weights, p_index, num_rows, length, prefix, size, images, height, width, hidden_width,
                SAVE_HIDDEN, WRITE_ACTIVATED, PROJECTED, SPLIT, TAIL_M, BLOCK_N,
            )  # fmt: skip
        else:
            acc = add_product(
                acc, x, w_x, row, i_row, i_col, num_rows, hidden_width, token_width, length, stride_t, stride_l,
                stride_w, True, TMA, SPECIALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if not PROJECTED:
                acc = add_product(
                    acc, s, w_s, row, i_row, i_col, num_rows, hidden_width, feature_width, length,
                    length * feature_width, feature_width, stride_w, True, TMA, SPECIALIZE, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        fc1_epilogue(
            acc, row, i_col, p_bias, p_hidden, p_activated, p_projected, p_taps, p_weights, p_index,
            num_rows, length, prefix, size, images, height, width, hidden_width,
            SAVE_HIDDEN, WRITE_ACTIVATED, PROJECTED, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def fc2_epilogue(
    acc, row, i_col, alpha, p_bias, p_tokens, p_out, p_branch, num_rows, length, prefix, token_width,
    stride_t, stride_l,
    PRODUCT: tl.constexpr, WRITE_OUT: tl.constexpr, IN_PLACE: tl.constexpr, SAVE_BRANCH: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """M, and the fused tokens; IN_PLACE writes the patch tokens over what they were read from, and nothing else."""
    if SPLIT > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        fc2_epilogue(
            left, row, i_col, alpha, p_bias, p_tokens, p_out, p_branch, num_rows, length, prefix, token_width,
            stride_t, stride_l, PRODUCT, WRITE_OUT, IN_PLACE, SAVE_BRANCH, SPLIT // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        fc2_epilogue(
            right, row, i_col + BLOCK_N // 2, alpha, p_bias, p_tokens, p_out, p_branch, num_rows, length, prefix,
            token_width, stride_t, stride_l, PRODUCT, WRITE_OUT, IN_PLACE, SAVE_BRANCH, SPLIT // 2, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
    else:
        column = i_col + tl.arange(0, BLOCK_N)
        in_columns = column < token_width
        _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
        branch = acc + tl.load(p_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if SAVE_BRANCH:
            p_rows = p_branch + (sample * token_width)[:, None] + column[None, :]
            tl.store(p_rows, branch.to(p_branch.dtype.element_ty), mask=is_patch[:, None] & in_columns[None, :])
        if WRITE_OUT:
            inside = (row < num_rows)[:, None] & in_columns[None, :]
            p_x = p_tokens + row_offsets(row, length, stride_t, stride_l)[:, None] + column[None, :]
            x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
            fused = tl.where(is_patch[:, None], x + gated(branch, alpha, PRODUCT), x)
            if IN_PLACE:
                tl.store(p_x, fused.to(p_tokens.dtype.element_ty), mask=is_patch[:, None] & in_columns[None, :])
            else:
                p_rows = p_out + (row.to(tl.int64) * token_width)[:, None] + column[None, :]
                tl.store(p_rows, fused.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def fc2_fwd_kernel(
    a, a_tail, w, p_bias, p_alpha, p_tokens, p_out, p_branch,
    num_rows, length, prefix, hidden_width, token_width, stride_t, stride_l, stride_w,
    PRODUCT: tl.constexpr, WRITE_OUT: tl.constexpr, IN_PLACE: tl.constexpr, SAVE_BRANCH: tl.constexpr,
    IF_CLOSED: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M, and the fused tokens. IF_CLOSED computes only under a gate of zero, which no host has to look at."""
    alpha = tl.load(p_alpha).to(tl.float32)
    blocks_n = tl.cdiv(token_width, BLOCK_N)
    num_tiles = tl.cdiv(num_rows, BLOCK_M + TAIL_M) * blocks_n
    if IF_CLOSED:
        num_tiles = tl.where(alpha == 0.0, num_tiles, 0)
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_row = i_tile // blocks_n * (BLOCK_M + TAIL_M)
        i_col = i_tile % blocks_n * BLOCK_N
        row = i_row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TAIL_M:
            tail = tl.zeros((TAIL_M, BLOCK_N), dtype=tl.float32)
            acc, tail = add_products(acc, tail, a, a_tail, w, i_row, i_col, hidden_width, PRECISION, BLOCK_M, BLOCK_K)
            fc2_epilogue(
                tail, i_row + BLOCK_M + tl.arange(0, TAIL_M), i_col, alpha, p_bias, p_tokens, p_out, p_branch,
                num_rows, length, prefix, token_width, stride_t, stride_l, PRODUCT, WRITE_OUT, IN_PLACE, SAVE_BRANCH,
                SPLIT, TAIL_M, BLOCK_N,
            )  # fmt: skip
        else:
            acc = add_product(
                acc, a, w, row, i_row, i_col, num_rows, token_width, hidden_width, length, length * hidden_width,
                hidden_width, stride_w, True, TMA, SPECIALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        fc2_epilogue(
            acc, row, i_col, alpha, p_bias, p_tokens, p_out, p_branch, num_rows, length, prefix, token_width,
            stride_t, stride_l, PRODUCT, WRITE_OUT, IN_PLACE, SAVE_BRANCH, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def single_pass_fwd_kernel(
    p_tokens, p_features, p_boxes, p_index, p_w1, p_b1, p_w2, p_b2, p_alpha, p_out, p_hidden, p_branch,
    num_rows, length, prefix, size, images, height, width, token_width, feature_width, hidden_width,
    stride_t, stride_l, stride_b, stride_h, stride_w, stride_c, stride_w1, stride_w2,
    PRODUCT: tl.constexpr, IN_PLACE: tl.constexpr, SAVE_HIDDEN: tl.constexpr, SAVE_BRANCH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of flat rows from the map and the tokens to the result; a row block samples each channel once.

    BLOCK_H holds the whole hidden width, so that Z is one accumulator and A one operand of the second product. Rows
    of tokens are read by their own program alone, and went into Z whole before any is written: IN_PLACE is safe.
    """
    i_row = tl.program_id(0) * BLOCK_M
    row = i_row + tl.arange(0, BLOCK_M)
    hidden = tl.arange(0, BLOCK_H)
    in_hidden = hidden < hidden_width
    tile, patch, sample, is_patch = token_rows(row, num_rows, length, prefix)
    # Before the accumulator is there: a division in double precision is a call, around which registers are kept.
    top, weight_y, left, weight_x = sample_taps(p_boxes, tile, patch, is_patch, size, height, width)
    image = clamped_image(p_index, tile, images, is_patch) * stride_b
    lower = (image + upper_tap(top, weight_y).to(tl.int64) * stride_h)[:, None]
    upper = (image + top.to(tl.int64) * stride_h)[:, None]
    right = (upper_tap(left, weight_x).to(tl.int64) * stride_w)[:, None]
    left = (left.to(tl.int64) * stride_w)[:, None]
    # Begun with the bias, which beside a full accumulator would not fit into registers.
    bias = tl.load(p_b1 + hidden, mask=in_hidden, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32) + bias[None, :]
    acc = add_product(
        acc, p_tokens, p_w1, row, i_row, 0, num_rows, hidden_width, token_width, length, stride_t, stride_l, stride_w1,
        True, False, False, PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    p_w1_s = p_w1 + token_width + hidden.to(tl.int64)[None, :] * stride_w1
    for k in tl.range(0, feature_width, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        in_channels = channel < feature_width
        inside = is_patch[:, None] & in_channels[None, :]
        p_channels = p_features + channel.to(tl.int64)[None, :] * stride_c
        s = bilinear(p_channels, upper, lower, left, right, weight_y[:, None], weight_x[:, None], inside)
        b_w1 = tl.load(p_w1_s + channel[:, None], mask=in_channels[:, None] & in_hidden[None, :], other=0.0)
        acc = tl.dot(s.to(b_w1.dtype), b_w1, acc, input_precision=PRECISION)
    if SAVE_HIDDEN:
        p_rows = p_hidden + (sample * hidden_width)[:, None] + hidden[None, :]
        tl.store(p_rows, acc.to(p_hidden.dtype.element_ty), mask=is_patch[:, None] & in_hidden[None, :])
    activated = gelu(acc).to(p_w2.dtype.element_ty)
    alpha = tl.load(p_alpha).to(tl.float32)
    for i_col in tl.range(0, token_width, BLOCK_N):
        column = i_col + tl.arange(0, BLOCK_N)
        p_columns = p_w2 + column.to(tl.int64)[None, :] * stride_w2 + hidden[:, None]
        b_w2 = tl.load(p_columns, mask=in_hidden[:, None] & (column < token_width)[None, :], other=0.0)
        fc2_epilogue(
            tl.dot(activated, b_w2, input_precision=PRECISION), row, i_col, alpha, p_b2, p_tokens, p_out, p_branch,
            num_rows, length, prefix, token_width, stride_t, stride_l, PRODUCT, True, IN_PLACE, SAVE_BRANCH, 1,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
