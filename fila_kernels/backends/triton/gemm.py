"""The five matrix products of the operation; bias, activation, gate, residual and derivatives are in their epilogues.

    fc1               Z = X W1x' + S W1s' + b1,  A = gelu(Z)    two row operands, no concatenated copy of them
    fc1, projected    Z = X W1x' + R(P),  P = F W1s' + b1       resizing commutes with the pointwise product
    fc2               M = A W2' + b2,  out = X + gate(M)
    hidden_gradient   dZ = (dM W2) gelu'(Z)
    input_gradient    [dX ; dS] = dZ W1                         one product over the columns of both
    weight_gradient   dW2 = dM' A,  dW1x = dZ' X,  dW1s = dZ' S

    X, out [T, L, D];  S [T, L, C];  Z, M [T * N, H or D];  A, dZ [T, L, H];  W1 = [W1x ; W1s] [H, D + C];  W2 [D, H]

T tiles, P prefix tokens, N patch tokens, L = P + N. The first four multiply rows by a weight and are one kernel,
`gemm_kernel`, which gets its epilogue (`epilogue.py`) as an argument. They run over all T * L rows, since the patch
tokens alone are no matrix inside tokens [T, L, D]. A weight's gradient sums over rows, prefix tokens left out, and has
a kernel of its own, `weight_grad_kernel`.

Operands come through tensor descriptors, which the copy engine (TMA) reads, or through pointers with masks. A tile has
BLOCK_M rows, a power of two, and TAIL_M more in a second accumulator.

Launchers stand beneath the kernels. Each takes the call and tensors to read and to fill; a tensor that is None is not
computed. Tokens and their gradient may have any outer strides, all others are dense. Under autocast both may have a
dtype of their own: epilogues add the residual in it, and fc1 reads a copy of the tokens in the products' dtype, since
descriptors do not convert.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fila_kernels.backends.triton import configs, epilogue, host
from fila_kernels.backends.triton.configs import GemmConfig, Problem
from fila_kernels.backends.triton.host import blocks, dense_rows
from fila_kernels.backends.triton.pointwise import factored, partial_sums, reduce_parts
from fila_kernels.backends.triton.primitives import row_offsets
from fila_kernels.call import Call


class Term(NamedTuple):
    """One product of a sum of products: its depth, the strides of its rows [T, L, depth], its weight's stride."""

    depth: int
    stride_t: int
    stride_l: int
    stride_b: int


