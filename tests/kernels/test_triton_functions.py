"""GELU, tanh and their derivatives over every finite input of 16 bits: no further from the truth than PyTorch's.

A distance is counted in steps between neighbouring numbers of the output's dtype. PyTorch computes in float32 and
rounds; where it is right everywhere, one input in a thousand may be rounded to the other neighbour.
"""

import pytest
import torch
import triton
import triton.language as tl

from fila_kernels.backends.triton.primitives import gelu, gelu_and_slope, tanh_of_product, tanh_slope


@triton.jit
def _functions_kernel(p_x, p_out, count, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    inside = element < count
    x = tl.load(p_x + element, mask=inside, other=0.0)
    value, slope = gelu_and_slope(x, EXACT)
    tl.store(p_out + element, gelu(x, EXACT), mask=inside)
    tl.store(p_out + count + element, value, mask=inside)
    tl.store(p_out + 2 * count + element, slope, mask=inside)
    tl.store(p_out + 3 * count + element, tanh_of_product(1.0, x, EXACT), mask=inside)
    tl.store(p_out + 4 * count + element, tanh_slope(x, EXACT), mask=inside)


NAMES = ("gelu", "gelu again", "gelu's slope", "tanh", "tanh's slope")


def functions(x: torch.Tensor, exact: bool) -> torch.Tensor:
    out = torch.full((len(NAMES), x.numel()), float("nan"))
    _functions_kernel[(1,)](x, out, x.numel(), EXACT=exact, BLOCK=triton.next_power_of_2(x.numel()))
    return out


def defined(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The five functions by PyTorch, in x's dtype."""
    wide = x.dtype == torch.float64
    below = 0.5 * (torch.special.erfc(x * -(0.5**0.5)) if wide else 1 + torch.erf(x * 0.5**0.5))
    slope = below + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    slope_of_tanh = torch.cosh(x) ** -2 if wide else 1 - torch.tanh(x) ** 2  # float64 too would feel the difference
    return x * below, x * below, slope, torch.tanh(x), slope_of_tanh


def every(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return bits[bits.isfinite()]


def steps(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the dtype between a result and the exact one, both rounded."""
    order = [value.to(dtype).view(torch.int16).int() for value in (found, exact)]
    left, right = (torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in order)
    return (left - right).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits(dtype):
    x = every(dtype)
    for name, found, exact, eager in zip(
        NAMES, functions(x.float(), False), defined(x.double()), defined(x.float()), strict=True
    ):
        ours, theirs = steps(found, exact, dtype), steps(eager, exact, dtype)
        counts = f"{name}: {int((ours > 0).sum())} not rounded right, PyTorch {int((theirs > 0).sum())}"
        assert (ours > 0).sum() <= max(int((theirs > 0).sum()), x.numel() // 1000), counts
        further = ours > theirs.clamp(min=1)
        assert not further.any(), (counts, x[further][:8], ours[further][:8], theirs[further][:8])


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite(exact):
    found = functions(torch.tensor([float("inf"), float("-inf"), float("nan")]), exact)
    assert found[0, 0] == found[1, 0] == float("inf")
    assert found[3, :2].tolist() == [1.0, -1.0] or not exact
    torch.testing.assert_close(found[3, :2], torch.tensor([1.0, -1.0]))
    assert found[4, :2].tolist() == [0.0, 0.0]
    assert found[:, 2].isnan().all()


def test_float32_keeps_its_digits():
    x = torch.linspace(-8, 8, 10_001)
    for name, found, exact in zip(NAMES, functions(x, True), defined(x.double()), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-7, msg=name)
