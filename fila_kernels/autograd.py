"""Derivatives of the operators: reverse mode, once, also under `torch.func`; `ops` refuses every other mode.

The operators themselves are differentiated only here. The forward pass returns what the backward pass reads, so that
`torch.func` can run the two apart. `vmap` runs a call for each entry of the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fila_kernels import ops

_ops = getattr(torch.ops, ops.NAMESPACE)


def _is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether anything may ask for a derivative. Forward mode and `torch.func` do so under `no_grad`, too."""
    return (
        (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class _CropResize(torch.autograd.Function):
    """`crop_resize` with the operator's own arguments."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _ops.crop_resize(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, boxes, image_index, _, backend = inputs
        ctx.save_for_backward(boxes, image_index)
        ctx.maps, ctx.backend = tuple(features.shape[:3]), backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.crop_resize_backward(grad, *ctx.saved_tensors, *ctx.maps, ctx.backend), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(ops.NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return ops.for_each(_CropResize.apply, info, in_dims, *arguments)


class _Cvfm(torch.autograd.Function):
    """`cvfm_forward` with the operator's own arguments."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.cvfm_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, hidden, branch = output
        ctx.mark_non_differentiable(hidden, branch)
        # Else every backward pass would begin with zeros as large as the hidden activation.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:9], hidden, branch)
        ctx.settings, ctx.backend = inputs[9:12], inputs[14]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 15
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5, 6, 7, 8)]
        found = _ops.cvfm_backward(grad, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
        tokens, features, *parameters = (g if n else None for g, n in zip(found, needs, strict=True))
        return tokens, features, None, None, *parameters, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        raise RuntimeError(ops.NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return ops.for_each(_Cvfm.apply, info, in_dims, *arguments)


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int, backend: str) -> Tensor:
    """The operator with its derivative."""
    call = _CropResize.apply if _is_differentiated((features, boxes)) else _ops.crop_resize
    return call(features, boxes, image_index, size, backend)


def cvfm(
    inputs: tuple[Tensor, ...], num_prefix_tokens: int, gate: str, plan: str, recompute: bool, backend: str
) -> Tensor:
    """The operator with its derivative, of the nine tensors in the operator's order."""
    if not _is_differentiated(inputs):
        return _ops.cvfm_forward(*inputs, num_prefix_tokens, gate, plan, False, False, backend)[0]
    tokens, features, _, _, *parameters, alpha = (tensor.requires_grad for tensor in inputs)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    save_hidden = not recompute and (tokens or features or fc1_weight or fc1_bias or fc2_weight)
    save_branch = not recompute and gate == "product" and (save_hidden or fc2_bias or alpha)
    # The scale gate finds alpha's gradient through the hidden activation.
    save_hidden = save_hidden or (not recompute and gate == "scale" and alpha)
    return _Cvfm.apply(*inputs, num_prefix_tokens, gate, plan, save_hidden, save_branch, backend)[0]
