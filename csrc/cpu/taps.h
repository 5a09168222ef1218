// What the CPU operators share: the checks of maps, boxes and image indices, and the taps made of them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../sampling.h"

namespace fila {

// B maps of height x width cells, read by T boxes with `size` samples a side.
struct Geometry {
  int64_t images, height, width, tiles, size;
};

// What every tile reads: its image, then `size` taps down and `size` taps across.
struct Taps {
  std::vector<float> boxes;  // [T, 4]
  std::vector<int64_t> image;
  std::vector<Tap<double>> rows;
  std::vector<Tap<double>> columns;
};

// Refuses boxes and indices of a wrong shape, dtype or device, and sizes that make no sense.
void check_boxes(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index,
                 const Geometry& geometry);

// Refuses a map that is not [B, h, w, C] on the CPU with unit stride over channels, or of an unserved dtype.
void check_map(const char* op, const char* name, const torch::stable::Tensor& map, const char* shape);

// With `check_values` a box that is not finite or ordered, or an index off the maps, is refused; without, any value is
// safe: indices are clamped and a box that is not finite gives NaN weights.
Taps make_taps(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index,
               const Geometry& geometry, bool check_values);

}  // namespace fila
