"""Composes the operation of few, large matrix products by torch, around another backend's sampling steps.

`eager` and `native` share this composition. Letters: T tiles, N patch tokens per tile, D token width, C feature
channels, H hidden width.

The forward pass takes rows in chunks of whole tiles, so that the hidden activation stays in cache and the extra memory
small. [X ; S] exists for one chunk at a time; two products into one buffer take as long, and round the sum twice. The
backward pass is deterministic: one writer per element, and saved tensors are only read. Beside the results it holds two
buffers of [T * N, max(D, H)]: dM, and A, which dZ overwrites chunk by chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fila_kernels.call import Call, Needs

CHUNK_BYTES = 2 * 2**20


class Steps(NamedTuple):
    """The sampling and gate functions that a backend supplies to this composition."""

    # (maps [B, h, w, W], call) to a function of (first tile, last tile), which gives their samples [rows, W].
    sampler: Callable[[Tensor, Call], Callable[[int, int], Tensor]]
    # (grad [T, G, G, W], boxes, image_index, (B, h, w)) to [B, h, w, W].
    crop_resize_backward: Callable[[Tensor, Tensor, Tensor, tuple[int, int, int]], Tensor]
    # (call, dY [rows, D], M, dM to fill, whether alpha needs a gradient) to the rows' part of that gradient.
    gate_backward: Callable[[Call, Tensor, Tensor, Tensor, bool], Tensor | None]


def on_cpu(call: Call) -> bool:
    return call.tokens.device.type == "cpu"


def closed(call: Call) -> bool:
    """Whether the gate is known to be shut. Looking would synchronise a GPU, where masks do the same."""
    return on_cpu(call) and not bool(call.alpha.count_nonzero())


def patch_rows(call: Call, tokens: Tensor, first: int, last: int) -> Tensor:
    """Patch rows [rows, D] of tiles [first, last): a view where one tile or no prefix makes them flat."""
    return tokens[first:last, call.shape.prefix :].reshape(-1, call.shape.token_width)


def tiles_per_chunk(call: Call) -> int:
    """The number of tiles whose hidden activation fits a CPU's second-level caches; on a GPU, all of them."""
    if not on_cpu(call):
        return call.shape.tiles
    return max(1, CHUNK_BYTES // (call.shape.patches * call.shape.hidden_width * call.dtype.itemsize))


def chunks(call: Call) -> Iterator[tuple[int, int, slice]]:
    """(first tile, last tile, rows) of each chunk."""
    step, patches = tiles_per_chunk(call), call.shape.patches
    for first in range(0, call.shape.tiles, step):
        last = min(first + step, call.shape.tiles)
        yield first, last, slice(first * patches, last * patches)


def chunk_scratch(call: Call, width: int) -> Tensor:
    """Uninitialised rows for one chunk."""
    return call.fc1_weight.new_empty(min(tiles_per_chunk(call), call.shape.tiles) * call.shape.patches, width)


class FirstLayer:
    """fc1 before its activation, Z [rows, H], for any range of tiles."""

    def __init__(self, call: Call, steps: Steps) -> None:
        self.call, shape = call, call.shape
        self.projected = call.plan.forward == "project_first"
        maps = call.features
        if self.projected:
            # R(F) W' = R(F W'), and a constant passes through R unchanged: bilinear weights sum to one.
            cells = call.features.reshape(-1, shape.feature_width)
            projection = torch.addmm(call.fc1_bias, cells, call.weight_s.t())
            maps = projection.view(shape.images, shape.height, shape.width, shape.hidden_width)
        else:
            self.joint = chunk_scratch(call, shape.token_width + shape.feature_width)
        self.sampled = steps.sampler(maps, call)  # S [rows, C], or the interpolated projection [rows, H]

    def __call__(self, first: int, last: int, out: Tensor) -> Tensor:
        call, width = self.call, self.call.shape.token_width
        if self.projected:
            # Below float32 the projection and its interpolation are rounded once each on their way.
            patches = patch_rows(call, call.tokens, first, last).to(call.dtype)
            return torch.addmm(self.sampled(first, last), patches, call.weight_x.t(), out=out)
        joint = self.joint[: out.shape[0]]
        patches = call.tokens[first:last, call.shape.prefix :]
        joint[:, :width].view(patches.shape).copy_(patches)
        joint[:, width:] = self.sampled(first, last)
        return torch.addmm(call.fc1_bias, joint, call.fc1_weight.t(), out=out)


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None, steps: Steps) -> Tensor:
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    tokens, shape = call.tokens, call.shape
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    shut = closed(call)
    passing = None if shut else shape.prefix
    out[:, :passing] = tokens[:, :passing]
    if shut and hidden is None and branch is None:
        return out
    first_layer = FirstLayer(call, steps)
    z_scratch = chunk_scratch(call, shape.hidden_width) if hidden is None else None
    a_scratch = chunk_scratch(call, shape.hidden_width) if hidden is not None else z_scratch
    m_scratch = chunk_scratch(call, shape.token_width)
    assert a_scratch is not None
    for first, last, rows in chunks(call):
        count = rows.stop - rows.start
        z = first_layer(first, last, hidden[rows] if hidden is not None else a_scratch[:count])
        a = torch.ops.aten.gelu.out(z, out=a_scratch[:count])
        m = torch.addmm(
            call.fc2_bias, a, call.fc2_weight.t(), out=branch[rows] if branch is not None else m_scratch[:count]
        )
        if not shut:
            patches = tokens[first:last, shape.prefix :]
            torch.add(patches, _gated(m, call).view(patches.shape), out=out[first:last, shape.prefix :])
    return out


