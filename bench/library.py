"""L: what an expert assembles from library calls, for inference and for training.

The crop-resize reads only the cells that count (`tapped_resize`, with PyTorch's derivative). The MLP is cuBLASLt's
products with their bias epilogue and alpha folded into fc2. For inference they have the GELU epilogue too, on a GPU in
its tanh form: where that is too far from the definition the gate leaves this baseline out. For training the derivative
is written by hand; the GELU epilogue keeps nothing to differentiate by, so that GELU is then a pass of its own. The
gate's tanh is kept in place of M, and alpha's gradient comes out of the product that W2's needs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import Boxes, Indices, tapped_resize


class _GatedMlp(torch.autograd.Function):
    """tanh(alpha (gelu(J W1' + b1) W2' + b2)) for rows J [rows, D + C]."""

    @staticmethod
    def forward(
        ctx: Any,
        joint: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        alpha: Tensor,
    ) -> Tensor:
        z = torch.addmm(fc1_bias, joint, fc1_weight.t())
        a = F.gelu(z)
        gate = torch.addmm(fc2_bias * alpha, a, (fc2_weight * alpha).t()).tanh_()
        ctx.save_for_backward(joint, fc1_weight, fc2_weight, fc2_bias, alpha, z, a, gate)
        return gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        joint, fc1_weight, fc2_weight, fc2_bias, alpha, z, a, gate = ctx.saved_tensors
        du = torch.ops.aten.tanh_backward(grad, gate)  # of u = alpha M
        du_sum, products = du.sum(0), du.t() @ a
        # sum du M = <du' a, W2> + <sum du, b2>
        alpha_grad = (products * fc2_weight).sum() + (du_sum * fc2_bias).sum()
        dz = torch.ops.aten.gelu_backward(du @ (fc2_weight * alpha), z)
        return (
            dz @ fc1_weight, dz.t() @ joint, dz.sum(0), products * alpha, du_sum * alpha, alpha_grad.reshape(1),
        )  # fmt: skip


def library(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """`cvfm` by library calls."""
    patches = tokens[:, num_prefix_tokens:]
    sampled = tapped_resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    joint = torch.cat([patches, sampled], dim=-1).flatten(0, 1)
    if torch.is_grad_enabled():
        gate = _GatedMlp.apply(joint, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha).view(patches.shape)
        return torch.cat([tokens[:, :num_prefix_tokens], patches + gate], dim=1)
    hidden = torch._addmm_activation(fc1_bias, joint, fc1_weight.t(), use_gelu=True)
    gate = torch.addmm(fc2_bias * alpha, hidden, (fc2_weight * alpha).t()).tanh_().view(patches.shape)
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    out[:, :num_prefix_tokens] = tokens[:, :num_prefix_tokens]
    torch.add(patches, gate, out=out[:, num_prefix_tokens:])
    return out
