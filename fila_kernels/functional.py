"""The public functions: they validate their arguments once, at the edge."""

import torch
from torch import Tensor

from fila_kernels import autograd, dispatch, ops, planner, reference
from fila_kernels.call import DIRECTIONS, Shape
from fila_kernels.validation import (
    check_crop_resize,
    check_cvfm,
    check_explain,
    check_plan,
    check_settings,
    check_tensors,
)

NAMES = (
    "tokens", "features", "boxes", "image_index", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "alpha",
)  # fmt: skip


def _checked_boxes(features: Tensor, boxes: Tensor, image_index: Tensor) -> Tensor:
    """The boxes for the definition, checked by an operator: a compiler would drop a check in Python."""
    return getattr(torch.ops, ops.NAMESPACE).checked_boxes(boxes.detach(), image_index, features.shape[0])


def crop_resize(
    features: Tensor, boxes: Tensor, image_index: Tensor, size: int, *, backend: str | None = None
) -> Tensor:
    """Crop a box from each tile's feature map and resize it bilinearly, reading only the cells that count.

    Args:
        features: [B, h, w, C] channels-last maps; an NCHW tensor in `channels_last` memory, permuted, is read as it is.
        boxes: [T, 4] float32 y0, x0, y1, x1 in cells, cell i spanning [i, i + 1); fractions allowed. No gradient.
        image_index: [T] int32 or int64, the map each box is cut from.
        size: samples per side of the result.
        backend: "reference", "eager", "native", "triton", or None or "auto" for the first that can run; see
            `fila_kernels.dispatch`.

    Returns:
        [T, size, size, C] in the dtype of `features`, a new contiguous tensor.

    Raises:
        ValueError: a wrong type, shape, dtype or device; on CPU, and on a GPU after `check_gpu_values()`, a non-finite
            or inverted box or an index out of range.
        RuntimeError: a backend that was asked for cannot run.

    On whole-cell boxes this equals, for each tile::

        F.interpolate(maps[image_index[t], :, y0:y1, x0:x1][None], size=(size, size), mode="bilinear")

    A box off the map reads the border cell. Differentiable once, by `features`, in reverse mode; the backward pass is
    deterministic. `torch.func.grad` and `vmap` work (`vmap` as a loop); forward mode is refused.
    Source: the crop and resize of FILA (arXiv 2412.08378, section 3); half-pixel bilinear is our choice.

    Example:
        >>> maps = torch.arange(16.0).view(1, 4, 4, 1)
        >>> boxes, image_index = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
        >>> crop_resize(maps, boxes, image_index, 2).flatten().tolist()
        [2.5, 4.5, 10.5, 12.5]
    """
    check_crop_resize(features, boxes, image_index, size)
    name, _ = dispatch.requested(backend)
    if name == "reference":
        return reference.crop_resize(features, _checked_boxes(features, boxes, image_index), image_index, size)
    return autograd.crop_resize(features, boxes, image_index, size, name)


