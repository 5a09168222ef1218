"""Composes the operation from the launches that each plan and each wanted gradient takes, and allocates every buffer.

T tiles, P prefix tokens, N patch tokens, L = P + N; widths D, C, H. Scratch is [T, L, width], the rows products run
over; what is saved for the backward pass has a row for each of the T * N samples.
"""

import torch
from torch import Tensor

from fila_kernels.backends.triton import gemm, pointwise
from fila_kernels.backends.triton.crop_resize import (
    Tables,
    crop_resize,
    crop_resize_backward,
    crop_resize_bwd,
    crop_resize_fwd,
    crop_tables,
)
from fila_kernels.backends.triton.host import dense_rows, device_guard
from fila_kernels.backends.triton.single_pass import single_pass
from fila_kernels.call import Call, Needs

__all__ = ["backward", "crop_resize", "crop_resize_backward", "forward"]


def _scratch(call: Call, width: int) -> Tensor:
    return call.fc1_weight.new_empty((call.shape.tiles, call.shape.prefix + call.shape.patches, width))


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _tables(call: Call, transpose: bool) -> Tables:
    return crop_tables(call.boxes, call.image_index, call.shape.grid, call.shape.maps, transpose)


def _sampled(call: Call, tables: Tables) -> Tensor:
    """S [T, L, C]; its prefix rows are left as they are."""
    s = _scratch(call, call.shape.feature_width)
    samples = s[:, call.shape.prefix :]
    crop_resize_fwd(call.features, tables, call.image_index, call.shape.grid, samples, call.plan.configs)
    return s


def _first_layer(call: Call, tables: Tables, hidden: Tensor | None, activated: Tensor | None) -> Tensor | None:
    """Z and A by the forward plan; returns S where that samples first."""
    if call.plan.forward != "project_first":
        s = _sampled(call, tables)
        gemm.fc1(call, s, hidden, activated)
        return s
    # R(F) W' = R(F W'), and a constant passes through R unchanged. The plain product is the vendor library's.
    projected = torch.addmm(call.fc1_bias, call.features.reshape(-1, call.shape.feature_width), call.weight_s.t())
    gemm.fc1_projected(call, projected, tables.taps, tables.weights, hidden, activated)
    return None


def _gather(call: Call, rows: Tensor, tables: Tables, out: Tensor) -> None:
    """Rows [T, L, width] gathered into the cells of `out` [B, h, w, width], the transpose of sampling."""
    shape = call.shape
    samples = rows[:, shape.prefix :].unflatten(1, (shape.grid, shape.grid))
    crop_resize_bwd(samples, tables, shape.grid, out, call.alpha, call.plan.configs)


def _backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    shape, product = call.shape, call.gate == "product"
    results: list[Tensor | None] = [None] * 7
    needs_hidden_grad = needs.inner or (needs.alpha and not product)
    needs_branch = branch is None and (product or needs.alpha) and any(needs)
    activated = sampled = tables = None
    again = hidden is None and (needs_branch or needs_hidden_grad or needs.fc2_weight)
    if again or needs.features or needs.fc1_weight:
        tables = _tables(call, needs.features or (needs.fc1_weight and call.plan.weight_gradient == "project_first"))
    if again:
        assert tables is not None
        hidden = call.fc1_weight.new_empty((shape.samples, shape.hidden_width))
        activated = _scratch(call, shape.hidden_width) if needs_branch else None
        sampled = _first_layer(call, tables, hidden, activated)
    if activated is None and (needs_branch or (needs.fc2_weight and not needs_hidden_grad)):
        assert hidden is not None
        activated = _scratch(call, shape.hidden_width)
        pointwise.activate(call, hidden, activated)
    if needs_branch:
        # The scale gate reads M only where it is closed, to keep what is not finite out of alpha's gradient.
        assert activated is not None
        branch = call.fc1_weight.new_empty((shape.samples, shape.token_width))
        gemm.fc2(call, activated, None, branch, if_closed=not product)

    branch_grad = _scratch(call, shape.token_width) if needs_hidden_grad or needs.fc2_weight else None
    bias_sums, alpha_sums = pointwise.gate_gradient(call, grad, branch, branch_grad, needs.fc2_bias, needs.alpha)
    if bias_sums is not None:
        results[5] = bias_grad = _dense_like(call.fc2_bias)
        pointwise.reduce_parts(call, bias_sums, bias_grad, "parameter" if product else "scaled")
    hidden_grad = _scratch(call, shape.hidden_width) if needs.inner else None
    if needs_hidden_grad:
        assert branch_grad is not None
        assert hidden is not None
        wanted = None
        if needs.fc2_weight and activated is None:
            wanted = activated = _scratch(call, shape.hidden_width)
        bias_sums, dot_sums = gemm.hidden_gradient(
            call, branch_grad, hidden, hidden_grad, wanted, needs.fc1_bias, needs.alpha and not product
        )
        if bias_sums is not None:
            results[3] = bias_grad = _dense_like(call.fc1_bias)
            pointwise.reduce_parts(call, bias_sums, bias_grad, "parameter")
        if dot_sums is not None and alpha_sums is not None:
            alpha_sums = torch.cat([alpha_sums, dot_sums])
    if alpha_sums is not None:
        results[6] = alpha_grad = _dense_like(call.alpha)
        pointwise.reduce_parts(call, alpha_sums[:, None], alpha_grad, "none" if product else "slope")
    if needs.fc2_weight:  # dW2 = dM' A
        assert branch_grad is not None
        assert activated is not None
        results[4] = weight_grad = _dense_like(call.fc2_weight)
        rows = branch_grad[:, shape.prefix :], activated[:, shape.prefix :]
        gemm.weight_gradient(call, *rows, weight_grad, "parameter" if product else "scaled")
    del branch_grad, activated
    if hidden_grad is not None:
        _inner_gradients(call, grad, hidden_grad, sampled, tables, needs, results)
    return results


