"""The `torch` backend's backward pass: deterministic, one writer for each element, saved tensors only read.

Beside the results it holds two buffers of [T * N, max(D, H)]: dM, and A, whose place dZ takes chunk by chunk.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.backends.eager import (
    Composition,
    FirstLayer,
    dense_channels,
    gate_sigmoid,
    wide,
)
from fila_kernels.call import Call, Needs


def _sum_product(left: Tensor, right: Tensor) -> Tensor:
    """sum(left * right), accumulated in at least float32."""
    return (left * right).sum(dtype=torch.promote_types(left.dtype, torch.float32))


def backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """Gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha; None where not needed.

    `hidden` (Z) and `branch` (M) are what the forward pass saved, or None.
    """
    call = Composition.of(call)
    closed = call.closed()
    if hidden is None and (branch is None or needs.inner or needs.fc2_weight) and (needs.alpha or not closed):
        hidden = _recompute_hidden(call)
    if closed:
        return _backward_closed(call, grad, hidden, branch, needs)
    results: list[Tensor | None] = [None] * 7
    activated, branch_grad, alpha_total = _second_layer(call, grad, hidden, branch, needs, results)
    if needs.inner or (needs.alpha and call.gate == "scale"):
        assert hidden is not None
        inner, dot = _through_activation(call, grad, hidden, activated, branch_grad, needs, results)
        if call.gate == "scale" and needs.alpha:
            # sum dY M = sum (dY W2) A + sum dY b2, so that M is needed neither saved nor again.
            assert dot is not None
            alpha_total = dot + _sum_product(branch_grad.sum(0), call.fc2_bias)
        del activated, branch_grad
        if needs.inner:
            _first_layer(call, inner, needs, results)
    if call.gate == "scale":
        scale = call.alpha.tanh()
        for slot in (4, 5):
            results[slot] = None if results[slot] is None else results[slot].mul_(scale)  # type: ignore[union-attr]
        if alpha_total is not None:
            alpha_total = alpha_total * (1 - scale.to(alpha_total.dtype) ** 2)
    if needs.alpha:
        assert alpha_total is not None
        results[6] = alpha_total.to(call.alpha.dtype).reshape(call.alpha.shape)
    if not call.on_cpu:
        _silence(call, grad, results)
    return results


def _recompute_hidden(call: Composition) -> Tensor:
    hidden = call.tokens.new_empty(call.shape.samples, call.shape.hidden_width)
    first_layer = FirstLayer(call)
    for first, last, rows in call.chunks():
        first_layer(first, last, hidden[rows])
    return hidden


def _backward_closed(
    call: Composition, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """At alpha = 0 everything inside the branch gets exactly zero, and alpha feels the finite entries of M."""
    inputs = (call.fc1_weight, call.fc1_bias, call.fc2_weight, call.fc2_bias)
    results: list[Tensor | None] = [
        grad.clone(memory_format=torch.contiguous_format) if needs.tokens else None,
        torch.zeros_like(call.features, memory_format=torch.contiguous_format) if needs.features else None,
        *(torch.zeros_like(like) if need else None for like, need in zip(inputs, needs[2:6], strict=True)),
        None,
    ]
    if needs.alpha:
        total = call.alpha.new_zeros((), dtype=torch.promote_types(grad.dtype, torch.float32))
        for first, last, rows in call.chunks():
            if branch is not None:
                m = branch[rows]
            else:
                assert hidden is not None
                m = torch.addmm(call.fc2_bias, F.gelu(hidden[rows]), call.fc2_weight.t())
            m = m.masked_fill(~torch.isfinite(m), 0)
            total += _sum_product(call.patches(grad, first, last), m)
        results[6] = total.to(call.alpha.dtype).reshape(call.alpha.shape)
    return results


def _second_layer(
    call: Composition,
    grad: Tensor,
    hidden: Tensor | None,
    branch: Tensor | None,
    needs: Needs,
    results: list[Tensor | None],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """fc2's gradients; returns A (None where nobody needs it), dM, and the product gate's sum for alpha.

    Under the scale gate dM is dY: the factor tanh(alpha) goes onto what is made of it.
    """
    shape = call.shape
    product = call.gate == "product"
    needs_activated = needs.fc2_weight or (product and branch is None) or (not product and needs.alpha)
    activated = torch.empty_like(hidden) if hidden is not None and needs_activated else None
    branch_grad = grad.new_empty(shape.samples, shape.token_width)
    scratch = call.scratch(shape.token_width)
    total = None
    for first, last, rows in call.chunks():
        patch_grad = call.patches(grad, first, last)
        if activated is not None:
            torch.ops.aten.gelu.out(hidden[rows], out=activated[rows])  # type: ignore[index]
        if not product:
            branch_grad[rows] = patch_grad
            continue
        m = branch[rows] if branch is not None else None
        if m is None:
            assert activated is not None
            m = torch.addmm(call.fc2_bias, activated[rows], call.fc2_weight.t(), out=scratch[: rows.stop - rows.start])
        if call.compiled(m):
            part = torch.ops.fila.gate_backward(dense_channels(patch_grad), m, call.alpha, branch_grad[rows])
            total = part if total is None else total + part
            continue
        slope = _slope(m, patch_grad, call)
        if needs.alpha:
            part = _alpha_sum(slope, m, call)
            total = part if total is None else total + part
        torch.mul(slope, wide(call.alpha), out=branch_grad[rows])  # dM = alpha (1 - tanh^2) dY
    if needs.fc2_bias:
        results[5] = branch_grad.sum(0)
    if needs.fc2_weight:
        assert activated is not None
        weight_grad = torch.empty_like(call.fc2_weight, memory_format=torch.contiguous_format)
        for first, _, rows in _weight_chunks(call):  # dW2 = dM' A
            _accumulate(weight_grad, branch_grad[rows], activated[rows], first == 0)
        results[4] = weight_grad
    return activated, branch_grad, total


def _slope(m: Tensor, patch_grad: Tensor, call: Composition) -> Tensor:
    """(1 - tanh^2(alpha M)) dY in at least float32: in bfloat16 the difference would leave nothing of a full gate."""
    if m.dtype in (torch.float32, torch.float64):
        tanh = torch.mul(m, call.alpha).tanh_()
        return torch.ops.aten.tanh_backward.grad_input(patch_grad, tanh, grad_input=tanh)
    sigmoid = gate_sigmoid(m, call)
    return torch.ops.aten.sigmoid_backward.grad_input(wide(patch_grad), sigmoid, grad_input=sigmoid).mul_(4)


def _alpha_sum(slope: Tensor, m: Tensor, call: Composition) -> Tensor:
    """sum (1 - tanh^2) dY M; see `reference.gated` for what non-finite entries count."""
    total = _sum_product(slope, m)
    if not call.on_cpu or not bool(torch.isfinite(total)):
        quiet = torch.isinf(m) | (torch.isnan(m) & (call.alpha == 0))
        total = _sum_product(slope.masked_fill(quiet, 0), m.masked_fill(quiet, 0))
    return total


def _through_activation(
    call: Composition, grad: Tensor, hidden: Tensor, activated: Tensor | None, branch_grad: Tensor, needs: Needs,
    results: list[Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dZ [T * N, H] in A's place, the tokens' gradient, and sum dA A for the scale gate's alpha."""
    shape = call.shape
    product = call.gate == "product"
    inner = activated if activated is not None else torch.empty_like(hidden)
    scratch = call.scratch(shape.hidden_width)
    tokens_grad = None
    if needs.tokens:
        tokens_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
        tokens_grad[:, : shape.prefix] = grad[:, : shape.prefix]
        results[0] = tokens_grad
    dot = None
    for first, last, rows in call.chunks():
        hidden_grad = torch.mm(branch_grad[rows], call.fc2_weight, out=scratch[: rows.stop - rows.start])  # dA = dM W2
        if not product:
            if needs.alpha:
                assert activated is not None
                part = _sum_product(hidden_grad, activated[rows])
                dot = part if dot is None else dot + part
            hidden_grad.mul_(call.alpha.tanh())
        dz = torch.ops.aten.gelu_backward.grad_input(hidden_grad, hidden[rows], grad_input=inner[rows])
        if tokens_grad is not None:
            _add_rows(call, grad, dz, tokens_grad, first, last)
    return inner, dot


