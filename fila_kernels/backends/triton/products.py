"""One function for each product's kernel: operands and results in, a config if the caller has one (the tuner does).

Flat buffers are [T, L, width] and dense; tokens and their gradient may have any outer strides.
"""

import torch
from torch import Tensor

from fila_kernels.backends.triton import backward, forward
from fila_kernels.backends.triton.configs import Config, GatherConfig, GemmConfig, Problem, power_of_two
from fila_kernels.backends.triton.host import (
    aligned,
    blocks,
    choose,
    dense_rows,
    flat_rows,
    operand,
    precision,
    product,
    run,
    tail,
)
from fila_kernels.call import Call


def fc1(
    call: Call, s: Tensor | None, projected: Tensor | None, tables: tuple[Tensor, Tensor] | None,
    hidden: Tensor | None, activated: Tensor | None, config: Config | None = None,
) -> None:  # fmt: skip
    """Z into `hidden` [T * N, H] and gelu(Z) into `activated`, from S, or from P [B * h * w, H] and its taps."""
    shape, tokens = call.shape, call.tokens
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    weight = dense_rows(call.fc1_weight)
    weight_x, weight_s = weight[:, : shape.token_width], weight[:, shape.token_width :]
    s = None if s is None else s.view(rows, shape.feature_width)
    flat = flat_rows(tokens)
    fits = flat is not None and aligned(flat, weight_x, *([] if s is None else [s, weight_s]))
    kind, depth = ("fc1", weight.shape[1]) if s is not None else ("fc1_projected", shape.token_width)
    how = product(
        Problem(kind, rows, shape.hidden_width, depth, tokens.dtype, fits), tokens.device, config, call.plan.configs
    )
    tma, block_k = how.config.tma, how.config.block_k
    block_a, block_b = (how.config.block_m, block_k), (how.config.block_n, block_k)
    taps, weights = tables or (None, None)
    run(
        forward.fc1_fwd_kernel, how.grid,
        operand(flat, block_a, tma) if tma and flat is not None else tokens, tail(flat, how.config),
        None if s is None else operand(s, block_a, tma), tail(s, how.config),
        operand(weight_x, block_b, tma), None if s is None else operand(weight_s, block_b, tma),
        call.fc1_bias.contiguous(), hidden, activated, projected, taps, weights, call.image_index.contiguous(),
        rows, length, shape.prefix, shape.grid, shape.images, shape.height, shape.width,
        shape.token_width, shape.feature_width, shape.hidden_width,
        tokens.stride(0), tokens.stride(1), weight.stride(0),
        SAVE_HIDDEN=hidden is not None, WRITE_ACTIVATED=activated is not None, PROJECTED=s is None, **how.constants,
    )  # fmt: skip


def fc2(
    call: Call, activated: Tensor, out: Tensor | None, branch: Tensor | None, if_closed: bool = False,
    config: Config | None = None,
) -> None:  # fmt: skip
    """The fused tokens into `out` [T, L, D], dense or the tokens themselves, and M into `branch` [T * N, D]."""
    shape, tokens = call.shape, call.tokens
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    weight = dense_rows(call.fc2_weight)
    a = activated.view(rows, shape.hidden_width)
    problem = Problem("fc2", rows, shape.token_width, shape.hidden_width, tokens.dtype, aligned(a, weight))
    how = product(problem, tokens.device, config, call.plan.configs)
    run(
        forward.fc2_fwd_kernel, how.grid,
        operand(a, (how.config.block_m, how.config.block_k), how.config.tma), tail(a, how.config),
        operand(weight, (how.config.block_n, how.config.block_k), how.config.tma),
        call.fc2_bias.contiguous(), call.alpha, tokens, out, branch,
        rows, length, shape.prefix, shape.hidden_width, shape.token_width,
        tokens.stride(0), tokens.stride(1), weight.stride(0),
        PRODUCT=call.gate == "product", WRITE_OUT=out is not None, IN_PLACE=out is tokens,
        SAVE_BRANCH=branch is not None, IF_CLOSED=if_closed, **how.constants,
    )  # fmt: skip


