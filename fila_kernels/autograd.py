"""Derivatives of the operators: reverse mode, once, also under `torch.func`; `ops` refuses every other mode.

The operators themselves are differentiated only here. The forward pass returns what the backward pass reads, so that
`torch.func` can run the two apart. `vmap` runs a call for each entry of the batch.
"""

import inspect
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fila_kernels import ops

_ops = getattr(torch.ops, ops.NAMESPACE)


def _is_transformed() -> bool:
    """Whether forward mode or `torch.func` is at work, which ask for derivatives under `no_grad`, too."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_differentiated(arguments: Sequence[Any]) -> bool:
    """Whether anything may ask for a derivative."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return True
    return _is_transformed()


def _refuse_forward_mode(ctx: Any, *tangents: Tensor | None) -> Any:
    raise RuntimeError(ops.NO_FORWARD_MODE)


@cache
def _refusing(function: type[torch.autograd.Function]) -> Any:
    """The same function with a `jvp` that says why there is none; torch.compile traces no function that has one."""
    return type(function.__name__, (function,), {"jvp": staticmethod(_refuse_forward_mode)})


@torch._disable_dynamo
def _apply_eagerly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return _refusing(function).apply(*arguments)


def _apply(function: Any, *arguments: Any) -> Any:
    """A function's operator, under autograd where that is asked for."""
    if not _is_differentiated(arguments):
        return function.forward(*arguments)
    if not torch.compiler.is_compiling():
        return _refusing(function).apply(*arguments)
    # torch.compile traces plain training, but fails inside on a function of this form under a transform.
    return _apply_eagerly(function, *arguments) if _is_transformed() else function.apply(*arguments)


class _CropResize(torch.autograd.Function):
    """`crop_resize` with the operator's own arguments."""

    @staticmethod
    def forward(features: Tensor, boxes: Tensor, image_index: Tensor, size: int, backend: str) -> Tensor:
        return _ops.crop_resize(features, boxes, image_index, size, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, boxes, image_index, _, backend = inputs
        ctx.save_for_backward(boxes, image_index)
        ctx.maps, ctx.backend = tuple(features.shape[:3]), backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.crop_resize_backward(grad, *ctx.saved_tensors, *ctx.maps, ctx.backend), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return ops.for_each(partial(_apply, _CropResize), info, in_dims, *arguments)


class _Cvfm(torch.autograd.Function):
    """`cvfm_forward` with the operator's own arguments."""

    @staticmethod
    def forward(
        tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
        fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor,
        num_prefix_tokens: int, gate: str, plan: str, save_hidden: bool, save_branch: bool, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _ops.cvfm_forward(
            tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
            num_prefix_tokens, gate, plan, save_hidden, save_branch, backend,
        )  # fmt: skip

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
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return ops.for_each(partial(_apply, _Cvfm), info, in_dims, *arguments)


# `Function.apply` asks for the signature at each call, and working it out takes 40 us.
for _forward in (_CropResize.forward, _Cvfm.forward):
    setattr(_forward, "__signature__", inspect.signature(_forward))  # noqa: B010 - no attribute that mypy knows


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int, backend: str) -> Tensor:
    """The operator with its derivative."""
    return _apply(_CropResize, features, boxes, image_index, size, backend)


def cvfm(
    inputs: tuple[Tensor, ...], num_prefix_tokens: int, gate: str, plan: str, recompute: bool, backend: str
) -> Tensor:
    """The operator with its derivative, of the nine tensors in the operator's order."""
    tokens, features, _, _, *parameters, alpha = (torch.is_grad_enabled() and t.requires_grad for t in inputs)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    save_hidden = not recompute and (tokens or features or fc1_weight or fc1_bias or fc2_weight)
    save_branch = not recompute and gate == "product" and (save_hidden or fc2_bias or alpha)
    # The scale gate finds alpha's gradient through the hidden activation.
    save_hidden = save_hidden or (not recompute and gate == "scale" and alpha)
    return _apply(_Cvfm, *inputs, num_prefix_tokens, gate, plan, save_hidden, save_branch, backend)[0]
