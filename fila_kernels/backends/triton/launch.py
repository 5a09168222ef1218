"""What the operators call: validated arguments in, results out, every buffer allocated here.

Shapes as in `fila_kernels.cvfm`. Scratch rows are flat, T * L of them, which is how the products run; what is saved
for the backward pass has a row for each of the T * N samples.
"""

import torch
from torch import Tensor

from fila_kernels.backends.triton import products
from fila_kernels.backends.triton.crop_resize import Tables, crop_resize_bwd, crop_resize_fwd, crop_tables
from fila_kernels.backends.triton.host import dense_rows, device_guard
from fila_kernels.call import Call, Needs


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """[B, h, w, C] of any stride to [T, size, size, C]."""
    out = features.new_empty((boxes.shape[0], size, size, features.shape[3]))
    with device_guard(features.device):
        crop_resize_fwd(features, boxes, image_index, size, out.flatten(1, 2))
    return out


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """[T, size, size, C] of any stride to the dense [B, h, w, C]."""
    size = grad.shape[1]
    out = grad.new_empty((*maps, grad.shape[3]))
    with device_guard(grad.device):
        tables = crop_tables(boxes, image_index, size, maps, True)
        crop_resize_bwd(grad, tables, size, out)
    return out


def _flat(call: Call, width: int) -> Tensor:
    """Scratch [T, L, width]."""
    return call.tokens.new_empty((call.shape.tiles, call.shape.prefix + call.shape.patches, width))


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _maps(call: Call) -> tuple[int, int, int]:
    return call.shape.images, call.shape.height, call.shape.width


def _sampled(call: Call) -> Tensor:
    """S [T, L, C]; its prefix rows are left as they are."""
    s = _flat(call, call.shape.feature_width)
    crop_resize_fwd(
        call.features,
        call.boxes,
        call.image_index,
        call.shape.grid,
        s[:, call.shape.prefix :],
        configs=call.plan.configs,
    )
    return s


def _first_layer(call: Call, hidden: Tensor | None, activated: Tensor | None) -> Tensor | None:
    """Z and A by the forward plan; returns S where that samples first."""
    if call.plan.forward != "project_first":
        s = _sampled(call)
        products.fc1(call, s, None, None, hidden, activated)
        return s
    # R(F) W' = R(F W'), and a constant passes through R unchanged. The plain product is the vendor library's.
    projected = torch.addmm(call.fc1_bias, call.features.reshape(-1, call.shape.feature_width), call.weight_s.t())
    tables = crop_tables(call.boxes, call.image_index, call.shape.grid, _maps(call), False)
    products.fc1(call, None, projected, (tables.taps, tables.weights), hidden, activated)
    return None


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor:
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    out = _dense_like(call.tokens)
    with device_guard(call.tokens.device):
        if call.plan.forward == "single_pass":
            products.single_pass(call, out, hidden, branch)
            return out
        activated = _flat(call, call.shape.hidden_width)
        _first_layer(call, hidden, activated)
        products.fc2(call, activated, out, branch)
    return out


def backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """Gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha; None where not needed.

    `hidden` (Z) and `branch` (M) are what the forward pass saved, or None.
    """
    with device_guard(grad.device):
        return _backward(call, dense_rows(grad), hidden, branch, needs)