def cvfm(
    tokens: Tensor,
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    alpha: Tensor,
    *,
    num_prefix_tokens: int = 1,
    gate: str = "product",
    plan: str | None = None,
    backend: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """ConvNeXt-ViT deep fusion: add to each patch token what an MLP makes of it and its region of a feature map.

    B images, T tiles, P prefix tokens, N = G * G patch tokens, D, C and H widths. Put all tiles of a map into one call:
    the backward pass then writes the features' gradient once, where autograd would add up a whole map per call.

    Args:
        tokens: [T, P + N, D]; any stride, the last one 1. The first P tokens pass through.
        features: [B, h, w, C] channels-last maps; a permuted NCHW tensor in `channels_last` memory is read as it is.
        boxes: [T, 4] float32 y0, x0, y1, x1 in cells of the map, cell i spanning [i, i + 1). No gradient.
        image_index: [T] int32 or int64, the image each tile came from, in any order.
        fc1_weight, fc1_bias: [H, D + C] and [H]. fc2_weight, fc2_bias: [D, H] and [D].
        alpha: [1], the gate. All float tensors but `boxes` share one dtype and device.
        num_prefix_tokens: P.
        gate: "product" for tanh(alpha * M), "scale" for tanh(alpha) * M.
        plan: "sample_first", "project_first", "single_pass" (triton: D and H up to 512; native: both 1024, on a GPU of
            compute capability 9.0), or None to let the planner choose; see `explain`.
        backend: "reference", "eager", "native", "triton", or None or "auto" for the first that can run: triton, native,
            eager on CUDA tensors, else native, eager.
        recompute: save nothing but the inputs for the backward pass and compute the MLP again there.

    Returns:
        [T, P + N, D], a new contiguous tensor in the dtype of `tokens`.

    Raises:
        ValueError: a wrong type, shape, dtype or device; on CPU, and on a GPU after `check_gpu_values()`, a non-finite
            or inverted box or an index out of range.
        RuntimeError: a backend or plan that was asked for cannot run.

    Equivalent to::

        x = tokens[:, P:]
        s = crop_resize(features, boxes, image_index, G).flatten(1, 2)
        m = F.linear(F.gelu(F.linear(torch.cat([x, s], -1), fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        out = torch.cat([tokens[:, :P], x + torch.tanh(alpha * m)], 1)

    except that a gate of zero silences a non-finite m instead of making NaN: the result is then `tokens`, everything
    inside the branch gets a gradient of zero, and alpha's gradient counts the finite entries of m. At other alpha an
    infinite m has saturated the product gate and adds nothing to alpha's gradient; a NaN stays one.

    Under autocast the float tensors but `tokens` are cast to the autocast dtype, as `F.linear` does. The residual is
    added in the tokens' own dtype, which the result and its gradient have; fc1 reads the tokens rounded.
    Differentiable once, by all float tensors but `boxes`, in reverse mode; the backward pass is deterministic and uses
    no atomics. `torch.func.grad` and `vmap` work (`vmap` as a loop); forward mode and double backward are refused.
    Source: FILA, arXiv 2412.08378, section 3; what the paper leaves open is listed in the project's docs.

    Example:
        >>> tokens, features = torch.randn(2, 1 + 16, 8), torch.randn(1, 12, 12, 6)
        >>> boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0], [0.5, 0.0, 11.5, 12.0]])
        >>> image_index = torch.tensor([0, 0])
        >>> mlp = torch.randn(10, 14), torch.randn(10), torch.randn(8, 10), torch.randn(8)
        >>> out = cvfm(tokens, features, boxes, image_index, *mlp, torch.tensor([0.5]))
        >>> out.shape
        torch.Size([2, 17, 8])
        >>> torch.equal(out[:, 0], tokens[:, 0])
        True
    """
    inputs = (tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha)
    check_tensors(NAMES, inputs)
    check_settings(gate, plan, recompute)
    dtype = tokens.dtype
    if tokens.device.type != "meta" and torch.is_autocast_enabled(tokens.device.type):
        low = torch.get_autocast_dtype(tokens.device.type)
        dtype = dtype if dtype == torch.float64 else low
        features, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha = (
            tensor if tensor.dtype == torch.float64 else tensor.to(low)
            for tensor in (features, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha)
        )
    inputs = (tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha)
    check_cvfm(*inputs, num_prefix_tokens=num_prefix_tokens, dtype=dtype)
    name, _ = dispatch.requested(backend)
    if name == "reference":
        boxes = _checked_boxes(features, boxes, image_index)
        inputs = (tokens, features, boxes, *inputs[3:])
        return reference.cvfm(*inputs, num_prefix_tokens=num_prefix_tokens, gate=gate)
    return autograd.cvfm(inputs, num_prefix_tokens, gate, plan or "", recompute, name)


def explain(
    tokens: tuple[int, ...] | torch.Size,
    features: tuple[int, ...] | torch.Size,
    hidden_width: int | None = None,
    *,
    num_prefix_tokens: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    plan: str | None = None,
    backend: str | None = None,
) -> dict[str, dict[str, str]]:
    """The plan and backend that `cvfm` would use for each direction, and why.

    Args:
        tokens: the shape [T, P + N, D]. features: the shape [B, h, w, C]. hidden_width: H, D if None.
        num_prefix_tokens, plan, backend: as given to `cvfm`. dtype, device: of the tensors.

    Returns:
        {"backend" | "forward" | "weight_gradient" | "feature_gradient": {"choice": ..., "why": ...}}

    Raises:
        ValueError: a shape, dtype or name that `cvfm` would refuse. RuntimeError: a plan or backend that cannot be had.

    Example:
        >>> explain((5, 577, 1024), (1, 24, 24, 1536))["forward"]["choice"]
        'project_first'
        >>> explain((5, 577, 1024), (1, 384, 384, 192))["forward"]["choice"]
        'sample_first'
    """
    check_explain(tokens, features, hidden_width, dtype, num_prefix_tokens)
    check_plan(plan)
    shape = Shape.of(tokens, features, hidden_width, num_prefix_tokens)
    device = torch.device(device)
    name, why = dispatch.resolve(backend, plan, device, dtype, (shape.token_width, shape.hidden_width))
    report = {"backend": {"choice": name, "why": why}}
    if name == "reference":
        return report | {d: {"choice": "reference", "why": "the definition has no plans"} for d in DIRECTIONS}
    chosen = planner.choose(shape, dtype, device, plan, name)
    return report | {d: {"choice": getattr(chosen, d), "why": chosen.reasons[d]} for d in DIRECTIONS}
