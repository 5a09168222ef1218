"""Device functions that several kernels share: where samples lie, rows of tokens, tiles of operands, the gate, GELU.

Legend: T tiles, P prefix tokens, L = P + N tokens a tile, G grid side, N = G * G, D, C, H widths. "Flat" rows count all
T * L tokens, "samples" only the T * N patch tokens. Pointers are `p_`, program ids `i_`.

Arithmetic is float32 whatever is stored, and every value is widened right after its load.
"""

import triton
import triton.language as tl


@triton.jit
def axis_tap(low, high, index, size, cells):
    """Lower tap, and weight of the next cell, of sample `index` of `size` in a box [low, high) on an axis of `cells`.

    The definition's own float64 arithmetic in the box's frame: float32 positions would be off by 4e-6 of a cell at
    cell 90 already, which is 30 times the rounding of a float32 result. Multiplied before divided, so that a sample on
    a cell's centre comes out exactly and reads no neighbour. A second tap that would leave the box or the map is the
    first again, hence of weight zero. On any value whatever the taps lie on the map; a box that is not finite gets a
    NaN weight.
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
    """The second tap: the next cell where it counts, else the first again."""
    return lower + (weight > 0.0).to(tl.int32)


@triton.jit
def mix(near, far, weight):
    """Linear interpolation in which a tap of weight zero does not count, whatever it holds."""
    return tl.where(weight == 0.0, near, (1.0 - weight) * near + weight * far)


@triton.jit
def bilinear(p, top, bottom, left, right, weight_y, weight_x, inside):
    """Four taps at p + row + column, mixed in float32. Those of weight zero are not read: of a whole box at an odd
    scale one cell a sample."""
    far_x = inside & (weight_x != 0.0)
    far_y = inside & (weight_y != 0.0)
    near_near = tl.load(p + (top + left), mask=inside, other=0.0).to(tl.float32)
    near_far = tl.load(p + (top + right), mask=far_x, other=0.0).to(tl.float32)
    far_near = tl.load(p + (bottom + left), mask=far_y, other=0.0).to(tl.float32)
    far_far = tl.load(p + (bottom + right), mask=far_x & far_y, other=0.0).to(tl.float32)
    return mix(mix(near_near, near_far, weight_x), mix(far_near, far_far, weight_x), weight_y)


@triton.jit
def sample_taps(p_boxes, tile, sample, mask, size, height, width):
    """Lower taps and weights along y and x of samples (numbered within their tiles) of the tiles' boxes."""
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
    """The image of each tile, on the map whatever the index holds."""
    image = tl.load(p_index + i_tile, mask=mask, other=0)
    return tl.minimum(tl.maximum(image, 0), images - 1).to(tl.int64)


@triton.jit
def token_rows(row, num_rows, length, prefix):
    """For flat rows: the tile, the place among its patch tokens, the row among all samples, and whether it is one."""
    tile = row // length
    patch = row % length - prefix
    is_patch = (patch >= 0) & (row < num_rows)
    return tile, patch, tile.to(tl.int64) * (length - prefix) + patch, is_patch


@triton.jit
def row_offsets(row, length, stride_t, stride_l):
    """Where flat rows of a tensor [T, L, width] of any outer strides begin."""
    return (row // length).to(tl.int64) * stride_t + (row % length).to(tl.int64) * stride_l


@triton.jit
def add_product(
    acc, a, b, row, i_row, i_col, num_rows, num_columns, depth, length, stride_t, stride_l, stride_b,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc += a b' for b [num_columns, depth] if TRANSPOSED, else a b for b [depth, num_columns]; one tile."""
    if TMA:
        for k in tl.range(0, depth, BLOCK_K, warp_specialize=SPECIALIZE):
            b_a = a.load([i_row, k])
            if TRANSPOSED:
                b_b = b.load([i_col, k]).T
            else:
                b_b = b.load([k, i_col])
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    else:
        column = i_col + tl.arange(0, BLOCK_N)
        p_a = a + row_offsets(row, length, stride_t, stride_l)[:, None]
        in_rows = (row < num_rows)[:, None]
        in_columns = column < num_columns
        for k in tl.range(0, depth, BLOCK_K):
            step = k + tl.arange(0, BLOCK_K)
            in_depth = step < depth
            b_a = tl.load(p_a + step[None, :], mask=in_rows & in_depth[None, :], other=0.0)
            if TRANSPOSED:
                p_b = b + column.to(tl.int64)[None, :] * stride_b + step[:, None]
            else:
                p_b = b + step.to(tl.int64)[:, None] * stride_b + column[None, :]
            b_b = tl.load(p_b, mask=in_depth[:, None] & in_columns[None, :], other=0.0)
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_products(
    acc, acc_tail, a, a_tail, b, i_row, i_col, depth, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc += a b' for BLOCK_M rows and acc_tail += a b' for those after them, by descriptors; b is read once."""
    for k in tl.range(0, depth, BLOCK_K):
        b_b = b.load([i_col, k]).T
        acc = tl.dot(a.load([i_row, k]), b_b, acc, input_precision=PRECISION)
        acc_tail = tl.dot(a_tail.load([i_row + BLOCK_M, k]), b_b, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's left and right columns, so that an epilogue holds fewer values at a time."""
    return tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def gelu(z):
    """z Phi(z), by erf as `nn.GELU()` has it."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    """Phi(z) + z phi(z)."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def tanh(u):
    """tanh to a few float32 roundings of its own value: by its odd series where 1 - exp(-2 |u|) would cancel."""
    s = u * u
    series = -0.33333331 + s * (0.13333118 + s * (-0.053910065 + s * (0.021312745 + s * -0.0066157547)))
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.55, u + u * (s * series), tl.where(u < 0.0, -far, far))


@triton.jit
def tanh_slope(u):
    """1 - tanh(u)^2 without the difference, of which a full gate would leave nothing."""
    e = tl.exp(-2.0 * tl.abs(u))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def finite_or_zero(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def gated(branch, alpha, PRODUCT: tl.constexpr):
    """tanh(alpha M) or tanh(alpha) M; a gate of zero silences what is not finite."""
    branch = tl.where(alpha == 0.0, finite_or_zero(branch), branch)
    if PRODUCT:
        return tanh(alpha * branch)
    else:
        return tanh(alpha) * branch
