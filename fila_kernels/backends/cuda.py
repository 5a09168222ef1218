"""The `cuda` backend: the compiled kernels of csrc/cuda.

Sampling and its transpose are kernels of their own in both directions. The forward pass in bfloat16 and float16 is one
operator, whose products carry activation, gate and residual in their epilogues. Products of float32, those of widths
that 16-byte accesses do not divide, and all products of the backward pass are the vendor library's, in the `torch`
backend's composition around these samplers.
"""

import torch
from torch import Tensor

from fila_kernels.backends import eager, eager_backward
from fila_kernels.call import Call, Needs


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """[B, h, w, C] of any stride to [T, size, size, C]."""
    return torch.ops.fila.crop_resize(eager.dense_channels(features), boxes, image_index, size, check_values=False)


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """[T, size, size, C] of any stride to the dense [B, h, w, C]."""
    grad = eager.dense_channels(grad)
    return torch.ops.fila.crop_resize_backward(grad, boxes, image_index, *maps, check_values=False)


SAMPLER = eager.Sampler(crop_resize, crop_resize_backward)
ALIGNMENT = 8  # elements of 16 bits that fill 16 bytes


def has_products(call: Call) -> bool:
    """Whether the compiled products take these tensors."""
    shape = call.shape
    widths = (shape.token_width, shape.feature_width, shape.hidden_width)
    return call.tokens.dtype != torch.float32 and all(width and width % ALIGNMENT == 0 for width in widths)


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor:
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    if not has_products(call) and call.plan.forward != "single_pass":  # which the operator takes or refuses
        return eager.forward(eager.Composition.of(call, SAMPLER), hidden, branch)
    return torch.ops.fila.cvfm_forward(
        tokens=call.tokens, features=eager.dense_channels(call.features), boxes=call.boxes,
        image_index=call.image_index, fc1_weight=call.fc1_weight, fc1_bias=call.fc1_bias, fc2_weight=call.fc2_weight,
        fc2_bias=call.fc2_bias, alpha=call.alpha, num_prefix_tokens=call.shape.prefix, gate=call.gate,
        plan=call.plan.forward, hidden=hidden, branch=branch, check_values=False,
    )  # fmt: skip


def backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """Gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha; None where not needed.

    `hidden` (Z) and `branch` (M) are what the forward pass saved, or None.
    """
    return eager_backward.backward(eager.Composition.of(call, SAMPLER), grad, hidden, branch, needs)
