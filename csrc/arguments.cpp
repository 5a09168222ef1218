#include "arguments.h"

#include <torch/headeronly/core/ScalarType.h>

#include <string>

namespace fila {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return "the CPU";
  }
  return tensor.is_cuda() ? "CUDA device " + std::to_string(tensor.get_device_index()) : "another device";
}

}  // namespace

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  const std::string expected = device_of(like), got = device_of(tensor);
  require(expected == got, op, "expected ", name, " on ", expected, ", got ", got);
}

void check_map(const char* op, const char* name, const Tensor& map, const char* shape, Device device) {
  require(map.dim() == 4, op, "expected ", name, " of shape ", shape, ", got ", map);
  const ScalarType dtype = map.scalar_type();
  const bool common = dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
  if (device == Device::kCpu) {
    require_cpu(op, name, map);
    require(common || dtype == ScalarType::Double, op, "expected ", name,
            " of dtype float32, bfloat16 or float64, got ", toString(dtype));
  } else {
    require(map.is_cuda(), op, "expected ", name, " on a CUDA device, got ", device_of(map));
    require(common || dtype == ScalarType::Half, op, "expected ", name, " of dtype float32, bfloat16 or float16, got ",
            toString(dtype));
  }
  require(map.size(3) <= 1 || map.stride(3) == 1, op, "expected ", name, " with unit stride over channels, got ",
          map.stride(3), " (a channels-last copy: ", name, ".contiguous())");
}

void check_boxes(const char* op, const Tensor& boxes, const Tensor& image_index, const Geometry& geometry,
                 const Tensor& map) {
  require(boxes.dim() == 2 && boxes.size(1) == 4, op, "expected boxes of shape [T, 4], got ", boxes);
  require(image_index.dim() == 1 && image_index.size(0) == boxes.size(0), op, "expected image_index of shape [",
          boxes.size(0), "] (one entry a box), got ", image_index);
  check_device(op, "boxes", boxes, map);
  check_device(op, "image_index", image_index, map);
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

Geometry check_backward(const char* op, const Tensor& grad, const Tensor& boxes, const Tensor& image_index,
                        int64_t images, int64_t height, int64_t width, Device device) {
  check_map(op, "grad", grad, "[T, size, size, C]", device);
  require(grad.size(1) == grad.size(2), op, "expected grad of shape [T, size, size, C], got ", grad);
  const Geometry geometry{images, height, width, grad.size(0), grad.size(1)};
  for (const int64_t side : {images, height, width}) {
    require(side >= 0 && side <= kMaxSide, op, "expected images, height and width between 0 and ", kMaxSide, ", got ",
            images, ", ", height, " and ", width);
  }
  require(boxes.dim() != 2 || boxes.size(0) == geometry.tiles, op, "expected boxes of shape [", geometry.tiles,
          ", 4] (one a tile of grad), got ", boxes);
  check_boxes(op, boxes, image_index, geometry, grad);
  checked_product(op, "a gradient", {images, height, width, grad.size(3)});
  return geometry;
}

}  // namespace fila
