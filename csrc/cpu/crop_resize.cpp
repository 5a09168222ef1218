// It reads only the cells that samples need. Eager PyTorch's interpolate walks NCHW planes of a slice instead, which
// at an enlarged map's first stage visits many times more memory than any token reads.

#include "crop_resize.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "../check.h"
#include "vector.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fila::crop_resize";

// out = wy0 (wx0 a + wx1 b) + wy1 (wx0 c + wx1 d) in at least float32, one rounding at the store.
template <typename Real>
struct Blend {
  Real wx0, wx1, wy0, wy1;

  // An axis of weight zero is its first tap alone: 0 * inf would be NaN. Constant over a loop on channels.
  FILA_INLINE Real operator()(Real a, Real b, Real c, Real d) const {
    const Real upper = wx1 == Real(0) ? a : wx0 * a + wx1 * b;
    const Real lower = wx1 == Real(0) ? c : wx0 * c + wx1 * d;
    return wy1 == Real(0) ? upper : wy0 * upper + wy1 * lower;
  }
};

template <typename Scalar>
FILA_INLINE void blend_loop(const Scalar* a, const Scalar* b, const Scalar* c, const Scalar* d,
                            Blend<accumulate_t<Scalar>> blend, Scalar* out, int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    store(blend(widen(a[i]), widen(b[i]), widen(c[i]), widen(d[i])), out + i);
  }
}

FILA_VECTOR_CLONES void blend_cells(const float* a, const float* b, const float* c, const float* d, Blend<float> blend,
                                    float* out, int64_t channels) {
  blend_loop(a, b, c, d, blend, out, channels);
}

FILA_VECTOR_CLONES void blend_cells(const BFloat16* a, const BFloat16* b, const BFloat16* c, const BFloat16* d,
                                    Blend<float> blend, BFloat16* out, int64_t channels) {
  blend_loop(a, b, c, d, blend, out, channels);
}

FILA_VECTOR_CLONES void blend_cells(const double* a, const double* b, const double* c, const double* d,
                                    Blend<double> blend, double* out, int64_t channels) {
  blend_loop(a, b, c, d, blend, out, channels);
}

}  // namespace

template <typename Scalar>
void gather_lines(const MapView<Scalar>& map, const Taps& taps, int64_t size, int64_t first, int64_t last, Scalar* out,
                  int64_t out_stride) {
  using Real = accumulate_t<Scalar>;
  for (int64_t line = first; line < last; ++line) {
    const int64_t tile = line / size;
    const Tap<double>& y = taps.rows[line];
    const Scalar* image = map.data + taps.image[tile] * map.stride_image;
    const Scalar* upper = image + y.first * map.stride_row;
    const Scalar* lower = image + y.second * map.stride_row;
    for (int64_t column = 0; column < size; ++column, out += out_stride) {
      const Tap<double>& x = taps.columns[tile * size + column];
      const int64_t left = x.first * map.stride_cell;
      const int64_t right = x.second * map.stride_cell;
      if (x.weight == 0.0 && y.weight == 0.0) {
        std::memcpy(out, upper + left, map.channels * sizeof(Scalar));
        continue;
      }
      const Blend<Real> blend{static_cast<Real>(1.0 - x.weight), static_cast<Real>(x.weight),
                              static_cast<Real>(1.0 - y.weight), static_cast<Real>(y.weight)};
      blend_cells(upper + left, upper + right, lower + left, lower + right, blend, out, map.channels);
    }
  }
}

template void gather_lines(const MapView<float>&, const Taps&, int64_t, int64_t, int64_t, float*, int64_t);
template void gather_lines(const MapView<BFloat16>&, const Taps&, int64_t, int64_t, int64_t, BFloat16*, int64_t);
template void gather_lines(const MapView<double>&, const Taps&, int64_t, int64_t, int64_t, double*, int64_t);

namespace {

template <typename Scalar>
void gather(const Tensor& features, const Taps& taps, const Geometry& g, const Tensor& out) {
  const MapView<Scalar> map = view_map<Scalar>(features);
  Scalar* target = static_cast<Scalar*>(out.mutable_data_ptr());
  const int64_t line = g.size * map.channels;
  // A line touches five times its elements; smaller shares are not worth waking a thread for.
  const int64_t grain = 1 + 65536 / (5 * line + 1);
  torch::stable::parallel_for(0, g.tiles * g.size, grain, [&](int64_t begin, int64_t end) {
    gather_lines(map, taps, g.size, begin, end, target + begin * line, map.channels);
  });
}

Tensor crop_resize(Tensor features, Tensor boxes, Tensor image_index, int64_t size, bool check_values) {
  check_map(kOp, "features", features, "[B, h, w, C]", Device::kCpu);
  const Geometry g{features.size(0), features.size(1), features.size(2), boxes.dim() == 2 ? boxes.size(0) : 0, size};
  check_boxes(kOp, boxes, image_index, g, features);
  checked_product(kOp, "a result", {g.tiles, size, size, features.size(3)});
  const Taps taps = make_taps(kOp, boxes, image_index, g, check_values);

  const Tensor out = torch::stable::new_empty(features, {g.tiles, size, size, features.size(3)});
  if (out.numel() == 0) {
    return out;
  }
  switch (features.scalar_type()) {
    case ScalarType::Float:
      gather<float>(features, taps, g, out);
      break;
    case ScalarType::BFloat16:
      gather<BFloat16>(features, taps, g, out);
      break;
    default:
      gather<double>(features, taps, g, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&crop_resize));
}

}  // namespace
}  // namespace fila
