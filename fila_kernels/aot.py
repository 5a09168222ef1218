"""Decompositions for torch.export, with which an exported graph calls the native library and runs without Python.

The operators of namespace `fila_kernels` are registered in Python, so a C++ process has none of them. Those of `fila`
come with libfila_kernels.so. A process that loads the library (`dlopen` is enough) runs what was exported like this::

    with torch.no_grad():
        exported = torch.export.export(module, arguments, dynamic_shapes=...)
    exported = exported.run_decompositions(fila_kernels.aot.decompositions())
    torch._inductor.aoti_compile_and_package(exported, package_path="module.pt2")

The plan is fixed at export, from the sizes of the example arguments where sizes are dynamic; every plan is exact, so it
serves all sizes. Values of boxes and indices are not checked, as in any compiled graph; any value is safe.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fila_kernels import dispatch, ops, planner
from fila_kernels.backends import native
from fila_kernels.backends.native import library
from fila_kernels.call import Shape


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The table that `ExportedProgram.run_decompositions` takes: `fila_kernels`' operators to the native library's.

    It holds `cvfm` and `crop_resize` of the backend `native`, forward.

    Raises:
        RuntimeError: the native library is not there. While the table is applied: the graph was exported with gradients
            on or for another backend, or the library does not serve its dtype or device.

    Example:
        >>> from fila_kernels import crop_resize
        >>> class Sampler(torch.nn.Module):
        ...     def forward(self, maps, boxes, image_index):
        ...         return crop_resize(maps, boxes, image_index, 2)
        >>> arguments = torch.ones(1, 4, 4, 3), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
        >>> exported = torch.export.export(Sampler(), arguments).run_decompositions(decompositions())
        >>> [node.target for node in exported.graph.nodes if node.op == "call_function"]
        [<OpOverload(op='fila.crop_resize', overload='default')>]
    """
    loaded, reason = library.load()
    if not loaded:
        raise RuntimeError(f"exported graphs call the native library, which is {reason}")
    own = getattr(torch.ops, ops.NAMESPACE)
    return {
        own.crop_resize.default: _crop_resize,
        own.cvfm_forward.default: _cvfm_forward,
    }


def _require_native(tensor: Tensor, backend: str, dtype: torch.dtype) -> None:
    if backend not in ("native", dispatch.AUTO):
        raise RuntimeError(f"expected a graph exported with backend 'native', which C++ can run, got {backend!r}")
    if tensor.device.type != "cpu":
        raise RuntimeError(f"this graph cannot leave Python: expected CPU tensors, got {tensor.device}")
    usable, reason = dispatch.available("native", tensor.device, dtype)
    if not usable:
        raise RuntimeError(f"this graph cannot leave Python: {reason}")


def _example(size: int | torch.SymInt) -> int:
    """A size of the example arguments: what a symbol stood for when it was traced."""
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise RuntimeError(f"expected sizes known from the example arguments, got {size}; name a plan for this module")
    return int(size.node.hint)


def _crop_resize(features, boxes, image_index, size, backend="auto"):  # type: ignore[no-untyped-def]
    _require_native(features, backend, features.dtype)
    return torch.ops.fila.crop_resize(native.dense_channels(features), boxes, image_index, size, check_values=False)


def _cvfm_forward(  # type: ignore[no-untyped-def]
    tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
    num_prefix_tokens, gate, plan, save_hidden, save_branch, backend="auto",
):  # fmt: skip
    _require_native(tokens, backend, fc1_weight.dtype)
    if save_hidden or save_branch:
        raise RuntimeError("expected a graph exported under torch.no_grad(), got one that keeps tensors for a gradient")
    sizes = [[_example(size) for size in tensor.shape] for tensor in (tokens, features, fc1_weight)]
    shape = Shape.of(sizes[0], sizes[1], sizes[2][0], num_prefix_tokens)
    # Under autocast the tokens have a dtype of their own; products and plan go by the weights'.
    chosen = planner.choose(shape, fc1_weight.dtype, tokens.device, plan or None, "native").forward
    out = torch.ops.fila.cvfm(
        tokens, native.dense_channels(features), boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
        num_prefix_tokens, gate, chosen, check_values=False,
    )  # fmt: skip
    return out, fc1_weight.new_empty((0,)), fc1_weight.new_empty((0,))