@triton.jit
def add_product(
    acc, a, b, term, row, i_row, i_col, extent,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc += a b' for b [num_columns, depth] if TRANSPOSED, else a b for b [depth, num_columns]; one tile."""
    if TMA:
        for k in tl.range(0, term.depth, BLOCK_K, warp_specialize=SPECIALIZE):
            b_a = a.load([i_row, k])
            if TRANSPOSED:
                b_b = b.load([i_col, k]).T
            else:
                b_b = b.load([k, i_col])
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    else:
        column = i_col + tl.arange(0, acc.shape[1])
        p_a = a + row_offsets(row, extent.length, term.stride_t, term.stride_l)[:, None]
        in_rows = (row < extent.num_rows)[:, None]
        in_columns = column < extent.num_columns
        for k in tl.range(0, term.depth, BLOCK_K):
            step = k + tl.arange(0, BLOCK_K)
            in_depth = step < term.depth
            b_a = tl.load(p_a + step[None, :], mask=in_rows & in_depth[None, :], other=0.0).to(b.dtype.element_ty)
            if TRANSPOSED:
                p_b = b + column.to(tl.int64)[None, :] * term.stride_b + step[:, None]
            else:
                p_b = b + step.to(tl.int64)[:, None] * term.stride_b + column[None, :]
            b_b = tl.load(p_b, mask=in_depth[:, None] & in_columns[None, :], other=0.0)
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_products(
    acc, acc_tail, a, a_tail, b, term, i_row, i_col, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc += a b' for BLOCK_M rows and acc_tail += a b' for those after them, by descriptors; b is read once."""
    for k in tl.range(0, term.depth, BLOCK_K):
        b_b = b.load([i_col, k]).T
        acc = tl.dot(a.load([i_row, k]), b_b, acc, input_precision=PRECISION)
        acc_tail = tl.dot(a_tail.load([i_row + BLOCK_M, k]), b_b, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def finish(
    acc, row, i_m, i_col, alpha, extent, args, EPILOGUE: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Hands a tile to its epilogue in SPLIT groups of columns, which holds fewer values in registers at a time."""
    if SPLIT > 1:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, half).permute(0, 2, 1).split()
        summed = finish(left, row, i_m, i_col, alpha, extent, args, EPILOGUE, SPLIT // 2)
        summed += finish(right, row, i_m, i_col + half, alpha, extent, args, EPILOGUE, SPLIT // 2)
        return summed
    else:
        return EPILOGUE(acc, row, i_m, i_col, alpha, extent, args)


def _name(specialization: Any) -> str:
    """The kernel's name in a profiler: `fc1_fwd_kernel` and so on."""
    return f"{specialization.constants['EPILOGUE'].__name__}_kernel"


@triton.jit(repr=_name)
def gemm_kernel(
    a, a_tail, b, term, a_2, a_2_tail, b_2, term_2, p_alpha, p_tile_sums, extent, args,
    EPILOGUE: tl.constexpr, TRANSPOSED: tl.constexpr, IF_CLOSED: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """EPILOGUE(a b + a_2 b_2), tile by tile; b and b_2 as they are or TRANSPOSED.

    Columns go fastest: programs that run together share rows, and the weight stays in the L2 cache. IF_CLOSED computes
    only where alpha is zero, which the host need not look at.
    """
    alpha = tl.load(p_alpha).to(tl.float32)
    blocks_n = tl.cdiv(extent.num_columns, BLOCK_N)
    num_tiles = tl.cdiv(extent.num_rows, BLOCK_M + TAIL_M) * blocks_n
    if IF_CLOSED:
        num_tiles = tl.where(alpha == 0.0, num_tiles, 0)
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_m = i_tile // blocks_n
        i_row = i_m * (BLOCK_M + TAIL_M)
        i_col = i_tile % blocks_n * BLOCK_N
        row = i_row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TAIL_M:
            tail = tl.zeros((TAIL_M, BLOCK_N), dtype=tl.float32)
            acc, tail = add_products(acc, tail, a, a_tail, b, term, i_row, i_col, PRECISION, BLOCK_M, BLOCK_K)
            if a_2 is not None:
                acc, tail = add_products(
                    acc, tail, a_2, a_2_tail, b_2, term_2, i_row, i_col, PRECISION, BLOCK_M, BLOCK_K
                )
            tail_row = i_row + BLOCK_M + tl.arange(0, TAIL_M)
            finish(tail, tail_row, i_m, i_col, alpha, extent, args, EPILOGUE, SPLIT)
        else:
            acc = add_product(
                acc, a, b, term, row, i_row, i_col, extent, TRANSPOSED, TMA, SPECIALIZE, PRECISION, BLOCK_K
            )
            if a_2 is not None:
                acc = add_product(
                    acc, a_2, b_2, term_2, row, i_row, i_col, extent, TRANSPOSED, TMA, SPECIALIZE, PRECISION, BLOCK_K
                )
        summed = finish(acc, row, i_m, i_col, alpha, extent, args, EPILOGUE, SPLIT)
        if p_tile_sums is not None:
            tl.store(p_tile_sums + i_tile, tl.sum(summed, 0))


@triton.jit
def weight_grad_kernel(
    a, b, p_alpha, p_out, num_tiles, patches, extent, strides_a, strides_b, stride_out, num_splits,
    FACTOR: tl.constexpr, EPILOGUE: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a' b [rows, columns], summed over the patch tokens of all tiles; program (tile of the result, part of the sum).

    Operands are [T, N, width], whose bases leave the prefix tokens out, so that nothing has to be zero there. With one
    part (`FACTOR` is not None) the result itself is written, else float32 sums [num_splits, rows, columns].
    """
    rows, columns = extent.num_rows, extent.num_columns
    blocks_n = tl.cdiv(columns, BLOCK_N)
    i_split = tl.program_id(1)
    i_m = tl.program_id(0) // blocks_n
    i_col = tl.program_id(0) % blocks_n * BLOCK_N
    steps_tile = tl.cdiv(patches, BLOCK_K)
    steps = num_tiles * steps_tile
    each = tl.cdiv(steps, num_splits)
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
            offset_a = tl.cast(tile, tl.int64) * strides_a[0] + patch.to(tl.int64) * strides_a[1]
            offset_b = tl.cast(tile, tl.int64) * strides_b[0] + patch.to(tl.int64) * strides_b[1]
            b_a = tl.load(a + offset_a[:, None] + m[None, :], mask=in_tile & (m < rows)[None, :], other=0.0)
            b_b = tl.load(b + offset_b[:, None] + n[None, :], mask=in_tile & (n < columns)[None, :], other=0.0)
        acc = tl.dot(b_a.T, b_b, acc, input_precision=PRECISION)
    alpha = tl.load(p_alpha).to(tl.float32)
    if FACTOR is not None:
        acc = factored(acc, alpha, FACTOR)
    p_part = p_out + i_split.to(tl.int64) * rows * columns
    finish(acc, m, i_m, i_col, alpha, extent, (p_part, stride_out), EPILOGUE, SPLIT)


@lru_cache(maxsize=1024)
def _constants(config: GemmConfig, precision: str) -> dict[str, Any]:
    """A product kernel's constants. One dictionary for all launches of a config: they unpack it."""
    return {
        "TMA": config.tma, "SPECIALIZE": config.warp_specialize, "PRECISION": precision,
        "SPLIT": config.split_epilogue, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


class Product:
    """A launch of `gemm_kernel`; its config is chosen first, since the sizes of partial sums depend on it."""

    def __init__(self, call: Call, kernel: str, pairs: list[tuple[Tensor, Tensor]], transposed: bool) -> None:
        """Chooses the config for a sum of products.

        Each pair is rows [T, L, depth] and a weight, [n, depth] if transposed, else [depth, n], both of any strides.
        """
        pairs = [(dense_rows(rows), dense_rows(weight)) for rows, weight in pairs]
        first, weight = pairs[0]
        tiles, length, _ = first.shape
        columns = weight.shape[0 if transposed else 1]
        self.call, self.pairs, self.transposed = call, pairs, transposed
        self.matrices: list[Tensor | None] = []
        depth, fits = 0, True
        for rows, weight in pairs:
            matrix = host.flat_rows(rows)
            fits = fits and matrix is not None and host.aligned(matrix, weight)
            depth += rows.shape[2]
            self.matrices.append(matrix)
        self.extent = epilogue.Extent(tiles * length, columns, length, call.shape.prefix)
        self.problem = Problem(kernel, tiles * length, columns, depth, first.dtype, fits)
        self.limits = configs.device_of(first.device)
        config = host.choose(self.problem, first.device, call.plan.configs)
        assert isinstance(config, GemmConfig)
        self.config = config

    @property
    def row_blocks(self) -> int:
        return blocks(self.problem.m, self.config.rows)

    def launch(self, with_epilogue: Any, args: tuple, tile_sums: Tensor | None = None, if_closed: bool = False) -> None:
        """One program per tile or, with a persistent config, as many as run at a time."""
        config = self.config
        programs = configs.programs(config, self.problem, self.limits)
        block_a, block_tail = (config.block_m, config.block_k), (config.tail_m, config.block_k)
        block_b = (config.block_n, config.block_k) if self.transposed else (config.block_k, config.block_n)
        operands: list[Any] = []
        for (rows, weight), matrix in zip(self.pairs, self.matrices, strict=True):
            if config.tma:
                assert matrix is not None
                tail = host.descriptor(matrix, block_tail) if config.tail_m else None
                operands += [host.descriptor(matrix, block_a), tail, host.descriptor(weight, block_b)]
                operands.append(Term(rows.shape[2], 0, 0, 0))  # a descriptor knows its strides
            else:
                term = Term(rows.shape[2], rows.stride(0), rows.stride(1), weight.stride(0))
                operands += [rows, None, weight, term]
        operands += [None] * (8 - len(operands))
        host.run(
            gemm_kernel, (programs,), *operands, self.call.alpha, tile_sums, self.extent, args,
            EPILOGUE=with_epilogue, TRANSPOSED=self.transposed, IF_CLOSED=if_closed, TAIL_M=config.tail_m,
            **_constants(config, host.precision(self.problem.dtype)),
        )  # fmt: skip


def fc1(call: Call, s: Tensor, hidden: Tensor | None, activated: Tensor | None) -> None:
    """Z = [X ; S] W1' + b1 into `hidden` [T * N, H] and A = gelu(Z) into `activated` [T, L, H], from S [T, L, C]."""
    weight = dense_rows(call.fc1_weight)
    width = call.shape.token_width
    product = Product(call, "fc1", [(call.row_operand(), weight[:, :width]), (s, weight[:, width:])], True)
    product.launch(epilogue.fc1_fwd, epilogue.Fc1(hidden, activated, call.fc1_bias.contiguous()))


def fc1_projected(
    call: Call, projected: Tensor, taps: Tensor, weights: Tensor, hidden: Tensor | None, activated: Tensor | None
) -> None:
    """The same from P = F W1s' + b1 [B * h * w, H] and the samples' taps and weights [T, 2, G]."""
    shape = call.shape
    weight = dense_rows(call.fc1_weight)[:, : shape.token_width]
    product = Product(call, "fc1_projected", [(call.row_operand(), weight)], True)
    args = epilogue.Fc1Projected(
        hidden, activated, projected, taps, weights, call.image_index.contiguous(), shape.grid, *shape.maps
    )
    product.launch(epilogue.fc1_projected_fwd, args)


def fc2(call: Call, activated: Tensor, out: Tensor | None, branch: Tensor | None, if_closed: bool = False) -> None:
    """M = A W2' + b2 into `branch` [T * N, D] and X + gate(M) into `out` [T, L, D], from A [T, L, H].

    With `if_closed` nothing is computed unless alpha is zero.
    """
    tokens = call.tokens
    args = epilogue.Fc2(
        out, branch, call.fc2_bias.contiguous(), tokens, tokens.stride(0), tokens.stride(1),
        epilogue.IS_PRODUCT[call.gate],
    )  # fmt: skip
    product = Product(call, "fc2", [(activated, call.fc2_weight)], True)
    product.launch(epilogue.fc2_fwd, args, if_closed=if_closed)


def hidden_gradient(
    call: Call, branch_grad: Tensor, hidden: Tensor, hidden_grad: Tensor | None, activated: Tensor | None,
    sum_bias: bool, sum_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dZ = (dM W2) gelu'(Z) into `hidden_grad` and A into `activated` [T, L, H], from dM [T, L, D] and Z [T * N, H].

    Returns partial sums, where wanted: of fc1's bias [blocks, H], and of alpha for the scale gate.
    """
    product = Product(call, "hidden_gradient", [(branch_grad, call.fc2_weight)], False)
    width = call.shape.hidden_width
    bias_sums = partial_sums(hidden, product.row_blocks, width) if sum_bias else None
    num_tiles = product.row_blocks * blocks(width, product.config.block_n)
    alpha_sums = partial_sums(hidden, num_tiles) if sum_alpha else None
    args = epilogue.HiddenGradient(hidden_grad, activated, bias_sums, hidden, epilogue.IS_PRODUCT[call.gate])
    product.launch(epilogue.hidden_grad, args, alpha_sums)
    return bias_sums, alpha_sums


def input_gradient(
    call: Call, hidden_grad: Tensor, grad: Tensor, tokens_grad: Tensor | None, sampled_grad: Tensor | None
) -> None:
    """dX = dY + dZ W1x into `tokens_grad` [T, L, D] and dS = dZ W1s into `sampled_grad` [T, L, C], from dZ [T, L, H].

    Without `tokens_grad` the rows may be a map's: dP [1, B * h * w, H] gives dF [B, h, w, C].
    """
    weight, width = dense_rows(call.fc1_weight), call.shape.token_width
    if tokens_grad is None:
        weight, width = weight[:, width:], 0
    elif sampled_grad is None:
        weight = weight[:, :width]
    product = Product(call, "input_gradient", [(hidden_grad, weight)], False)
    args = epilogue.InputGradient(tokens_grad, sampled_grad, grad, grad.stride(0), grad.stride(1), width)
    product.launch(epilogue.input_grad, args)


def weight_gradient(call: Call, a: Tensor, b: Tensor, out: Tensor, factor: str = "parameter") -> None:
    """a' b, summed over T and N, into the rows of `out` [M, K], for a [T, N, M] and b [T, N, K] of any strides.

    `factor` names what the sum is multiplied by, see `pointwise.factored`. The depth is cut into parts where one sum
    per tile would leave multiprocessors idle; the parts are added in their order.
    """
    # A map with channels first is such a b: the view of one image's cells has its unit stride over them.
    a, b = dense_rows(a), dense_rows(b)
    tiles, patches, rows = a.shape
    columns = b.shape[2]
    problem = Problem("weight_gradient", rows, columns, tiles * patches, a.dtype, host.aligned(a, b))
    config = host.choose(problem, a.device, call.plan.configs)
    assert isinstance(config, GemmConfig)
    splits = config.split_k
    target = out if splits == 1 else partial_sums(a, splits, rows, columns)
    host.run(
        weight_grad_kernel, (config.tiles(problem), splits),
        host.descriptor(a, (1, config.block_k, config.block_m)) if config.tma else a,
        host.descriptor(b, (1, config.block_k, config.block_n)) if config.tma else b,
        call.alpha, target, tiles, patches, epilogue.Extent(rows, columns, 1, 0), a.stride()[:2], b.stride()[:2],
        target.stride(-2), splits, FACTOR=factor if splits == 1 else None, EPILOGUE=epilogue.weight_grad,
        **_constants(config, host.precision(a.dtype)),
    )  # fmt: skip
    if splits > 1:
        reduce_parts(call, target, out, factor)
