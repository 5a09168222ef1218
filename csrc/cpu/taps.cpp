#include "taps.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>

#include "../check.h"

namespace fila {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_boxes(const char* op, const Tensor& boxes, const Tensor& image_index, const Geometry& geometry) {
  require(boxes.dim() == 2 && boxes.size(1) == 4, op, "expected boxes of shape [T, 4], got ", boxes);
  require(image_index.dim() == 1 && image_index.size(0) == boxes.size(0), op, "expected image_index of shape [",
          boxes.size(0), "] (one entry a box), got ", image_index);
  require_cpu(op, "boxes", boxes);
  require_cpu(op, "image_index", image_index);
  require(boxes.scalar_type() == ScalarType::Float, op, "expected boxes of dtype float32, got ",
          toString(boxes.scalar_type()));
  require(image_index.scalar_type() == ScalarType::Int || image_index.scalar_type() == ScalarType::Long, op,
          "expected image_index of dtype int32 or int64, got ", toString(image_index.scalar_type()));
  // Beyond 2^24 samples a side the positions of neighbours coincide, and products of sizes near their limits.
  require(geometry.size >= 1 && geometry.size <= kMaxSide, op, "expected size between 1 and ", kMaxSide, ", got ",
          geometry.size);
  require(geometry.tiles == 0 || (geometry.images >= 1 && geometry.height >= 1 && geometry.width >= 1), op,
          "expected at least one map of at least one cell, got ", geometry.images, " of ", geometry.height, " x ",
          geometry.width);
}

void check_map(const char* op, const char* name, const Tensor& map, const char* shape) {
  require(map.dim() == 4, op, "expected ", name, " of shape ", shape, ", got ", map);
  require_cpu(op, name, map);
  const ScalarType dtype = map.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Double, op, "expected ",
          name, " of dtype float32, bfloat16 or float64, got ", toString(dtype));
  require(map.size(3) <= 1 || map.stride(3) == 1, op, "expected ", name, " with unit stride over channels, got ",
          map.stride(3), " (a channels-last copy: ", name, ".contiguous())");
}

namespace {

int64_t image_of(const Tensor& image_index, int64_t tile) {
  const void* data = image_index.const_data_ptr();
  const int64_t offset = tile * image_index.stride(0);
  return image_index.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data)[offset]
                                                      : static_cast<const int64_t*>(data)[offset];
}

}  // namespace

Taps make_taps(const char* op, const Tensor& boxes, const Tensor& image_index, const Geometry& g, bool check_values) {
  Taps taps;
  taps.boxes.reserve(g.tiles * 4);
  taps.image.reserve(g.tiles);
  taps.rows.reserve(g.tiles * g.size);
  taps.columns.reserve(g.tiles * g.size);
  const float* box_data = static_cast<const float*>(boxes.const_data_ptr());
  for (int64_t tile = 0; tile < g.tiles; ++tile) {
    float edge[4];
    for (int64_t side = 0; side < 4; ++side) {
      edge[side] = box_data[tile * boxes.stride(0) + side * boxes.stride(1)];
    }
    const int64_t image = image_of(image_index, tile);
    if (check_values) {
      const bool finite =
          std::isfinite(edge[0]) && std::isfinite(edge[1]) && std::isfinite(edge[2]) && std::isfinite(edge[3]);
      require(finite && edge[0] <= edge[2] && edge[1] <= edge[3], op,
              "expected finite boxes with y0 <= y1 and x0 <= x1, got [", edge[0], ", ", edge[1], ", ", edge[2], ", ",
              edge[3], "] at tile ", tile);
      require(image >= 0 && image < g.images, op, "expected image_index between 0 and ", g.images - 1, ", got ", image,
              " at tile ", tile);
    }
    taps.boxes.insert(taps.boxes.end(), edge, edge + 4);
    taps.image.push_back(clamp_cell(image, g.images));
    for (int64_t i = 0; i < g.size; ++i) {
      taps.rows.push_back(box_tap<double>(edge[0], edge[2], i, g.size, g.height));
      taps.columns.push_back(box_tap<double>(edge[1], edge[3], i, g.size, g.width));
    }
  }
  return taps;
}

}  // namespace fila
