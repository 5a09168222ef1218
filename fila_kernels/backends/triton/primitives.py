"""Device functions that several kernels share: taps and interpolation, rows of tokens, GELU, the gate.

T tiles, P prefix tokens, N = G * G patch tokens per tile, L = P + N; widths D, C, H. A *row* counts all T * L tokens, a
*sample* the T * N patch tokens alone. Pointers are `p_`, loaded blocks `b_`, indices of programs and blocks `i_`.

Every value is widened to float32 right after its load, and all arithmetic is in float32; taps are found in float64.

The functions with EXACT are as accurate as float32 if it is true. Otherwise their results suit 16 bits: over every
finite bfloat16 and float16 input they are no further from the true value than PyTorch's, in roundings of the result.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by an interpreter that has no inline assembly


@triton.jit
def axis_tap(low, high, index, size, cells):
    """Finds a sample's lower tap and the weight of the next cell, on one axis.

    Sample `index` of `size` lies in the box [low, high) on a map of `cells`. Both taps lie on the map whatever the box
    holds; a box that is not finite gets a weight of NaN. A second tap that would leave the box or the map gets weight
    zero. The arithmetic is the definition's, in float64 and in the box's frame: a float32 position near cell 90 is off
    by 4e-6 of a cell, 30 times the rounding of a float32 result. It multiplies before it divides, so that a sample on a
    cell's centre is exact and reads no neighbour.
    """
    low = low.to(tl.float64)
    high = high.to(tl.float64)
    last = cells - 1
    origin = tl.floor(low)
    start = low - origin
    extent = high - low
    local = start + ((index.to(tl.float64) + 0.5) * extent / size - 0.5)
    within = tl.minimum(tl.maximum(local, start), start + (extent - 1.0))
    local = tl.where(extent >= 1.0, within, start + (extent - 1.0) / 2.0)
    local = tl.minimum(tl.maximum(local, -origin), last - origin)
    below = tl.floor(local)
    weight = local - below
    lower = below + origin
    upper = tl.minimum(tl.minimum(lower + 1.0, tl.ceil(high) - 1.0), last)
    finite = tl.abs(extent) < float("inf")
    lower = tl.where(finite, tl.minimum(tl.maximum(lower, 0.0), last), 0.0)
    weight = tl.where(upper > lower, weight, 0.0)
    return lower.to(tl.int32), tl.where(finite, weight, float("nan")).to(tl.float32)


@triton.jit
def upper_tap(lower, weight):
    """The second tap: the next cell if its weight is not zero, else the lower tap again."""
    return lower + (weight > 0.0).to(tl.int32)


@triton.jit
def bilinear(p, top, bottom, left, right, weight_y, weight_x, inside):
    """Interpolates four taps at p + row + column in float32.

    Taps of weight zero are not read, and count as zeros: at an odd whole scale a sample reads one cell.
    """
    far_x = inside & (weight_x != 0.0)
    far_y = inside & (weight_y != 0.0)
    near_near = tl.load(p + (top + left), mask=inside, other=0.0).to(tl.float32)
    near_far = tl.load(p + (top + right), mask=far_x, other=0.0).to(tl.float32)
    far_near = tl.load(p + (bottom + left), mask=far_y, other=0.0).to(tl.float32)
    far_far = tl.load(p + (bottom + right), mask=far_x & far_y, other=0.0).to(tl.float32)
    rest_y, rest_x = 1.0 - weight_y, 1.0 - weight_x
    near = (rest_y * rest_x) * near_near + (rest_y * weight_x) * near_far
    return near + (weight_y * rest_x) * far_near + (weight_y * weight_x) * far_far


@triton.jit
def sample_taps(p_boxes, tile, sample, mask, size, height, width):
    """Lower taps and weights, along y and then x, of samples that are numbered within their tiles."""
    p_box = p_boxes + tile * 4
    low_y = tl.load(p_box, mask=mask, other=0.0)
    low_x = tl.load(p_box + 1, mask=mask, other=0.0)
    high_y = tl.load(p_box + 2, mask=mask, other=1.0)
    high_x = tl.load(p_box + 3, mask=mask, other=1.0)
    top, weight_y = axis_tap(low_y, high_y, sample // size, size, height)
    left, weight_x = axis_tap(low_x, high_x, sample % size, size, width)
    return top, weight_y, left, weight_x


@triton.jit
def clamped_image(p_index, i_tile, images, mask):
    """The image of each tile, clamped to those that exist."""
    image = tl.load(p_index + i_tile, mask=mask, other=0)
    return tl.minimum(tl.maximum(image, 0), images - 1).to(tl.int64)


@triton.jit
def split_rows(row, length):
    """For each row, which is not negative: its tile and its place in it."""
    tile = (row.to(tl.uint32) // tl.cast(length, tl.uint32)).to(tl.int32)  # a signed division takes twice as long
    return tile, row - tile * length


@triton.jit
def token_rows(row, num_rows, length, prefix):
    """For each row: its tile, its place among the tile's patch tokens, its sample, and whether it is a patch token."""
    tile, place = split_rows(row, length)
    patch = place - prefix
    is_patch = (patch >= 0) & (row < num_rows)
    return tile, patch, tile.to(tl.int64) * (length - prefix) + patch, is_patch


