"""Element-wise kernels of the backward pass: the gate's derivative, GELU again, and sums in a fixed order.

    dM = alpha (1 - tanh^2(alpha M)) dY    product gate
    dM = dY                                scale gate; its factor tanh(alpha) is applied to the results of dM
    A = gelu(Z)

Rows count all T * L tokens; those of prefix tokens are zero in dM. Sums over rows are partial sums with one
writer each, which `reduce_kernel` adds in a fixed order: no atomics, and every run gives the same bits. A gate of zero
stops even 0 * NaN: every gradient of the branch is then exactly zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fila_kernels.backends.triton import host
from fila_kernels.backends.triton.configs import GatherConfig, Problem, power_of_two
from fila_kernels.backends.triton.host import blocks
from fila_kernels.backends.triton.primitives import (
    at,
    finite_or_zero,
    gelu,
    precise_tanh,
    row_offsets,
    tanh_slope,
    token_rows,
)
from fila_kernels.call import Call


@triton.jit
def gate_bwd_kernel(
    p_grad, p_branch, p_alpha, p_bias, p_branch_grad, p_bias_sums, p_alpha_sums,
    num_rows, length, prefix, token_width, stride_t, stride_l,
    PRODUCT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    if PRODUCT or p_alpha_sums is not None:
        # Under the scale gate M is computed, and read, only if the gate is closed.
        seen = inside if PRODUCT else tl.where(inside, alpha, 1.0) == 0.0
        branch = tl.load(at(p_branch, sample, token_width, column), mask=seen, other=0.0).to(tl.float32)
        if alpha == 0.0:
            branch = finite_or_zero(branch)
    if PRODUCT:
        slope = tanh_slope(alpha * branch, p_branch.dtype.element_ty == tl.float32) * grad
        # An infinite entry has saturated the gate; a NaN stays one.
        felt = tl.where(tl.abs(branch) == float("inf"), 0.0, branch)
        branch_grad = alpha * slope
        if alpha == 0.0:
            branch_grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        slope = grad
        if p_alpha_sums is not None:
            # sum dY M = sum (dY W2) A + sum dY b2; the first part is added by the epilogue `hidden_grad`.
            bias = tl.load(p_bias + column, mask=in_columns, other=0.0).to(tl.float32)
            felt = tl.where(alpha == 0.0, branch, bias[None, :])
        branch_grad = grad
    if p_alpha_sums is not None:
        # Beyond the patch tokens dY was read as zero.
        tl.store(p_alpha_sums + tl.program_id(0), tl.sum(tl.sum(slope * felt, 1), 0))
    if p_bias_sums is not None:
        tl.store(p_bias_sums + i_m * token_width + column, tl.sum(branch_grad, 0), mask=in_columns)
    if p_branch_grad is not None:
        written = (row < num_rows)[:, None] & in_columns[None, :]
        p_rows = at(p_branch_grad, row, token_width, column)
        tl.store(p_rows, branch_grad.to(p_branch_grad.dtype.element_ty), mask=written)


@triton.jit
def gelu_fwd_kernel(
    p_hidden, p_activated, num_rows, length, prefix, hidden_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A [T, L, H] from Z [T * N, H]."""
    blocks_n = tl.cdiv(hidden_width, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < hidden_width
    _, _, sample, is_patch = token_rows(row, num_rows, length, prefix)
    inside = is_patch[:, None] & in_columns[None, :]
    z = tl.load(at(p_hidden, sample, hidden_width, column), mask=inside, other=0.0).to(tl.float32)
    activated = gelu(z, p_hidden.dtype.element_ty == tl.float32)
    written = (row < num_rows)[:, None] & in_columns[None, :]
    tl.store(at(p_activated, row, hidden_width, column), activated.to(p_activated.dtype.element_ty), mask=written)


@triton.jit
def factored(total, alpha, FACTOR: tl.constexpr):
    """Finishes a gradient: zero under a closed gate ("parameter"), times tanh(alpha) too ("scaled"), or its slope."""
    if FACTOR == "parameter":
        total = tl.where(alpha == 0.0, 0.0, total)
    elif FACTOR == "scaled":
        total = tl.where(alpha == 0.0, 0.0, total * precise_tanh(alpha))
    elif FACTOR == "slope":
        total = total * tanh_slope(alpha, True)
    return total


@triton.jit
def reduce_kernel(
    p_parts, p_alpha, p_out, num_parts, rows, columns, stride_out,
    FACTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds up float32 parts [num_parts, rows, columns] in their order, into rows of `out`."""
    elements = rows * columns
    element = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = element < elements
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        p_block = p_parts + part.to(tl.int64)[:, None] * elements + element[None, :]
        total += tl.sum(tl.load(p_block, mask=(part < num_parts)[:, None] & inside[None, :], other=0.0), 0)
    total = factored(total, tl.load(p_alpha).to(tl.float32), FACTOR)
    p_elements = p_out + (element // columns).to(tl.int64) * stride_out + element % columns
    tl.store(p_elements, total.to(p_out.dtype.element_ty), mask=inside)


def partial_sums(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def gate_gradient(
    call: Call, grad: Tensor, branch: Tensor | None, branch_grad: Tensor | None, sum_bias: bool, sum_alpha: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dM into `branch_grad` [T, L, D], from dY of any outer strides and M [T * N, D].

    Returns partial sums, where wanted: of fc2's bias [blocks, D], and of alpha.
    """
    shape = call.shape
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    problem = Problem("gate_backward", rows, shape.token_width, 0, call.dtype)
    config = host.choose(problem, grad.device, call.plan.configs)
    assert isinstance(config, GatherConfig)
    blocks_m = blocks(rows, config.block_rows)
    programs = blocks_m * blocks(shape.token_width, config.block_columns)
    bias_sums = partial_sums(grad, blocks_m, shape.token_width) if sum_bias else None
    alpha_sums = partial_sums(grad, programs) if sum_alpha else None
    host.run(
        gate_bwd_kernel, (programs,),
        grad, branch, call.alpha, call.fc2_bias.contiguous(), branch_grad, bias_sums, alpha_sums,
        rows, length, shape.prefix, shape.token_width, grad.stride(0), grad.stride(1),
        PRODUCT=call.gate == "product", BLOCK_M=config.block_rows, BLOCK_N=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return bias_sums, alpha_sums


def activate(call: Call, hidden: Tensor, activated: Tensor) -> None:
    """A = gelu(Z) into `activated` [T, L, H], from Z [T * N, H]."""
    shape = call.shape
    length = shape.prefix + shape.patches
    rows = shape.tiles * length
    problem = Problem("gate_backward", rows, shape.hidden_width, 0, hidden.dtype)
    config = host.choose(problem, hidden.device, call.plan.configs)
    assert isinstance(config, GatherConfig)
    host.run(
        gelu_fwd_kernel,
        (blocks(rows, config.block_rows) * blocks(shape.hidden_width, config.block_columns),),
        hidden, activated, rows, length, shape.prefix, shape.hidden_width,
        BLOCK_M=config.block_rows, BLOCK_N=config.block_columns,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def reduce_parts(call: Call, parts: Tensor, out: Tensor, factor: str) -> None:
    """Float32 parts [P, rows, columns] or [P, columns], added up in their order, into the rows of `out`."""
    rows, columns = (1, parts.shape[-1]) if parts.dim() == 2 else parts.shape[1:]
    block_parts = min(32 if rows * columns > 1 else 2048, power_of_two(parts.shape[0]))
    block_elements = min(2048 // block_parts, power_of_two(rows * columns))
    host.run(
        reduce_kernel, (blocks(rows * columns, block_elements),),
        parts, call.alpha, out, parts.shape[0], rows, columns, out.stride(0),
        FACTOR=factor, BLOCK_P=block_parts, BLOCK_E=block_elements, num_warps=4, num_stages=1,
    )  # fmt: skip
