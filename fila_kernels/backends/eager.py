"""The `torch` backend: the operation as few, large PyTorch calls; runs on any device.

Letters: T tiles, N patch tokens a tile, D token width, C feature channels, H hidden width. Sampling and its transpose
are weighted bags of rows (`embedding_bag`), which read each tap once, accumulate in float32 and write each row once.
The first linear layer is two GEMMs into one buffer, so that [X ; S] is never built. Rows go through in chunks of whole
tiles, which keeps the hidden activation in cache and the extra memory small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.planner import Plan, Shape
from fila_kernels.sampling import Bags, cell_bags, sample_bags, tile_slice


def sum_bags(source: Tensor, bags: Bags) -> Tensor:
    """Weighted sums of rows of `source` [rows, width]."""
    if bags.row.numel() == 0 or source.shape[1] == 0:
        return source.new_zeros(bags.offset.numel() - 1, source.shape[1])
    return torch.embedding_bag(
        source, bags.row, bags.offset, scale_grad_by_freq=False, mode=0, sparse=False,
        per_sample_weights=bags.weight, include_last_offset=True,
    )[0]  # fmt: skip


def map_rows(features: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The map [B, h, w, C] as rows [R, C] and the strides in rows of B, h and w, without a copy where that can be."""
    _, height, width, channels = features.shape
    strides = features.stride()
    dense_cells = strides[3] == 1 and strides[2] == channels
    if channels and dense_cells and strides[0] % channels == 0 and strides[1] % channels == 0:
        rows = sum((n - 1) * s for n, s in zip(features.shape[:3], strides[:3], strict=True)) // channels + 1
        return features.as_strided((rows, channels), (channels, 1)), (strides[0] // channels, strides[1] // channels, 1)
    return features.reshape(-1, channels), (height * width, width, 1)


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """[B, h, w, C] to [T, size, size, C]."""
    rows, strides = map_rows(features)
    bags = sample_bags(boxes, image_index, size, strides, tuple(features.shape[:3]), features.dtype)
    return sum_bags(rows, bags).view(boxes.shape[0], size, size, features.shape[3])


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[T, size, size, C] to [B, h, w, C]: each cell gathers from the samples that read it."""
    images, height, width = shape
    strides = (height * width, width, 1)
    samples = sample_bags(boxes, image_index, grad.shape[1], strides, shape, grad.dtype)
    rows = grad.reshape(-1, grad.shape[3])
    return sum_bags(rows, cell_bags(samples, images * height * width)).view(images, height, width, grad.shape[3])


def rows_per_chunk(device: torch.device, num_rows: int) -> int:
    """About as many rows as fill the CPU's matmul; a GPU takes all at once."""
    return 512 if device.type == "cpu" else num_rows


class _Hidden:
    """Writes fc1's result before the activation, Z [rows, H], for any range of tiles."""

    def __init__(
        self, tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
        fc1_weight: Tensor, fc1_bias: Tensor, shape: Shape, plan: str,
    ) -> None:  # fmt: skip
        self.tokens, self.shape = tokens[:, shape.prefix :], shape
        self.weight_x, self.weight_s = fc1_weight[:, : shape.token_width].t(), fc1_weight[:, shape.token_width :].t()
        self.bias = fc1_bias
        self.projected = plan == "project_first"
        maps = (shape.images, shape.height, shape.width)
        if self.projected:
            # R(F) W' = R(F W'), and a constant passes through R unchanged: bilinear weights sum to one.
            self.source = torch.addmm(fc1_bias, features.reshape(-1, shape.feature_width), self.weight_s)
            strides = (shape.height * shape.width, shape.width, 1)
        else:
            self.source, strides = map_rows(features)
        self.bags = sample_bags(boxes, image_index, shape.grid, strides, maps, features.dtype)
        self.bounds: list[int] | None = None

    def patches(self, first: int, last: int) -> Tensor:
        """X [rows, D]; a view where one tile or no prefix token makes the rows flat."""
        return self.tokens[first:last].reshape(-1, self.shape.token_width)

    def sampled(self, first: int, last: int) -> Tensor:
        """S [rows, C], or the interpolated projection [rows, H]."""
        if last - first == self.shape.tiles:
            return sum_bags(self.source, self.bags)
        if self.bounds is None:
            self.bounds = self.bags.offset[:: self.shape.grid**2].tolist()
        return sum_bags(self.source, tile_slice(self.bags, first, last, self.bounds, self.shape.grid))

    def __call__(self, first: int, last: int, out: Tensor) -> Tensor:
        sampled = self.sampled(first, last)
        if self.projected:
            return torch.addmm(sampled, self.patches(first, last), self.weight_x, out=out)
        torch.addmm(self.bias, self.patches(first, last), self.weight_x, out=out)
        return out.addmm_(sampled, self.weight_s)


def _closed(alpha: Tensor) -> bool:
    """Whether the gate is known to be shut. Looking would synchronise a GPU, where masks do the same."""
    return alpha.device.type == "cpu" and not bool(alpha.count_nonzero())


def _silence(branch: Tensor, alpha: Tensor) -> Tensor:
    """A zero gate times a non-finite entry is nothing, not NaN."""
    return branch.masked_fill(~torch.isfinite(branch) & (alpha == 0), 0)


def forward(
    tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor,
    *, shape: Shape, gate: str, plan: Plan, hidden: Tensor | None, branch: Tensor | None,
) -> Tensor:  # fmt: skip
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    out[:, : shape.prefix] = tokens[:, : shape.prefix]
    if _closed(alpha) and hidden is None and branch is None:
        return out.copy_(tokens)
    num_patches = shape.grid * shape.grid
    step = max(1, rows_per_chunk(tokens.device, shape.samples) // num_patches)
    first_layer = _Hidden(tokens, features, boxes, image_index, fc1_weight, fc1_bias, shape, plan.forward)
    rows = min(step, shape.tiles) * num_patches
    z_scratch = tokens.new_empty(rows, shape.hidden_width) if hidden is None else None
    a_scratch = tokens.new_empty(rows, shape.hidden_width) if hidden is not None else None
    m_scratch = tokens.new_empty(rows, shape.token_width)
    for first in range(0, shape.tiles, step):
        last = min(first + step, shape.tiles)
        here = slice(first * num_patches, last * num_patches)
        count = here.stop - here.start
        z = first_layer(first, last, hidden[here] if hidden is not None else z_scratch[:count])
        a = torch.ops.aten.gelu.out(z, out=a_scratch[:count] if a_scratch is not None else z)
        m = torch.addmm(fc2_bias, a, fc2_weight.t(), out=branch[here] if branch is not None else m_scratch[:count])
        _add_gated(tokens, out, m, alpha, gate, slice(first, last), shape, m_scratch[:count])
    return out


def _add_gated(
    tokens: Tensor, out: Tensor, m: Tensor, alpha: Tensor, gate: str, tiles: slice, shape: Shape, scratch: Tensor
) -> None:
    """out = X + gate(M) for the patch tokens of some tiles."""
    if _closed(alpha):
        out[tiles] = tokens[tiles]
        return
    if alpha.device.type != "cpu":
        m = _silence(m, alpha)
    gated = torch.mul(m, alpha, out=scratch).tanh_() if gate == "product" else torch.mul(m, alpha.tanh(), out=scratch)
    patches = tokens[tiles, shape.prefix :]
    torch.add(patches, gated.view(patches.shape), out=out[tiles, shape.prefix :])


def _sum_product(left: Tensor, right: Tensor) -> Tensor:
    """sum(left * right), accumulated in at least float32."""
    accumulate = torch.promote_types(left.dtype, torch.float32)
    return (left * right).sum(dtype=accumulate)


def backward(
    grad: Tensor, tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor,
    hidden: Tensor | None, branch: Tensor | None, *, shape: Shape, gate: str, plan: Plan, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha; None where not needed."""
    need_x, need_f, need_w1, need_b1, need_w2, need_b2, need_alpha = needs
    results: list[Tensor | None] = [None] * 7
    patch_grad = grad[:, shape.prefix :].reshape(-1, shape.token_width)
    closed = _closed(alpha)
    need_inner = need_x or need_f or need_w1 or need_b1
    first_layer = None
    if need_w1 or hidden is None:
        first_layer = _Hidden(tokens, features, boxes, image_index, fc1_weight, fc1_bias, shape, plan.forward)
    recompute_branch = gate == "product" or closed
    if hidden is None and (need_inner or need_w2 or need_alpha) and not (closed and not need_alpha):
        hidden = first_layer(0, shape.tiles, tokens.new_empty(shape.samples, shape.hidden_width))
    activated = F.gelu(hidden) if hidden is not None and (need_w2 or branch is None) else None
    if branch is None and recompute_branch and activated is not None:
        branch = torch.addmm(fc2_bias, activated, fc2_weight.t())

    if closed:
        # The branch is off: everything inside it gets exactly zero, only alpha feels M.
        if need_alpha:
            m = branch.masked_fill(~torch.isfinite(branch), 0)
            results[6] = _sum_product(patch_grad, m).to(alpha.dtype).reshape(alpha.shape)
        results[0] = grad.clone(memory_format=torch.contiguous_format) if need_x else None
        for slot, (need, like) in enumerate(
            zip(needs[1:6], (features, fc1_weight, fc1_bias, fc2_weight, fc2_bias), strict=True), start=1
        ):
            results[slot] = torch.zeros_like(like, memory_format=torch.contiguous_format) if need else None
        return results

    if gate == "product":
        slope = torch.ops.aten.tanh_backward(patch_grad, torch.mul(branch, alpha).tanh_())
        if need_alpha:
            results[6] = _alpha_gradient(slope, branch, alpha)
        branch_grad = slope.mul_(alpha)  # dM = alpha (1 - tanh^2) dY
        inner_scale = None
    else:
        branch_grad, inner_scale = patch_grad, alpha.tanh()
    if need_b2:
        results[5] = branch_grad.sum(0)
    if need_w2:
        results[4] = branch_grad.t() @ activated  # dW2 = dM' A
    if need_inner or (need_alpha and gate == "scale"):
        hidden_grad = branch_grad @ fc2_weight  # dA = dM W2
        if need_alpha and gate == "scale":
            # sum dY M = sum (dY W2) A + sum dY b2, so that M is needed neither saved nor again.
            activated = activated if activated is not None else F.gelu(hidden)
            total = _sum_product(hidden_grad, activated) + _sum_product(branch_grad.sum(0), fc2_bias)
            results[6] = (total * (1 - inner_scale.to(total.dtype) ** 2)).to(alpha.dtype).reshape(alpha.shape)
    if inner_scale is not None:
        results[4] = results[4].mul_(inner_scale) if need_w2 else None
        results[5] = results[5].mul_(inner_scale) if need_b2 else None
        hidden_grad = hidden_grad.mul_(inner_scale) if need_inner else None
    if need_inner:
        del activated
        inner = torch.ops.aten.gelu_backward(hidden_grad, hidden)  # dZ
        del hidden_grad
        if need_b1:
            results[3] = inner.sum(0)
        if need_x:
            result = grad.clone(memory_format=torch.contiguous_format)
            result[:, shape.prefix :] += (inner @ fc1_weight[:, : shape.token_width]).view(
                shape.tiles, -1, shape.token_width
            )
            results[0] = result
        _feature_side(results, inner, first_layer, tokens, features, boxes, image_index, fc1_weight, shape, plan, needs)
    if alpha.device.type != "cpu":
        for slot in range(1, 6):
            if results[slot] is not None:
                results[slot] = results[slot].masked_fill(alpha == 0, 0)
        if need_x:
            results[0] = torch.where(alpha == 0, grad, results[0])
    return results


def _alpha_gradient(slope: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """sum (1 - tanh^2) dY M; see `reference.gated` for what non-finite entries count."""
    total = _sum_product(slope, branch)
    if alpha.device.type != "cpu" or not bool(torch.isfinite(total)):
        quiet = torch.isinf(branch) | (torch.isnan(branch) & (alpha == 0))
        total = _sum_product(slope, branch.masked_fill(quiet, 0))
    return total.to(alpha.dtype).reshape(alpha.shape)


def _feature_side(
    results: list, inner: Tensor, first_layer: _Hidden | None, tokens: Tensor, features: Tensor, boxes: Tensor,
    image_index: Tensor, fc1_weight: Tensor, shape: Shape, plan: Plan, needs: list[bool],
) -> None:  # fmt: skip
    """Gradients of fc1's weight and of the features from dZ [rows, H]."""
    need_f, need_w1 = needs[1], needs[2]
    maps = (shape.images, shape.height, shape.width)
    weight_s = fc1_weight[:, shape.token_width :]
    gathered = None
    if (need_f and plan.feature_gradient == "project_first") or (need_w1 and plan.weight_gradient == "project_first"):
        square = inner.view(shape.tiles, shape.grid, shape.grid, shape.hidden_width)
        gathered = crop_resize_backward(square, boxes, image_index, maps).flatten(0, 2)  # dP = R' dZ
    if need_w1:
        weight_grad = torch.empty_like(fc1_weight, memory_format=torch.contiguous_format)
        torch.mm(inner.t(), first_layer.patches(0, shape.tiles), out=weight_grad[:, : shape.token_width])
        if plan.weight_gradient == "project_first":
            right, left = features.reshape(-1, shape.feature_width), gathered  # dW1s = dP' F
        else:
            right, left = crop_resize(features, boxes, image_index, shape.grid).flatten(0, 2), inner  # dW1s = dZ' S
        torch.mm(left.t(), right, out=weight_grad[:, shape.token_width :])
        results[2] = weight_grad
    if need_f:
        if plan.feature_gradient == "project_first":
            results[1] = (gathered @ weight_s).view(features.shape)  # dF = dP W1s
        else:
            sampled_grad = (inner @ weight_s).view(shape.tiles, shape.grid, shape.grid, shape.feature_width)
            results[1] = crop_resize_backward(sampled_grad, boxes, image_index, maps)
