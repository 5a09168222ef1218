"""Registers FLOP formulas for `torch.utils.flop_counter`, which cannot see into an operator.

Call `register` once; a counter that meets an operator without a formula counts zero for it in silence::

    from fila_kernels import flops
    flops.register()
    with torch.utils.flop_counter.FlopCounterMode() as counter:
        module(*arguments)

The count is that of eager PyTorch's matrix products in the same pass, as for every other operator. It is the
definition's whatever the plan saves, includes only the gradients that are wanted, and includes the forward pass again
where nothing was saved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fila_kernels import ops

Shape = Sequence[int]


def _sizes(tokens: Shape, features: Shape, fc1_weight: Shape, num_prefix_tokens: int) -> tuple[int, int, int, int]:
    """Samples, D, C, H."""
    return tokens[0] * (tokens[1] - num_prefix_tokens), tokens[2], features[3], fc1_weight[0]


def cvfm_forward_flops(
    tokens: Shape, features: Shape, boxes: Shape, image_index: Shape, fc1_weight: Shape, fc1_bias: Shape,
    fc2_weight: Shape, fc2_bias: Shape, alpha: Shape, num_prefix_tokens: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """[X ; S] W1' and A W2'."""
    rows, d, c, h = _sizes(tokens, features, fc1_weight, num_prefix_tokens)
    return 2 * rows * h * (2 * d + c)


def cvfm_backward_flops(
    grad: Shape, tokens: Shape, features: Shape, boxes: Shape, image_index: Shape, fc1_weight: Shape, fc1_bias: Shape,
    fc2_weight: Shape, fc2_bias: Shape, alpha: Shape, hidden: Shape, branch: Shape, num_prefix_tokens: int,
    gate: str, plan: str, needs: Sequence[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """dM W2, dM' A, dZ W1x, dZ W1s, dZ' X and dZ' S as `needs` asks for them; fc1 and fc2 again if nothing was kept."""
    rows, d, c, h = _sizes(tokens, features, fc1_weight, num_prefix_tokens)
    wants_tokens, wants_features, wants_fc1, wants_fc1_bias, wants_fc2, _, wants_alpha = needs
    columns = h if wants_tokens or wants_features or wants_fc1 or wants_fc1_bias else 0  # dA
    columns += h if wants_fc2 else 0
    total = 2 * rows * d * columns
    total += 2 * rows * h * (d * (wants_tokens + wants_fc1) + c * (wants_features + wants_fc1))
    if len(hidden) == 1 and (columns or wants_alpha):
        total += 2 * rows * h * (d + c)
        total += 2 * rows * h * d if len(branch) == 1 and gate == "product" else 0
    return total


def register() -> None:
    """Make `torch.utils.flop_counter.FlopCounterMode` count the operators; again does nothing."""
    operators = getattr(torch.ops, ops.NAMESPACE)
    for name, formula in (("cvfm_forward", cvfm_forward_flops), ("cvfm_backward", cvfm_backward_flops)):
        operator = getattr(operators, name)
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