def _add_rows(call: Composition, grad: Tensor, dz: Tensor, tokens_grad: Tensor, first: int, last: int) -> None:
    """dX = dY + dZ W1x for some tiles, straight into the result where its rows are flat."""
    target = tokens_grad[first:last, call.shape.prefix :]
    patch_grad = call.patches(grad, first, last)
    if last - first == 1 or call.shape.prefix == 0:
        torch.addmm(patch_grad, dz, call.weight_x, out=target.view(-1, call.shape.token_width))
    else:
        target.copy_(torch.addmm(patch_grad, dz, call.weight_x).view(target.shape))


def _weight_chunks(call: Composition) -> Iterable[tuple[int, int, slice]]:
    """All rows at once below float32, where each partial sum would be rounded; else chunks, which copy no tokens."""
    if call.tokens.dtype in (torch.float32, torch.float64):
        return call.chunks()
    return [(0, call.shape.tiles, slice(0, call.shape.samples))]


def _accumulate(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """out = left' right, or out += left' right."""
    if fresh:
        torch.mm(left.t(), right, out=out)
    else:
        out.addmm_(left.t(), right)


def _first_layer(call: Composition, inner: Tensor, needs: Needs, results: list[Tensor | None]) -> None:
    """fc1's and the features' gradients from dZ."""
    shape, plan = call.shape, call.plan
    maps = (shape.images, shape.height, shape.width)
    sample, go_back = call.sampling

    def square(rows: Tensor) -> Tensor:
        return rows.view(shape.tiles, shape.grid, shape.grid, -1)

    if needs.fc1_bias:
        results[3] = inner.sum(0)
    gathered = None
    if (needs.features and plan.feature_gradient == "project_first") or (
        needs.fc1_weight and plan.weight_gradient == "project_first"
    ):
        gathered = go_back(square(inner), call.boxes, call.image_index, maps).flatten(0, 2)  # dP = R' dZ
    if needs.fc1_weight:
        weight_grad = torch.empty_like(call.fc1_weight, memory_format=torch.contiguous_format)
        for first, last, rows in _weight_chunks(call):  # dW1x = dZ' X
            patches = call.patches(call.tokens, first, last)
            _accumulate(weight_grad[:, : shape.token_width], inner[rows], patches, first == 0)
        if plan.weight_gradient == "project_first":
            assert gathered is not None
            cells = call.features.reshape(-1, shape.feature_width)
            torch.mm(gathered.t(), cells, out=weight_grad[:, shape.token_width :])  # dW1s = dP' F
        else:
            sampled = sample(call.features, call.boxes, call.image_index, shape.grid).flatten(0, 2)
            for first, _, rows in _weight_chunks(call):  # dW1s = dZ' S
                _accumulate(weight_grad[:, shape.token_width :], inner[rows], sampled[rows], first == 0)
            del sampled
        results[2] = weight_grad
    if needs.features:
        if plan.feature_gradient == "project_first":
            assert gathered is not None
            results[1] = (gathered @ call.weight_s).view(call.features.shape)  # dF = dP W1s
        else:
            sampled_grad = square(inner @ call.weight_s)  # dS = dZ W1s
            results[1] = go_back(sampled_grad, call.boxes, call.image_index, maps)


def _silence(call: Composition, grad: Tensor, results: list[Tensor | None]) -> None:
    """What `_backward_closed` does, without looking at alpha: 0 times a non-finite number left NaN behind."""
    shut = call.alpha == 0
    for slot, result in enumerate(results[:6]):
        if result is not None:
            results[slot] = torch.where(shut, grad, result) if slot == 0 else result.masked_fill(shut, 0)