def _backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    shape, product = call.shape, call.gate == "product"
    results: list[Tensor | None] = [None] * 7
    needs_hidden_grad = needs.inner or (needs.alpha and not product)
    needs_branch = branch is None and (product or needs.alpha) and any(needs)
    activated = sampled = None
    if hidden is None and (needs_branch or needs_hidden_grad or needs.fc2_weight):
        hidden = call.tokens.new_empty((shape.samples, shape.hidden_width))
        activated = _flat(call, shape.hidden_width) if needs_branch else None
        sampled = _first_layer(call, hidden, activated)
    if activated is None and (needs_branch or (needs.fc2_weight and not needs_hidden_grad)):
        assert hidden is not None
        activated = _flat(call, shape.hidden_width)
        products.activate(call, hidden, activated)
    if needs_branch:
        # The scale gate looks at M only where it is closed, to leave out of alpha's gradient what is not finite.
        assert activated is not None
        branch = call.tokens.new_empty((shape.samples, shape.token_width))
        products.fc2(call, activated, None, branch, if_closed=not product)

    branch_grad = _flat(call, shape.token_width) if needs_hidden_grad or needs.fc2_weight else None
    bias_sums, alpha_sums = products.gate_gradient(call, grad, branch, branch_grad, needs.fc2_bias, needs.alpha)
    if bias_sums is not None:
        results[5] = bias_grad = _dense_like(call.fc2_bias)
        products.reduce_parts(call, bias_sums, bias_grad, "parameter" if product else "scaled")
    hidden_grad = _flat(call, shape.hidden_width) if needs.inner else None
    if needs_hidden_grad:
        assert branch_grad is not None
        assert hidden is not None
        wanted = None
        if needs.fc2_weight and activated is None:
            wanted = activated = _flat(call, shape.hidden_width)
        bias_sums, dot_sums = products.hidden_gradient(
            call, branch_grad, hidden, hidden_grad, wanted, needs.fc1_bias, needs.alpha and not product
        )
        if bias_sums is not None:
            results[3] = bias_grad = _dense_like(call.fc1_bias)
            products.reduce_parts(call, bias_sums, bias_grad, "parameter")
        if dot_sums is not None and alpha_sums is not None:
            alpha_sums = torch.cat([alpha_sums, dot_sums])
    if alpha_sums is not None:
        results[6] = alpha_grad = _dense_like(call.alpha)
        products.reduce_parts(call, alpha_sums[:, None], alpha_grad, "none" if product else "slope")
    if needs.fc2_weight:  # dW2 = dM' A
        assert branch_grad is not None
        assert activated is not None
        results[4] = weight_grad = _dense_like(call.fc2_weight)
        rows = branch_grad[:, shape.prefix :], activated[:, shape.prefix :]
        products.weight_gradient(call, *rows, weight_grad, "parameter" if product else "scaled")
    del branch_grad, activated
    if hidden_grad is not None:
        _inner_gradients(call, grad, hidden_grad, sampled, needs, results)
    return results


def _inner_gradients(
    call: Call, grad: Tensor, hidden_grad: Tensor, sampled: Tensor | None, needs: Needs, results: list[Tensor | None]
) -> None:
    """What follows from dZ [T, L, H]: the tokens', the features' and fc1's weight's gradients."""
    shape, plan = call.shape, call.plan
    weight_projects = needs.fc1_weight and plan.weight_gradient == "project_first"
    feature_projects = needs.features and plan.feature_gradient == "project_first"
    tables = None
    if needs.features or weight_projects:
        tables = crop_tables(call.boxes, call.image_index, shape.grid, _maps(call), True)
    tokens_grad = _dense_like(call.tokens) if needs.tokens else None
    sampled_grad = _flat(call, shape.feature_width) if needs.features and not feature_projects else None
    if tokens_grad is not None or sampled_grad is not None:
        products.input_gradient(call, hidden_grad, grad, tokens_grad, sampled_grad)
        results[0] = tokens_grad
    gathered = None
    if weight_projects or feature_projects:  # dP = R' dZ
        assert tables is not None
        gathered = call.tokens.new_empty((*_maps(call), shape.hidden_width))
        _gather(call, hidden_grad, tables, gathered)
    if needs.features:
        results[1] = features_grad = _dense_like(call.features)
        if feature_projects:  # dF = dP W1s
            assert gathered is not None
            products.input_gradient(call, gathered, grad, None, features_grad)
        else:  # dF = R' dS
            assert sampled_grad is not None
            assert tables is not None
            _gather(call, sampled_grad, tables, features_grad)
    if needs.fc1_weight:
        weight_grad = _dense_like(call.fc1_weight)
        inner = hidden_grad[:, shape.prefix :]
        products.weight_gradient(call, inner, call.tokens[:, shape.prefix :], weight_grad[:, : shape.token_width])
        if weight_projects:  # dW1s = dP' F
            assert gathered is not None
            cells = call.features.reshape(1, -1, shape.feature_width)
            rows = gathered.view(1, -1, shape.hidden_width), cells
        else:  # dW1s = dZ' S
            rows = inner, (_sampled(call) if sampled is None else sampled)[:, shape.prefix :]
        products.weight_gradient(call, *rows, weight_grad[:, shape.token_width :])
        results[2] = weight_grad


def _gather(call: Call, rows: Tensor, tables: Tables, out: Tensor) -> None:
    """Flat rows [T, L, width] of the samples gathered into the cells of `out`."""
    shape = call.shape
    samples = rows[:, shape.prefix :].unflatten(1, (shape.grid, shape.grid))
    crop_resize_bwd(samples, tables, shape.grid, out, call.alpha, configs=call.plan.configs)
