// Converts tensors to the arguments that the kernels' launchers take.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "arguments.h"
#include "crop_resize_index.h"

namespace fila {

template <typename Scalar>
FeatureMaps<Scalar> view_maps(const torch::stable::Tensor& maps) {
  return {static_cast<const Scalar*>(maps.const_data_ptr()),
          maps.stride(0),
          maps.stride(1),
          maps.stride(2),
          maps.size(0),
          maps.size(1),
          maps.size(2),
          maps.size(3)};
}

inline TileBoxes view_boxes(const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index) {
  return {static_cast<const float*>(boxes.const_data_ptr()),
          boxes.stride(0),
          boxes.stride(1),
          image_index.const_data_ptr(),
          image_index.scalar_type() == torch::headeronly::ScalarType::Long,
          image_index.stride(0),
          boxes.size(0)};
}

// Kernels count cells of a line, channels and tiles in 32 bits.
inline void check_sides(const char* op, const Geometry& g, int64_t channels) {
  require(g.height <= kMaxSide && g.width <= kMaxSide && g.images <= kMaxSide && g.tiles <= kMaxSide &&
              channels <= kMaxSide,
          op, "expected images, tiles, cells a side and channels of at most ", kMaxSide, ", got ", g.images, ", ",
          g.tiles, ", ", g.height, " x ", g.width, " and ", channels);
}

}  // namespace fila
