"""The `torch` backend's forward pass: the operation as few, large PyTorch calls; runs on any device.

Letters: T tiles, N patch tokens a tile, D token width, C feature channels, H hidden width. Sampling and its transpose
are the native library's operators where it is loaded and serves the tensors; elsewhere they are weighted bags of rows
(`embedding_bag`), which read each tap once, accumulate in float32 and write each row once.
Rows go through in chunks of whole tiles, which keeps the hidden activation in cache and the extra memory small. [X ; S]
exists for one chunk at a time: two GEMMs into one buffer take as long, and round the sum twice.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fila_kernels import native
from fila_kernels.call import Call
from fila_kernels.sampling import Bags, cell_bags, sample_bags, tile_slice, touched

CHUNK_BYTES = 2 * 2**20


class Sampler(NamedTuple):
    """How maps are sampled and how gradients go back, with the arguments of this file's two functions."""

    crop_resize: Callable[..., Tensor]
    crop_resize_backward: Callable[..., Tensor]


class Composition(Call):
    """A call with the sampler that its composition uses: this file's where none is given."""

    sampler: Sampler | None

    @classmethod
    def of(cls, call: Call, sampler: Sampler | None = None) -> "Composition":
        if isinstance(call, Composition):
            return call
        composition = cls(*call)
        composition.sampler = sampler
        return composition

    @property
    def sampling(self) -> Sampler:
        return self.sampler or Sampler(crop_resize, crop_resize_backward)

    def compiled(self, tensor: Tensor) -> bool:
        """Whether the native library's operators take a tensor of this call."""
        return self.sampler is not None or native.serves(tensor.dtype, tensor.device)[0]

    @property
    def on_cpu(self) -> bool:
        return self.tokens.device.type == "cpu"

    def closed(self) -> bool:
        """Whether the gate is known to be shut. Looking would synchronise a GPU, where masks do the same."""
        return self.on_cpu and not bool(self.alpha.count_nonzero())

    def patches(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Patch rows [rows, D] of tiles [first, last): a view where one tile or no prefix makes them flat."""
        return tokens[first:last, self.shape.prefix :].reshape(-1, self.shape.token_width)

    def tiles_per_chunk(self) -> int:
        """As many tiles as keep the hidden activation in a CPU's second-level caches; a GPU takes all at once."""
        if not self.on_cpu:
            return self.shape.tiles
        return max(1, CHUNK_BYTES // (self.shape.patches * self.shape.hidden_width * self.tokens.dtype.itemsize))

    def chunks(self) -> Iterator[tuple[int, int, slice]]:
        """(first tile, last tile, rows) of each chunk."""
        step, patches = self.tiles_per_chunk(), self.shape.patches
        for first in range(0, self.shape.tiles, step):
            last = min(first + step, self.shape.tiles)
            yield first, last, slice(first * patches, last * patches)

    def scratch(self, width: int) -> Tensor:
        """Uninitialised rows for one chunk."""
        return self.tokens.new_empty(min(self.tiles_per_chunk(), self.shape.tiles) * self.shape.patches, width)


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


def dense_channels(tensor: Tensor) -> Tensor:
    """As the compiled operators want it: unit stride over channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def crop_resize(features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """[B, h, w, C] to [T, size, size, C]. Values were checked at the public edge, if at all: any is safe here."""
    if native.serves(features.dtype, features.device)[0]:
        return torch.ops.fila.crop_resize(dense_channels(features), boxes, image_index, size, check_values=False)
    rows, strides = map_rows(features)
    images, height, width, channels = features.shape
    bags = sample_bags(boxes, image_index, size, strides, (images, height, width), features.dtype)
    return sum_bags(rows, bags).view(boxes.shape[0], size, size, channels)


def crop_resize_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Tensor:
    """[T, size, size, C] to [B, h, w, C]: each cell gathers from the samples that read it."""
    if native.serves(grad.dtype, grad.device)[0]:
        return torch.ops.fila.crop_resize_backward(dense_channels(grad), boxes, image_index, *maps, check_values=False)
    images, height, width = maps
    size, channels = grad.shape[2:]
    samples = sample_bags(boxes, image_index, size, (height * width, width, 1), maps, grad.dtype)
    rows = grad.reshape(-1, channels)
    num_cells = images * height * width
    if grad.device.type == "cpu" and samples.row.numel() < num_cells // 2:
        cells, bags = touched(samples)
        result = _untouched_zeros(num_cells, rows).index_copy_(0, cells, sum_bags(rows, bags))
    else:
        result = sum_bags(rows, cell_bags(samples, num_cells))
    return result.view(images, height, width, channels)


def _untouched_zeros(count: int, rows: Tensor) -> Tensor:
    """Zeros [count, width] on the CPU like `rows`, from calloc: pages that nobody writes are never filled.

    For a map of 384 x 384 x 192 float32 of which 8 % is read, this takes 10 ms in place of 58 ms.
    """
    size = count * rows.shape[1] * rows.dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(rows.dtype).view(count, rows.shape[1])


class _Gather:
    """S for any range of tiles in PyTorch alone, from one table of taps."""

    def __init__(self, maps: Tensor, call: Composition) -> None:
        self.patches, self.tiles = call.shape.patches, call.shape.tiles
        self.source, strides = map_rows(maps)
        sizes = (maps.shape[0], maps.shape[1], maps.shape[2])
        self.bags = sample_bags(call.boxes, call.image_index, call.shape.grid, strides, sizes, maps.dtype)
        self.bounds: list[int] | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        if last - first == self.tiles:
            return sum_bags(self.source, self.bags)
        if self.bounds is None:
            self.bounds = self.bags.offset[:: self.patches].tolist()
        return sum_bags(self.source, tile_slice(self.bags, first, last, self.bounds, self.patches))


class FirstLayer:
    """fc1 before its activation, Z [rows, H], for any range of tiles."""

    def __init__(self, call: Composition) -> None:
        self.call, shape = call, call.shape
        self.projected = call.plan.forward == "project_first"
        self.maps = call.features
        if self.projected:
            # R(F) W' = R(F W'), and a constant passes through R unchanged: bilinear weights sum to one.
            cells = call.features.reshape(-1, shape.feature_width)
            projection = torch.addmm(call.fc1_bias, cells, call.weight_s.t())
            self.maps = projection.view(shape.images, shape.height, shape.width, shape.hidden_width)
        else:
            self.joint = call.scratch(shape.token_width + shape.feature_width)
        self.gather = None if call.compiled(self.maps) else _Gather(self.maps, call)

    def _sampled(self, first: int, last: int) -> Tensor:
        """S [rows, C], or the interpolated projection [rows, H]."""
        if self.gather is not None:
            return self.gather(first, last)
        boxes, image_index = self.call.boxes[first:last], self.call.image_index[first:last]
        return self.call.sampling.crop_resize(self.maps, boxes, image_index, self.call.shape.grid).flatten(0, 2)

    def __call__(self, first: int, last: int, out: Tensor) -> Tensor:
        call, width = self.call, self.call.shape.token_width
        if self.projected:
            # Below float32 the projection and its interpolation are rounded once each on their way.
            patches = call.patches(call.tokens, first, last)
            return torch.addmm(self._sampled(first, last), patches, call.weight_x.t(), out=out)
        joint = self.joint[: out.shape[0]]
        patches = call.tokens[first:last, call.shape.prefix :]
        joint[:, :width].view(patches.shape).copy_(patches)
        joint[:, width:] = self._sampled(first, last)
        return torch.addmm(call.fc1_bias, joint, call.fc1_weight.t(), out=out)


def forward(call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor:
    """The fused tokens; fills `hidden` [T * N, H] with Z and `branch` [T * N, D] with M where they are given."""
    call = Composition.of(call)
    tokens, shape = call.tokens, call.shape
    if call.sampler is None and native.serves(tokens.dtype, tokens.device)[0]:
        features = dense_channels(call.features)
        return torch.ops.fila.cvfm_forward(
            tokens, features, *call[2:9], shape.prefix, call.gate, call.plan.forward, hidden, branch, check_values=False
        )
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    closed = call.closed()
    passing = None if closed else shape.prefix
    out[:, :passing] = tokens[:, :passing]
    if closed and hidden is None and branch is None:
        return out
    first_layer = FirstLayer(call)
    z_scratch = call.scratch(shape.hidden_width) if hidden is None else None
    a_scratch = call.scratch(shape.hidden_width) if hidden is not None else z_scratch
    m_scratch = call.scratch(shape.token_width)
    assert a_scratch is not None
    for first, last, rows in call.chunks():
        count = rows.stop - rows.start
        z = first_layer(first, last, hidden[rows] if hidden is not None else a_scratch[:count])
        a = torch.ops.aten.gelu.out(z, out=a_scratch[:count])
        m = torch.addmm(
            call.fc2_bias, a, call.fc2_weight.t(), out=branch[rows] if branch is not None else m_scratch[:count]
        )
        if not closed:
            patches = tokens[first:last, shape.prefix :]
            torch.add(patches, _gated(m, call).view(patches.shape), out=out[first:last, shape.prefix :])
    return out


def _gated(m: Tensor, call: Composition) -> Tensor:
    """tanh(alpha M) or tanh(alpha) M in at least float32, so that only the sum with the tokens is rounded."""
    if not call.on_cpu:
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
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gate_sigmoid(m: Tensor, call: Call) -> Tensor:
    """sigmoid(2 alpha M) in at least float32; tanh is 2 s - 1 and its slope 4 s (1 - s)."""
    return torch.mul(m, 2 * wide(call.alpha)).sigmoid_()