def single_pass(
    call: Call, out: Tensor, hidden: Tensor | None, branch: Tensor | None, config: Config | None = None
) -> None:
    """The fused tokens into `out` as in `fc2`, Z into `hidden` [T * N, H], M into `branch` [T * N, D]."""
    shape, tokens = call.shape, call.tokens
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    w1, w2 = dense_rows(call.fc1_weight), dense_rows(call.fc2_weight)
    problem = Problem("single_pass", rows, shape.hidden_width, shape.token_width, tokens.dtype)
    config = choose(problem, tokens.device, config, call.plan.configs)
    assert isinstance(config, GemmConfig)
    run(
        forward.single_pass_fwd_kernel, (blocks(rows, config.block_m),),
        tokens, call.features, call.boxes.contiguous(), call.image_index.contiguous(),
        w1, call.fc1_bias.contiguous(), w2, call.fc2_bias.contiguous(), call.alpha, out, hidden, branch,
        rows, length, shape.prefix, shape.grid, shape.images, shape.height, shape.width,
        shape.token_width, shape.feature_width, shape.hidden_width,
        tokens.stride(0), tokens.stride(1), *call.features.stride(), w1.stride(0), w2.stride(0),
        PRODUCT=call.gate == "product", IN_PLACE=out is tokens,
        SAVE_HIDDEN=hidden is not None, SAVE_BRANCH=branch is not None, PRECISION=precision(tokens.dtype),
        BLOCK_H=max(16, power_of_two(shape.hidden_width)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def gate_gradient(
    call: Call, grad: Tensor, branch: Tensor | None, branch_grad: Tensor | None, sum_bias: bool, sum_alpha: bool,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dM into `branch_grad`; returns the partial sums of fc2's bias [blocks, D] and of alpha, where wanted."""
    shape = call.shape
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    config = choose(
        Problem("gate_backward", rows, shape.token_width, 0, grad.dtype), grad.device, config, call.plan.configs
    )
    assert isinstance(config, GatherConfig)
    blocks_m = blocks(rows, config.block_rows)
    grid = blocks_m * blocks(shape.token_width, config.block_columns)
    bias_sums = _sums(grad, blocks_m, shape.token_width) if sum_bias else None
    alpha_sums = _sums(grad, grid) if sum_alpha else None
    run(
        backward.gate_bwd_kernel, (grid,),
        grad, branch, call.alpha, call.fc2_bias.contiguous(), branch_grad, bias_sums, alpha_sums,
        rows, length, shape.prefix, shape.token_width, grad.stride(0), grad.stride(1),
        PRODUCT=call.gate == "product", WRITE=branch_grad is not None, SUM_BIAS=sum_bias, SUM_ALPHA=sum_alpha,
        BLOCK_M=config.block_rows, BLOCK_N=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return bias_sums, alpha_sums


def activate(call: Call, hidden: Tensor, activated: Tensor) -> None:
    """A = gelu(Z)."""
    shape = call.shape
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    config = choose(
        Problem("gate_backward", rows, shape.hidden_width, 0, hidden.dtype), hidden.device, None, call.plan.configs
    )
    assert isinstance(config, GatherConfig)
    run(
        backward.gelu_kernel, (blocks(rows, config.block_rows) * blocks(shape.hidden_width, config.block_columns),),
        hidden, activated, rows, length, shape.prefix, shape.hidden_width,
        BLOCK_M=config.block_rows, BLOCK_N=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def hidden_gradient(
    call: Call, branch_grad: Tensor, hidden: Tensor, hidden_grad: Tensor | None, activated: Tensor | None,
    sum_bias: bool, sum_alpha: bool, config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dZ into `hidden_grad`, A into `activated`; returns the partial sums of fc1's bias [blocks, H] and of alpha."""
    shape = call.shape
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    weight = dense_rows(call.fc2_weight)
    a = branch_grad.view(rows, shape.token_width)
    problem = Problem("hidden_gradient", rows, shape.hidden_width, shape.token_width, a.dtype, aligned(a, weight))
    how = product(problem, a.device, config, call.plan.configs)
    blocks_m = blocks(rows, how.config.block_m)
    bias_sums = _sums(a, blocks_m, shape.hidden_width) if sum_bias else None
    alpha_sums = _sums(a, blocks_m * blocks(shape.hidden_width, how.config.block_n)) if sum_alpha else None
    run(
        backward.hidden_grad_kernel, how.grid,
        operand(a, (how.config.block_m, how.config.block_k), how.config.tma),
        operand(weight, (how.config.block_k, how.config.block_n), how.config.tma),
        call.alpha, hidden, hidden_grad, activated, bias_sums, alpha_sums,
        rows, length, shape.prefix, shape.token_width, shape.hidden_width, weight.stride(0),
        PRODUCT=call.gate == "product", WRITE=hidden_grad is not None, WRITE_ACTIVATED=activated is not None,
        SUM_BIAS=sum_bias, SUM_ALPHA=sum_alpha, **how.constants,
    )  # fmt: skip
    return bias_sums, alpha_sums


def input_gradient(
    call: Call, hidden_grad: Tensor, grad: Tensor, tokens_grad: Tensor | None, sampled_grad: Tensor | None,
    accumulate: bool = False, config: Config | None = None,
) -> None:  # fmt: skip
    """dX = dY + dZ W1x into `tokens_grad` [T, L, D] and dZ W1s into `sampled_grad`, for rows of dZ [..., H] at all.

    With `accumulate`, `sampled_grad` is added to.
    """
    shape = call.shape
    weight = dense_rows(call.fc1_weight)
    a = hidden_grad.view(-1, shape.hidden_width)
    columns = (shape.token_width if tokens_grad is not None else 0) + (
        shape.feature_width if sampled_grad is not None else 0
    )
    problem = Problem("input_gradient", a.shape[0], columns, shape.hidden_width, a.dtype, aligned(a, weight))
    how = product(problem, a.device, config, call.plan.configs)
    tiles_n = blocks(shape.token_width, how.config.block_n) * (tokens_grad is not None) + blocks(
        shape.feature_width, how.config.block_n
    ) * (sampled_grad is not None)
    tiles = blocks(a.shape[0], how.config.block_m) * tiles_n
    run(
        backward.input_grad_kernel, (min(how.grid[0], tiles) if how.config.persistent else tiles,),
        operand(a, (how.config.block_m, how.config.block_k), how.config.tma),
        operand(weight, (how.config.block_k, how.config.block_n), how.config.tma),
        call.alpha, grad, tokens_grad, sampled_grad,
        a.shape[0], shape.prefix + shape.patches, shape.prefix, shape.token_width, shape.feature_width,
        shape.hidden_width, grad.stride(0), grad.stride(1), weight.stride(0),
        TOKENS=tokens_grad is not None, FEATURES=sampled_grad is not None, ACCUMULATE=accumulate, **how.constants,
    )  # fmt: skip


def weight_gradient(
    call: Call, a: Tensor, b: Tensor, out: Tensor, factor: str = "parameter", config: Config | None = None
) -> None:
    """a' b summed over T and N into the rows of `out` [M, K], for a [T, N, M] and b [T, N, K] of any outer strides.

    `factor` is what the sum still lacks, see `backward.factored`.
    """
    tiles, patches, rows = a.shape
    columns = b.shape[2]
    problem = Problem("weight_gradient", rows, columns, tiles * patches, a.dtype, aligned(a, b))
    how = product(problem, a.device, config, call.plan.configs)
    splits, block_k = how.config.split_k, how.config.block_k
    target = out if splits == 1 else _sums(a, splits, rows, columns)
    run(
        backward.weight_grad_kernel, (*how.grid, splits),
        operand(a, (1, block_k, how.config.block_m), how.config.tma),
        operand(b, (1, block_k, how.config.block_n), how.config.tma),
        call.alpha, target, tiles, patches, rows, columns, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        target.stride(-2), splits, FACTOR=factor if splits == 1 else None, **how.constants,
    )  # fmt: skip
    if splits > 1:
        reduce_parts(call, target, out, factor)


def reduce_parts(call: Call, parts: Tensor, out: Tensor, factor: str) -> None:
    """float32 parts [P, rows, columns] or [P, columns] added up in their order into the rows of `out`."""
    rows, columns = (1, parts.shape[-1]) if parts.dim() == 2 else parts.shape[1:]
    block_parts = min(32 if rows * columns > 1 else 2048, power_of_two(parts.shape[0]))
    block_elements = min(2048 // block_parts, power_of_two(rows * columns))
    run(
        backward.reduce_kernel, (blocks(rows * columns, block_elements),),
        parts, call.alpha, out, parts.shape[0], rows, columns, out.stride(0),
        FACTOR=factor, BLOCK_P=block_parts, BLOCK_E=block_elements, num_warps=4, num_stages=1,
    )  # fmt: skip


def _sums(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