def _gated(m: Tensor, call: Call) -> Tensor:
    """tanh(alpha M) or tanh(alpha) M in at least float32, so that only the sum with the tokens is rounded."""
    if not on_cpu(call):
        # A zero gate times a non-finite entry is nothing, not NaN.
        m = m.masked_fill(~torch.isfinite(m) & (call.alpha == 0), 0)
    if call.gate == "scale":
        return m * wide(call.alpha).tanh()
    if m.dtype in (torch.float32, torch.float64):
        return torch.mul(m, call.alpha).tanh_()
    # tanh(u) = 2 sigmoid(2 u) - 1: three times as fast on a CPU, and exact to float32's rounding of 1, far below the
    # last bit that a low-precision output holds.
    sigmoid = gate_sigmoid(m, call)
    return torch.add(sigmoid.new_tensor(-1.0), sigmoid, alpha=2, out=sigmoid)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gate_sigmoid(m: Tensor, call: Call) -> Tensor:
    """sigmoid(2 alpha M) in at least float32; tanh is 2 s - 1 and its slope 4 s (1 - s)."""
    return torch.mul(m, 2 * wide(call.alpha)).sigmoid_()


def sum_product(left: Tensor, right: Tensor) -> Tensor:
    """sum(left * right), accumulated in at least float32."""
    return (left * right).sum(dtype=torch.promote_types(left.dtype, torch.float32))


def backward(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs, steps: Steps
) -> list[Tensor | None]:
    """Gradients of tokens, features, fc1 weight and bias, fc2 weight and bias, alpha; None where not needed.

    `hidden` (Z) and `branch` (M) are what the forward pass saved, or None.
    """
    shut = closed(call)
    if hidden is None and (branch is None or needs.inner or needs.fc2_weight) and (needs.alpha or not shut):
        hidden = _recompute_hidden(call, steps)
    if shut:
        return _backward_closed(call, grad, hidden, branch, needs)
    results: list[Tensor | None] = [None] * 7
    activated, branch_grad, alpha_total = _second_layer_backward(call, grad, hidden, branch, needs, results, steps)
    if needs.inner or (needs.alpha and call.gate == "scale"):
        assert hidden is not None
        inner, dot = _activation_backward(call, grad, hidden, activated, branch_grad, needs, results)
        if call.gate == "scale" and needs.alpha:
            # sum dY M = sum (dY W2) A + sum dY b2, so that M is needed neither saved nor again.
            assert dot is not None
            alpha_total = dot + sum_product(branch_grad.sum(0), call.fc2_bias)
        del activated, branch_grad
        if needs.inner:
            _first_layer_backward(call, inner, needs, results, steps)
    if call.gate == "scale":
        scale = call.alpha.tanh()
        for slot in (4, 5):
            results[slot] = None if results[slot] is None else results[slot].mul_(scale)  # type: ignore[union-attr]
        if alpha_total is not None:
            alpha_total = alpha_total * (1 - wide(call.alpha).tanh() ** 2)
    if needs.alpha:
        assert alpha_total is not None
        results[6] = alpha_total.to(call.alpha.dtype).reshape(call.alpha.shape)
    if not on_cpu(call):
        _silence(call, grad, results)
    return results


