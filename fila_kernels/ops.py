"""The registered operators of namespace `fila_kernels`: schema, implementation, fake, and the shapes they share.

Arities are fixed. A tensor that was not asked for comes back empty, so that the number and shape of the results depend
on the arguments alone and never on the plan, which is chosen inside from real sizes. Values of boxes and indices are
looked at inside, too, where no compiler can leave the check out.

The operators have no derivative of their own (`autograd` has): they refuse forward mode, and refuse to differentiate
what they gave. `vmap` runs an operator once for each entry of the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fila_kernels import dispatch, planner, validation
from fila_kernels.call import Call, Needs, Shape

NAMESPACE = "fila_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_INPUTS = (
    "Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor alpha"
)
_SCHEMAS = {
    "checked_boxes": "(Tensor boxes, Tensor image_index, SymInt images) -> Tensor",
    "crop_resize": '(Tensor features, Tensor boxes, Tensor image_index, SymInt size, str backend="auto") -> Tensor',
    "crop_resize_backward": (
        "(Tensor grad, Tensor boxes, Tensor image_index, SymInt images, SymInt height, SymInt width, "
        'str backend="auto") -> Tensor'
    ),
    "cvfm_forward": (
        f"({_INPUTS}, SymInt num_prefix_tokens, str gate, str plan, bool save_hidden, bool save_branch, "
        'str backend="auto") '
        "-> (Tensor out, Tensor hidden, Tensor branch)"
    ),
    "cvfm_backward": (
        f"(Tensor grad, {_INPUTS}, Tensor hidden, Tensor branch, SymInt num_prefix_tokens, str gate, str plan, "
        'bool[] needs, str backend="auto") '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


NO_FORWARD_MODE = (
    "fila_kernels: forward-mode differentiation (jvp, jacfwd) is not implemented for crop_resize and cvfm; "
    "backend='reference' has it"
)
NO_DOUBLE_BACKWARD = (
    "fila_kernels: double backward is not implemented; crop_resize and cvfm can be differentiated once. "
    "backend='reference' is differentiable any number of times"
)


def shape_of(tokens: Tensor, features: Tensor, fc1_weight: Tensor, num_prefix_tokens: int) -> Shape:
    """The sizes of a call whose arguments were validated."""
    return Shape.of(tokens.shape, features.shape, fc1_weight.shape[0], num_prefix_tokens)


def _forward_results(tokens, fc1_weight, num_prefix_tokens, save_hidden, save_branch) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of `cvfm_forward`, real or fake."""
    tiles, length, width = tokens.shape
    rows = tiles * (length - num_prefix_tokens)
    return (
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
        fc1_weight.new_empty((rows, fc1_weight.shape[0]) if save_hidden else (0,)),
        fc1_weight.new_empty((rows, width) if save_branch else (0,)),
    )


