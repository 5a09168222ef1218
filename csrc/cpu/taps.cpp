#include "taps.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>

namespace fila {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
      require(finite && edge[0] < edge[2] && edge[1] < edge[3], op,
              "expected finite boxes with y0 < y1 and x0 < x1, got [", edge[0], ", ", edge[1], ", ", edge[2], ", ",
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
