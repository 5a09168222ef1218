// crop_resize on the CPU: a four-tap gather, channels innermost, one output row of one tile at a time.
//
// It reads only the cells that samples need. Eager PyTorch's interpolate walks NCHW planes of a slice instead, which
// at an enlarged map's first stage visits many times more memory than any token reads.

#include "../sampling.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "../check.h"

// One copy of the inner loop per vector width, chosen when the library is loaded: the binary stays a generic one.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FILA_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef FILA_VECTOR_CLONES
#define FILA_VECTOR_CLONES
#endif

namespace fila {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fila::crop_resize";

// out = wy0 (wx0 a + wx1 b) + wy1 (wx0 c + wx1 d), fp32 arithmetic, one rounding at the store.
struct Blend {
  float wx0, wx1, wy0, wy1;

  // An axis of weight zero is its first tap alone: 0 * inf would be NaN. Constant over a loop on channels.
  float operator()(float a, float b, float c, float d) const {
    const float upper = wx1 == 0.0f ? a : wx0 * a + wx1 * b;
    const float lower = wx1 == 0.0f ? c : wx0 * c + wx1 * d;
    return wy1 == 0.0f ? upper : wy0 * upper + wy1 * lower;
  }
};

FILA_VECTOR_CLONES void blend_cells(const float* a, const float* b, const float* c, const float* d, Blend blend,
                                    float* out, int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    out[i] = blend(a[i], b[i], c[i], d[i]);
  }
}

FILA_VECTOR_CLONES void blend_cells(const BFloat16* a, const BFloat16* b, const BFloat16* c, const BFloat16* d,
                                    Blend blend, BFloat16* out, int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    out[i] = blend(a[i], b[i], c[i], d[i]);
  }
}

struct Shapes {
  int64_t images, height, width, channels, tiles, size;
  int64_t stride_image, stride_row, stride_cell;
};

Shapes check_shapes(const Tensor& features, const Tensor& boxes, const Tensor& image_index, int64_t size) {
  require(features.dim() == 4, kOp, "expected features of shape [B, h, w, C], got ", shape_text(features));
  require(boxes.dim() == 2 && boxes.size(1) == 4, kOp, "expected boxes of shape [T, 4], got ", shape_text(boxes));
  require(image_index.dim() == 1 && image_index.size(0) == boxes.size(0), kOp, "expected image_index of shape [",
          boxes.size(0), "] (one entry a box), got ", shape_text(image_index));
  require(size >= 1, kOp, "expected size of at least 1, got ", size);

  require(features.is_cpu() && boxes.is_cpu() && image_index.is_cpu(), kOp,
          "expected features, boxes and image_index on the CPU, got ", features.is_cpu() ? "cpu" : "another device",
          ", ", boxes.is_cpu() ? "cpu" : "another device", ", ", image_index.is_cpu() ? "cpu" : "another device");
  require(boxes.scalar_type() == ScalarType::Float, kOp, "expected boxes of dtype float32, got ",
          toString(boxes.scalar_type()));
  require(image_index.scalar_type() == ScalarType::Int || image_index.scalar_type() == ScalarType::Long, kOp,
          "expected image_index of dtype int32 or int64, got ", toString(image_index.scalar_type()));

  const Shapes s{features.size(0),   features.size(1),   features.size(2),  features.size(3), boxes.size(0), size,
                 features.stride(0), features.stride(1), features.stride(2)};
  require(s.channels <= 1 || features.stride(3) == 1, kOp, "expected features with unit stride over channels, got ",
          features.stride(3), " (a channels-last copy: features.contiguous())");
  require(s.tiles == 0 || (s.height >= 1 && s.width >= 1), kOp, "expected a map of at least one cell, got ", s.height,
          " x ", s.width);
  return s;
}

int64_t image_of(const Tensor& image_index, int64_t tile) {
  const void* data = image_index.const_data_ptr();
  const int64_t offset = tile * image_index.stride(0);
  return image_index.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data)[offset]
                                                      : static_cast<const int64_t*>(data)[offset];
}

