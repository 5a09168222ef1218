// The taps of all tiles, computed once per call; the CPU operators share them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../arguments.h"
#include "../sampling.h"

namespace fila {

// The taps of every tile: its image, then `size` taps down and `size` taps across.
struct Taps {
  std::vector<float> boxes;  // [T, 4]
  std::vector<int64_t> image;
  std::vector<Tap<double>> rows;
  std::vector<Tap<double>> columns;
};

// With `check_values` a box that is not finite or ordered, or an index off the maps, is refused; without, any value is
// safe: indices are clamped and a box that is not finite gives NaN weights.
Taps make_taps(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index,
               const Geometry& geometry, bool check_values);

}  // namespace fila