def _backward_results(inputs: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Uninitialised results of `cvfm_backward`, real or fake."""
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format) if need else like.new_empty((0,))
        for like, need in zip(inputs, needs, strict=True)
    ]


def _no_autocast(device: torch.device):
    """Operands were cast at the public edge, all but the tokens; inside an op nothing is cast again."""
    return torch.autocast(device.type, enabled=False)


def _checked_boxes(boxes, image_index, images):
    validation.check_values(boxes, image_index, images)
    return boxes.clone()


def _checked_boxes_fake(boxes, image_index, images):
    return torch.empty_like(boxes)


def _crop_resize(features, boxes, image_index, size, backend="auto"):
    validation.check_values(boxes, image_index, features.shape[0])
    name, _ = dispatch.resolve(backend, None, features.device, features.dtype)
    if boxes.shape[0] == 0 or features.numel() == 0:
        return _crop_resize_fake(features, boxes, image_index, size).zero_()
    return dispatch.implementation(name).crop_resize(features, boxes, image_index, size)


def _crop_resize_fake(features, boxes, image_index, size, backend="auto"):
    return features.new_empty((boxes.shape[0], size, size, features.shape[3]))


def _crop_resize_backward(grad, boxes, image_index, images, height, width, backend="auto"):
    name, _ = dispatch.resolve(backend, None, grad.device, grad.dtype)
    if grad.numel() == 0:
        return grad.new_zeros((images, height, width, grad.shape[3]))
    return dispatch.implementation(name).crop_resize_backward(grad, boxes, image_index, (images, height, width))


def _crop_resize_backward_fake(grad, boxes, image_index, images, height, width, backend="auto"):
    return grad.new_empty((images, height, width, grad.shape[3]))


def _cvfm_forward(
    tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
    num_prefix_tokens, gate, plan, save_hidden, save_branch, backend="auto",
):  # fmt: skip
    shape = shape_of(tokens, features, fc1_weight, num_prefix_tokens)
    validation.check_values(boxes, image_index, shape.images)
    chosen = planner.choose(shape, fc1_weight.dtype, tokens.device, plan or None, backend)
    if tokens.numel() == 0:
        return _forward_results(tokens, fc1_weight, num_prefix_tokens, save_hidden, save_branch)
    hidden = fc1_weight.new_empty((shape.samples, shape.hidden_width) if save_hidden else (0,))
    branch = fc1_weight.new_empty((shape.samples, shape.token_width) if save_branch else (0,))
    inputs = (tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha)
    with _no_autocast(tokens.device):
        out = dispatch.implementation(chosen.forward_backend).forward(
            Call(*inputs, shape, gate, chosen), hidden if save_hidden else None, branch if save_branch else None
        )
    return out, hidden, branch


def _cvfm_forward_fake(
    tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
    num_prefix_tokens, gate, plan, save_hidden, save_branch, backend="auto",
):  # fmt: skip
    return _forward_results(tokens, fc1_weight, num_prefix_tokens, save_hidden, save_branch)


def _cvfm_backward(
    grad, tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha, hidden, branch,
    num_prefix_tokens, gate, plan, needs, backend="auto",
):  # fmt: skip
    likes = [tokens, features, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha]
    shape = shape_of(tokens, features, fc1_weight, num_prefix_tokens)
    chosen = planner.choose(shape, fc1_weight.dtype, tokens.device, plan or None, backend)
    if tokens.numel() == 0:
        return tuple(result.zero_() for result in _backward_results(likes, needs))
    inputs = (tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha)
    with _no_autocast(tokens.device):
        results = dispatch.implementation(chosen.backward_backend).backward(
            Call(*inputs, shape, gate, chosen), grad, hidden if hidden.dim() == 2 else None,
            branch if branch.dim() == 2 else None, Needs(*needs),
        )  # fmt: skip
    return tuple(
        like.new_empty((0,)) if result is None else result for result, like in zip(results, likes, strict=True)
    )


def _cvfm_backward_fake(
    grad, tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha, hidden, branch,
    num_prefix_tokens, gate, plan, needs, backend="auto",
):  # fmt: skip
    inputs = [tokens, features, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha]
    return tuple(_backward_results(inputs, needs))


_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {
    "checked_boxes": (_checked_boxes, _checked_boxes_fake),
    "crop_resize": (_crop_resize, _crop_resize_fake),
    "crop_resize_backward": (_crop_resize_backward, _crop_resize_backward_fake),
    "cvfm_forward": (_cvfm_forward, _cvfm_forward_fake),
    "cvfm_backward": (_cvfm_backward, _cvfm_backward_fake),
}


class _Once(torch.autograd.function._SingleLevelFunction):
    """Refuses to differentiate results. Of one level: `torch.func` calls it as it calls any operator's own kernel."""

    @staticmethod
    def forward(ctx: Any, run: Callable, *arguments: Any) -> Any:
        with torch.enable_grad():  # for what lies beneath this level: an outer `torch.func.grad`
            return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument, level=0).tangent is not None


def _under_autograd(operator: torch._ops.OpOverload) -> Callable:
    """The kernel of a call that autograd watches: a derivative that nobody wrote must not be lost in silence."""

    def kernel(keyset, *arguments):
        def run(*arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise RuntimeError(NO_FORWARD_MODE)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            with enable_single_level_autograd_function():
                return _Once.apply(run, *arguments)  # type: ignore[attr-defined]
        return run(*arguments)

    return kernel


def for_each(function: Callable, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The rule of `vmap` for a function of tensors and plain values: one call for each entry of the batch."""

    def entry(i: int) -> list[Any]:
        return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)]

    results = [function(*entry(i)) for i in range(info.batch_size)]
    if not results:
        raise RuntimeError("fila_kernels: vmap over an empty batch is not implemented")
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _register(name: str) -> None:
    implementation, fake = _IMPLEMENTATIONS[name]
    _LIBRARY.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _under_autograd(operator), "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(
        f"{NAMESPACE}::{name}", lambda info, in_dims, *args: for_each(operator, info, in_dims, *args), lib=_LIBRARY
    )


for _name in _SCHEMAS:
    _register(_name)