// What every tile reads: its image, then `size` taps down and `size` taps across.
struct Taps {
  std::vector<int64_t> image;
  std::vector<Tap<double>> rows;
  std::vector<Tap<double>> columns;
};

Taps make_taps(const Tensor& boxes, const Tensor& image_index, const Shapes& s) {
  Taps taps;
  taps.image.reserve(s.tiles);
  taps.rows.reserve(s.tiles * s.size);
  taps.columns.reserve(s.tiles * s.size);
  const float* box_data = static_cast<const float*>(boxes.const_data_ptr());
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    float edge[4];
    for (int64_t side = 0; side < 4; ++side) {
      edge[side] = box_data[tile * boxes.stride(0) + side * boxes.stride(1)];
    }
    const bool finite =
        std::isfinite(edge[0]) && std::isfinite(edge[1]) && std::isfinite(edge[2]) && std::isfinite(edge[3]);
    require(finite && edge[0] <= edge[2] && edge[1] <= edge[3], kOp,
            "expected finite boxes with y0 <= y1 and x0 <= x1, got [", edge[0], ", ", edge[1], ", ", edge[2], ", ",
            edge[3], "] at tile ", tile);
    const int64_t image = image_of(image_index, tile);
    require(image >= 0 && image < s.images, kOp, "expected image_index between 0 and ", s.images - 1, ", got ", image,
            " at tile ", tile);

    taps.image.push_back(image);
    for (int64_t i = 0; i < s.size; ++i) {
      taps.rows.push_back(box_tap<double>(edge[0], edge[2], i, s.size, s.height));
      taps.columns.push_back(box_tap<double>(edge[1], edge[3], i, s.size, s.width));
    }
  }
  return taps;
}

template <typename Scalar>
void gather(const Tensor& features, const Taps& taps, const Shapes& s, const Tensor& out) {
  const Scalar* source = static_cast<const Scalar*>(features.const_data_ptr());
  Scalar* target = static_cast<Scalar*>(out.mutable_data_ptr());

  // A row of samples touches 5 * size * channels elements; smaller shares are not worth waking a thread for.
  const int64_t row_elements = 5 * s.size * s.channels;
  const int64_t grain = 1 + 65536 / (row_elements + 1);
  torch::stable::parallel_for(0, s.tiles * s.size, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t tile = row / s.size;
      const Tap<double>& y = taps.rows[row];
      const Scalar* image = source + taps.image[tile] * s.stride_image;
      const Scalar* upper = image + y.first * s.stride_row;
      const Scalar* lower = image + y.second * s.stride_row;
      const float wy1 = static_cast<float>(y.weight);
      const float wy0 = static_cast<float>(1.0 - y.weight);
      for (int64_t column = 0; column < s.size; ++column) {
        const Tap<double>& x = taps.columns[tile * s.size + column];
        const int64_t left = x.first * s.stride_cell;
        const int64_t right = x.second * s.stride_cell;
        const Blend blend{static_cast<float>(1.0 - x.weight), static_cast<float>(x.weight), wy0, wy1};
        blend_cells(upper + left, upper + right, lower + left, lower + right, blend,
                    target + (row * s.size + column) * s.channels, s.channels);
      }
    }
  });
}

Tensor crop_resize(Tensor features, Tensor boxes, Tensor image_index, int64_t size) {
  const Shapes s = check_shapes(features, boxes, image_index, size);
  const ScalarType dtype = features.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp,
          "expected features of dtype float32 or bfloat16, got ", toString(dtype));
  const Taps taps = make_taps(boxes, image_index, s);

  const Tensor out = torch::stable::new_empty(features, {s.tiles, s.size, s.size, s.channels});
  if (out.numel() == 0) {
    return out;
  }
  if (dtype == ScalarType::Float) {
    gather<float>(features, taps, s, out);
  } else {
    gather<BFloat16>(features, taps, s, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&crop_resize));
}

}  // namespace
}  // namespace fila
