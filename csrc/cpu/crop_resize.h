// crop_resize on the CPU: a four-tap gather, channels innermost, one line of samples at a time.

#pragma once

#include <cstdint>

#include "taps.h"

namespace fila {

// A map's elements, channels-last: strides in elements over images, rows and cells, channels dense.
template <typename Scalar>
struct MapView {
  const Scalar* data;
  int64_t stride_image, stride_row, stride_cell, channels;
};

template <typename Scalar>
MapView<Scalar> view_map(const torch::stable::Tensor& map) {
  return {static_cast<const Scalar*>(map.const_data_ptr()), map.stride(0), map.stride(1), map.stride(2), map.size(3)};
}

// Samples of lines [first, last), a line being one row of one tile, to rows of `out` that lie `out_stride` apart.
template <typename Scalar>
void gather_lines(const MapView<Scalar>& map, const Taps& taps, int64_t size, int64_t first, int64_t last, Scalar* out,
                  int64_t out_stride);

}  // namespace fila
