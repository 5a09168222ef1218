"""Cases sized for Triton's interpreter, and memory that shows a stray read, a stray write or a gap.

Every tensor that a kernel may touch lies between guards. Floating-point memory starts as NaN, so an element that is
never written, or a value from beyond the end, shows in the result. Guards must keep their contents.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fila_kernels.testing import CASES, Case, refill

GUARD = 64  # elements on either side: more than any vector access, and a multiple of 16 bytes

# Several steps of depth, of which the last is not full; several blocks of columns; by descriptors and by pointers.
ALIGNED = Case("aligned", tiles=3, prefix=2, token_width=80, hidden_width=144, feature_width=96, boxes="overlapping")
UNALIGNED = replace(ALIGNED, name="unaligned", token_width=70, hidden_width=131, feature_width=67)
# Four hundred steps of the interpreter for each of 37 tiles take minutes; six tiles show as much.
MATRIX = (
    *(replace(case, tiles=min(case.tiles, 6)) for case in CASES if case.name not in ("large_map", "empty")),
    Case("large_map", tiles=2, images=1, height=90, width=70),
    ALIGNED,
    UNALIGNED,
)


def poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else -(2**30)


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides whose storage has poison around and between its elements."""
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.full((size + 2 * GUARD,), poison(tensor.dtype), dtype=tensor.dtype)
    return refill(storage.as_strided(tensor.shape, tensor.stride(), GUARD), tensor)


class Guards:
    """Hands out poisoned memory between guards, and looks at the guards afterwards."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []

    def empty(self, shape, dtype) -> Tensor:
        count = math.prod(shape)
        storage = torch.full((count + 2 * GUARD,), poison(dtype), dtype=dtype)
        self.storages.append(storage)
        return storage[GUARD : GUARD + count].view(shape)

    def check(self) -> None:
        for storage in self.storages:
            edges = torch.cat([storage[:GUARD], storage[-GUARD:]])
            kept = edges.isnan() if edges.is_floating_point() else edges == poison(edges.dtype)
            assert bool(kept.all()), "a kernel wrote beyond its buffer"


@pytest.fixture
def guards(monkeypatch):
    """Uninitialised memory comes from `Guards` for as long as a test runs."""
    found = Guards()

    def shape_of(arguments) -> tuple[int, ...]:
        return tuple(arguments[0]) if isinstance(arguments[0], tuple | list | torch.Size) else arguments

    def new_empty(self, *shape, dtype=None, **_) -> Tensor:
        return found.empty(shape_of(shape), dtype or self.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=torch.float32, **_: found.empty(shape_of(shape), dtype))
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: found.empty(tuple(like.shape), like.dtype))
    yield found
    found.check()