@triton.jit
def row_offsets(row, length, stride_t, stride_l):
    """Offsets at which the rows of a tensor [T, L, width] begin, for any outer strides."""
    tile, place = split_rows(row, length)
    return tile.to(tl.int64) * stride_t + place.to(tl.int64) * stride_l


@triton.jit
def at(p, row, width, column):
    """Pointers to rows by columns of a dense matrix that is `width` wide."""
    return p + (row.to(tl.int64) * width)[:, None] + column[None, :]


@triton.jit
def exp2(x):
    """2^x to 2^-22 of its value in one instruction; below 2^-126 it is zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x to a rounding of its value in one instruction; zero from 2^126 on."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def upper_tail(t):
    """Phi(-t) for t >= 0, to 8e-5 of its value up to t = 6, and falling to zero beyond.

    log2 Phi(-t) as a polynomial. erf(x) is then 1 - 2 Phi(-x sqrt 2), within 6e-7; the tail itself does not cancel.
    """
    p = t * -5.623708716484543e-07 + 1.004369551083073e-05
    p = p * t + -3.782368003157899e-05
    p = p * t + -0.0005099945119582117
    p = p * t + 0.0075550321489572525
    p = p * t + -0.052825216203927994
    p = p * t + -0.45910921692848206
    p = p * t + -1.151114821434021
    return exp2(p * t - 1.0)


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    """z Phi(z), as in `nn.GELU()`."""
    if EXACT:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        t = tl.minimum(tl.abs(z), 1e30)  # so that infinity times zero is zero
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * upper_tail(t)


@triton.jit
def gelu_and_slope(z, EXACT: tl.constexpr):
    """GELU and its derivative, Phi(z) + z phi(z)."""
    if EXACT:
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * phi, phi + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        tail = upper_tail(tl.abs(z))
        phi = tl.where(z > 0.0, 1.0 - tail, tail)
        return z * phi, phi + z * 0.3989422804014327 * exp2(z * z * -0.7213475204444817)


@triton.jit
def precise_tanh(u):
    """tanh, to a few roundings of its own value: by its odd series where 1 - exp(-2 |u|) would cancel."""
    s = u * u
    series = -0.33333331 + s * (0.13333118 + s * (-0.053910065 + s * (0.021312745 + s * -0.0066157547)))
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.55, u + u * (s * series), tl.where(u < 0.0, -far, far))


@triton.jit
def tanh_of_product(a, b, EXACT: tl.constexpr):
    """tanh(a b) for a scalar a; below 2^-4, where 1 - 2 / (1 + exp(2 a b)) would cancel, by two terms of its series.

    Both terms and the other form, 2^-22 short of it, are below tanh in their magnitude: the larger one is the nearer.
    """
    if EXACT:
        return precise_tanh(a * b)
    else:
        v = (a * 2.8853900817779268) * b  # exp(2 a b) = 2^v
        t = tl.abs(v)
        near = t * (t * t * -0.013876027166 + 0.34657359028)
        far = 0.9999997615814209 - 2.0 * reciprocal(1.0 + exp2(t))
        sign = v.to(tl.int32, bitcast=True) & -0x80000000
        return (tl.maximum(near, far).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh_slope(u, EXACT: tl.constexpr):
    """1 - tanh(u)^2, computed without the difference, which loses everything where the gate is saturated."""
    if EXACT:
        e = tl.exp(-2.0 * tl.abs(u))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        e = exp2(tl.abs(u) * -2.8853900817779268)
        root = reciprocal(1.0 + e)
        return 4.0 * e * (root * root)


@triton.jit
def finite_or_zero(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def gated(branch, alpha, PRODUCT: tl.constexpr, EXACT: tl.constexpr):
    """tanh(alpha M), or tanh(alpha) M for the scale gate."""
    if PRODUCT:
        return tanh_of_product(alpha, branch, EXACT)
    else:
        return precise_tanh(alpha) * branch
