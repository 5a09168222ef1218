"""The `native` backend: the compiled kernels of csrc, for CPU and CUDA tensors.

On a CPU the forward pass is one operator. On a GPU it is one operator in bfloat16 and float16, with activation, gate
and residual in its products' epilogues. The vendor library computes the other products: float32 on a GPU, widths that
16-byte accesses do not divide, and the backward pass on both. `products` composes those around this file's sampling
steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fila_kernels.backends import products
from fila_kernels.call import Call, Needs

ALIGNMENT = 8  # elements of 16 bits that fill 16 bytes


def dense_channels(tensor: Tensor) -> Tensor:
    """As the operators want it: unit stride over channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """[B, h, w, C] of any stride to [T, size, size, C]. Values need not have been checked: any is safe."""
    return torch.ops.fila.crop_resize(dense_channels(features), boxes, image_index, size, check_values=False)


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """[T, size, size, C] of any stride to the dense [B, h, w, C]."""
    return torch.ops.fila.crop_resize_backward(dense_channels(grad), boxes, image_index, *maps, check_values=False)


def gate_backward(call: Call, grad: Tensor, m: Tensor, out: Tensor, needs_alpha: bool) -> Tensor:
    """dM [rows, D] of the product gate into `out`, and these rows' part of alpha's gradient."""
    if grad.dtype != m.dtype:  # under autocast
        grad = grad.float()
    return torch.ops.fila.gate_backward(dense_channels(grad), m, call.alpha, out)


def sampler(maps: Tensor, call: Call) -> Callable[[int, int], Tensor]:
    """A function of (first tile, last tile), which gives their samples of `maps` [rows, W]."""

    def sampled(first: int, last: int) -> Tensor:
        boxes, image_index = call.boxes[first:last], call.image_index[first:last]
        return crop_resize(maps, boxes, image_index, call.shape.grid).flatten(0, 2)

    return sampled


STEPS = products.Steps(sampler, crop_resize_backward, gate_backward)


def has_forward(call: Call) -> bool:
    """Whether the forward operator takes this call: all but odd tokens on a CPU, else what its products take.

    Under autocast it reads and writes the residual in the tokens' own float32.
    """
    on_cpu = call.tokens.device.type == "cpu"
    if call.mixed and call.tokens.dtype != torch.float32:
        return False
    if on_cpu or call.plan.forward == "single_pass":  # which it takes or refuses itself
        return True
    shape = call.shape
    widths = (shape.token_width, shape.feature_width, shape.hidden_width)
    return call.dtype != torch.float32 and all(width and width % ALIGNMENT == 0 for width in widths)


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor:
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    if not has_forward(call):
        return products.forward(call, hidden, branch, STEPS)
    return torch.ops.fila.cvfm_forward(
        tokens=call.tokens, features=dense_channels(call.features), boxes=call.boxes,
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
    return products.backward(call, grad, hidden, branch, needs, STEPS)