def _recompute_hidden(call: Call, steps: Steps) -> Tensor:
    hidden = call.fc1_weight.new_empty(call.shape.samples, call.shape.hidden_width)
    first_layer = FirstLayer(call, steps)
    for first, last, rows in chunks(call):
        first_layer(first, last, hidden[rows])
    return hidden


def _backward_closed(
    call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """At alpha = 0 everything inside the branch gets exactly zero, and alpha's gradient sums M's finite entries."""
    inputs = (call.fc1_weight, call.fc1_bias, call.fc2_weight, call.fc2_bias)
    results: list[Tensor | None] = [
        grad.clone(memory_format=torch.contiguous_format) if needs.tokens else None,
        torch.zeros_like(call.features, memory_format=torch.contiguous_format) if needs.features else None,
        *(torch.zeros_like(like) if need else None for like, need in zip(inputs, needs[2:6], strict=True)),
        None,
    ]
    if needs.alpha:
        total = call.alpha.new_zeros((), dtype=torch.promote_types(grad.dtype, torch.float32))
        for first, last, rows in chunks(call):
            if branch is not None:
                m = branch[rows]
            else:
                assert hidden is not None
                m = torch.addmm(call.fc2_bias, F.gelu(hidden[rows]), call.fc2_weight.t())
            m = m.masked_fill(~torch.isfinite(m), 0)
            total += sum_product(patch_rows(call, grad, first, last), m)
        results[6] = total.to(call.alpha.dtype).reshape(call.alpha.shape)
    return results


def _second_layer_backward(
    call: Call,
    grad: Tensor,
    hidden: Tensor | None,
    branch: Tensor | None,
    needs: Needs,
    results: list[Tensor | None],
    steps: Steps,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """fc2's gradients; returns A (None where nobody needs it), dM, and the product gate's sum for alpha.

    Under the scale gate dM is dY: the factor tanh(alpha) goes onto what is made of it.
    """
    shape = call.shape
    product = call.gate == "product"
    needs_activated = needs.fc2_weight or (product and branch is None) or (not product and needs.alpha)
    activated = torch.empty_like(hidden) if hidden is not None and needs_activated else None
    branch_grad = call.fc1_weight.new_empty(shape.samples, shape.token_width)
    scratch = chunk_scratch(call, shape.token_width)
    total = None
    for first, last, rows in chunks(call):
        patch_grad = patch_rows(call, grad, first, last)
        if activated is not None:
            torch.ops.aten.gelu.out(hidden[rows], out=activated[rows])  # type: ignore[index]
        if not product:
            branch_grad[rows] = patch_grad
            continue
        m = branch[rows] if branch is not None else None
        if m is None:
            assert activated is not None
            m = torch.addmm(call.fc2_bias, activated[rows], call.fc2_weight.t(), out=scratch[: rows.stop - rows.start])
        part = steps.gate_backward(call, patch_grad, m, branch_grad[rows], needs.alpha)
        if part is not None:
            total = part if total is None else total + part
    if needs.fc2_bias:
        results[5] = branch_grad.sum(0)
    if needs.fc2_weight:
        assert activated is not None
        weight_grad = torch.empty_like(call.fc2_weight, memory_format=torch.contiguous_format)
        for first, _, rows in _weight_chunks(call):  # dW2 = dM' A
            _accumulate(weight_grad, branch_grad[rows], activated[rows], first == 0)
        results[4] = weight_grad
    return activated, branch_grad, total


def _activation_backward(
    call: Call, grad: Tensor, hidden: Tensor, activated: Tensor | None, branch_grad: Tensor, needs: Needs,
    results: list[Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dZ [T * N, H] in A's place, the tokens' gradient, and sum dA A for the scale gate's alpha."""
    shape = call.shape
    product = call.gate == "product"
    inner = activated if activated is not None else torch.empty_like(hidden)
    scratch = chunk_scratch(call, shape.hidden_width)
    tokens_grad = None
    if needs.tokens:
        tokens_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
        tokens_grad[:, : shape.prefix] = grad[:, : shape.prefix]
        results[0] = tokens_grad
    dot = None
    for first, last, rows in chunks(call):
        hidden_grad = torch.mm(branch_grad[rows], call.fc2_weight, out=scratch[: rows.stop - rows.start])  # dA = dM W2
        if not product:
            if needs.alpha:
                assert activated is not None
                part = sum_product(hidden_grad, activated[rows])
                dot = part if dot is None else dot + part
            hidden_grad.mul_(call.alpha.tanh())
        dz = torch.ops.aten.gelu_backward.grad_input(hidden_grad, hidden[rows], grad_input=inner[rows])
        if tokens_grad is not None:
            _add_rows(call, grad, dz, tokens_grad, first, last)
    return inner, dot


def _add_rows(call: Call, grad: Tensor, dz: Tensor, tokens_grad: Tensor, first: int, last: int) -> None:
    """dX = dY + dZ W1x for some tiles, straight into the result where its rows are flat."""
    target = tokens_grad[first:last, call.shape.prefix :]
    patch_grad = patch_rows(call, grad, first, last)
    if call.mixed:
        torch.add(patch_grad.view(target.shape), torch.mm(dz, call.weight_x).view(target.shape), out=target)
    elif last - first == 1 or call.shape.prefix == 0:
        torch.addmm(patch_grad, dz, call.weight_x, out=target.view(-1, call.shape.token_width))
    else:
        target.copy_(torch.addmm(patch_grad, dz, call.weight_x).view(target.shape))


def _weight_chunks(call: Call) -> Iterable[tuple[int, int, slice]]:
    """All rows at once below float32, where each partial sum would be rounded; else chunks, which copy no tokens."""
    if call.dtype in (torch.float32, torch.float64):
        return chunks(call)
    return [(0, call.shape.tiles, slice(0, call.shape.samples))]


def _accumulate(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """out = left' right, or out += left' right."""
    if fresh:
        torch.mm(left.t(), right, out=out)
    else:
        out.addmm_(left.t(), right)


def _first_layer_backward(call: Call, inner: Tensor, needs: Needs, results: list[Tensor | None], steps: Steps) -> None:
    """fc1's and the features' gradients from dZ."""
    shape, plan = call.shape, call.plan

    def gather(rows: Tensor) -> Tensor:
        samples = rows.view(shape.tiles, shape.grid, shape.grid, -1)
        return steps.crop_resize_backward(samples, call.boxes, call.image_index, shape.maps)

    if needs.fc1_bias:
        results[3] = inner.sum(0)
    gathered = None
    if (needs.features and plan.feature_gradient == "project_first") or (
        needs.fc1_weight and plan.weight_gradient == "project_first"
    ):
        gathered = gather(inner).flatten(0, 2)  # dP = R' dZ
    if needs.fc1_weight:
        weight_grad = torch.empty_like(call.fc1_weight, memory_format=torch.contiguous_format)
        for first, last, rows in _weight_chunks(call):  # dW1x = dZ' X
            patches = patch_rows(call, call.tokens, first, last).to(call.dtype)
            _accumulate(weight_grad[:, : shape.token_width], inner[rows], patches, first == 0)
        if plan.weight_gradient == "project_first":
            assert gathered is not None
            cells = call.features.reshape(-1, shape.feature_width)
            torch.mm(gathered.t(), cells, out=weight_grad[:, shape.token_width :])  # dW1s = dP' F
        else:
            sampled = steps.sampler(call.features, call)(0, shape.tiles)
            for first, _, rows in _weight_chunks(call):  # dW1s = dZ' S
                _accumulate(weight_grad[:, shape.token_width :], inner[rows], sampled[rows], first == 0)
            del sampled
        results[2] = weight_grad
    if needs.features:
        if plan.feature_gradient == "project_first":
            assert gathered is not None
            results[1] = (gathered @ call.weight_s).view(call.features.shape)  # dF = dP W1s
        else:
            results[1] = gather(inner @ call.weight_s)  # dS = dZ W1s


def _silence(call: Call, grad: Tensor, results: list[Tensor | None]) -> None:
    """The rule of `_backward_closed` without looking at alpha: removes the NaN of 0 times a non-finite number."""
    shut = call.alpha == 0
    for slot, result in enumerate(results[:6]):
        if result is not None:
            results[slot] = torch.where(shut, grad, result) if slot == 0 else result.masked_fill(shut, 0)