def _inner_gradients(
    call: Call, grad: Tensor, hidden_grad: Tensor, sampled: Tensor | None, tables: Tables | None, needs: Needs,
    results: list[Tensor | None],
) -> None:  # fmt: skip
    """The gradients that follow from dZ [T, L, H]: tokens, features and fc1's weight."""
    shape, plan = call.shape, call.plan
    weight_projects = needs.fc1_weight and plan.weight_gradient == "project_first"
    feature_projects = needs.features and plan.feature_gradient == "project_first"
    tokens_grad = _dense_like(call.tokens) if needs.tokens else None
    sampled_grad = _scratch(call, shape.feature_width) if needs.features and not feature_projects else None
    if tokens_grad is not None or sampled_grad is not None:
        gemm.input_gradient(call, hidden_grad, grad, tokens_grad, sampled_grad)
        results[0] = tokens_grad
    gathered = None
    if weight_projects or feature_projects:  # dP = R' dZ
        assert tables is not None
        gathered = call.fc1_weight.new_empty((*shape.maps, shape.hidden_width))
        _gather(call, hidden_grad, tables, gathered)
    if needs.features:
        results[1] = features_grad = _dense_like(call.features)
        if feature_projects:  # dF = dP W1s
            assert gathered is not None
            gemm.input_gradient(call, gathered.view(1, -1, shape.hidden_width), grad, None, features_grad)
        else:  # dF = R' dS
            assert sampled_grad is not None
            assert tables is not None
            _gather(call, sampled_grad, tables, features_grad)
    if needs.fc1_weight:
        weight_grad = _dense_like(call.fc1_weight)
        inner = hidden_grad[:, shape.prefix :]
        gemm.weight_gradient(call, inner, call.row_operand()[:, shape.prefix :], weight_grad[:, : shape.token_width])
        if weight_projects:  # dW1s = dP' F
            assert gathered is not None
            cells = call.features.reshape(1, -1, shape.feature_width)
            rows = gathered.view(1, -1, shape.hidden_width), cells
        else:  # dW1s = dZ' S
            assert tables is not None
            rows = inner, (_sampled(call, tables) if sampled is None else sampled)[:, shape.prefix :]
        gemm.weight_gradient(call, *rows, weight_grad[:, shape.token_width :])
        results[2] = weight_grad


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor:
    """Computes the fused tokens [T, L, D] by the call's forward plan.

    The launches are, for "sample_first": the taps' tables, crop and resize, fc1, fc2; for "project_first": the
    tables, the projection by the vendor library, fc1, fc2; for "single_pass": one.

    Args:
        call: validated arguments, on one device, and the plan with its measured configs.
        hidden: filled with Z [T * N, H], what the backward pass reads instead of computing it again; or None.
        branch: filled with M [T * N, D], which the product gate's backward pass reads; or None.
    """
    out = _dense_like(call.tokens)
    with device_guard(call.tokens.device):
        if call.plan.forward == "single_pass":
            single_pass(call, out, hidden, branch)
            return out
        activated = _scratch(call, call.shape.hidden_width)
        _first_layer(call, _tables(call, False), hidden, activated)
        gemm.fc2(call, activated, out, branch)
    return out


def backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """Computes the gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha.

    Every sum has one writer and a fixed order, so that the result repeats to the last bit.

    Args:
        call: as in `forward`.
        grad: dY [T, L, D] of any strides.
        hidden, branch: Z and M as `forward` filled them; None computes them again. Neither is written to.
        needs: which gradients are wanted; for the others nothing is launched, and their place holds None.
    """
    with device_guard(grad.device):
        return _backward(call, dense_rows(grad), hidden, branch, needs)
