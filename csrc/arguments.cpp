#include "arguments.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

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

int64_t square_root(int64_t number) {
  int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(number)));
  while (root * root > number) {
    --root;
  }
  while ((root + 1) * (root + 1) <= number) {
    ++root;
  }
  return root;
}

void check_parameter(const char* op, const char* name, const Tensor& tensor, const Tensor& features,
                     std::vector<int64_t> shape, const char* letters) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    same = same && tensor.size(axis) == shape[axis];
    expected += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  }
  require(same, op, "expected ", name, " of shape ", letters, " = ", expected, "], got ", tensor);
  check_device(op, name, tensor, features);
  require(tensor.scalar_type() == features.scalar_type(), op, "expected ", name, " of dtype ",
          toString(features.scalar_type()), " (as features), got ", toString(tensor.scalar_type()));
}

// Under autocast tokens and their gradient stay in float32 while the rest is in 16 bits.
void check_residual(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  const ScalarType got = tensor.scalar_type(), rest = like.scalar_type();
  const bool low = rest == ScalarType::BFloat16 || rest == ScalarType::Half;
  require(got == rest || (low && got == ScalarType::Float), op, "expected ", name, " of dtype ", toString(rest),
          low ? " or float32 (" : " (", "as ", like_name, "), got ", toString(got));
}

void check_saved(const char* op, const char* name, const std::optional<Tensor>& saved, const Tensor& features,
                 int64_t rows, int64_t width) {
  if (!saved.has_value()) {
    return;
  }
  check_parameter(op, name, *saved, features, {rows, width}, "[T * N, width]");
  require(saved->is_contiguous(), op, "expected a contiguous ", name);
}

}  // namespace

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  const std::string expected = device_of(like), got = device_of(tensor);
  require(expected == got, op, "expected ", name, " on ", expected, ", got ", got);
}

void check_kind(const char* op, const char* name, const Tensor& tensor, Device device) {
  const ScalarType dtype = tensor.scalar_type();
  const bool common = dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
  if (device == Device::kCpu) {
    require_cpu(op, name, tensor);
    require(common || dtype == ScalarType::Double, op, "expected ", name,
            " of dtype float32, bfloat16 or float64, got ", toString(dtype));
  } else {
    require(tensor.is_cuda(), op, "expected ", name, " on a CUDA device, got ", device_of(tensor));
    require(common || dtype == ScalarType::Half, op, "expected ", name, " of dtype float32, bfloat16 or float16, got ",
            toString(dtype));
  }
}

void check_map(const char* op, const char* name, const Tensor& map, const char* shape, Device device) {
  require(map.dim() == 4, op, "expected ", name, " of shape ", shape, ", got ", map);
  check_kind(op, name, map, device);
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
  require(boxes.size(0) <= kMaxSide, op, "expected at most ", kMaxSide, " boxes, got ", boxes.size(0));
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

namespace {

void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& grad) {
  require(tensor.dim() == 2 && tensor.size(0) == grad.size(0) && tensor.size(1) == grad.size(1), op, "expected ", name,
          " of shape ", grad, " (as grad), got ", tensor);
  check_device(op, name, tensor, grad);
  require(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, "expected ", name, " with a last stride of 1, got ",
          tensor.stride(1));
}

}  // namespace

void check_gate(const char* op, const Tensor& grad, const Tensor& branch, const Tensor& alpha, const Tensor& out,
                Device device) {
  require(grad.dim() == 2, op, "expected grad of shape [rows, D], got ", grad);
  check_kind(op, "grad", grad, device);
  check_rows(op, "grad", grad, grad);
  check_rows(op, "branch", branch, grad);
  check_rows(op, "out", out, grad);
  check_kind(op, "branch", branch, device);
  check_residual(op, "grad", grad, "branch", branch);
  require(out.scalar_type() == branch.scalar_type(), op, "expected out of dtype ", toString(branch.scalar_type()),
          " (as branch), got ", toString(out.scalar_type()));
  require(out.is_contiguous(), op, "expected a contiguous out");
  require(alpha.dim() == 1 && alpha.size(0) == 1, op, "expected alpha of shape [1], got ", alpha);
  check_device(op, "alpha", alpha, grad);
  require(alpha.scalar_type() == branch.scalar_type(), op, "expected alpha of dtype ", toString(branch.scalar_type()),
          " (as branch), got ", toString(alpha.scalar_type()));
  require_apart(op, "out", out, "grad", grad);
  require_apart(op, "out", out, "branch", branch);
  require_apart(op, "out", out, "alpha", alpha);
}

namespace {

// What is kept for the backward pass lies in memory of its own.
void check_apart(const char* op, const ForwardArguments& a) {
  const std::pair<const char*, const Tensor&> read[] = {
      {"tokens", a.tokens},           {"features", a.features},     {"boxes", a.boxes},
      {"image_index", a.image_index}, {"fc1_weight", a.fc1_weight}, {"fc1_bias", a.fc1_bias},
      {"fc2_weight", a.fc2_weight},   {"fc2_bias", a.fc2_bias},     {"alpha", a.alpha}};
  for (const auto& [name, tensor] : read) {
    if (a.hidden.has_value()) {
      require_apart(op, "hidden", *a.hidden, name, tensor);
    }
    if (a.branch.has_value()) {
      require_apart(op, "branch", *a.branch, name, tensor);
    }
  }
  if (a.hidden.has_value() && a.branch.has_value()) {
    require_apart(op, "branch", *a.branch, "hidden", *a.hidden);
  }
}

}  // namespace

ForwardSizes check_forward(const char* op, const ForwardArguments& a, Device device,
                           std::initializer_list<const char*> plans) {
  require(a.gate == "product" || a.gate == "scale", op, "expected gate 'product' or 'scale', got '", a.gate, "'");
  std::string served;
  for (const char* plan : plans) {
    served += std::string(served.empty() ? "'" : plan == *(plans.end() - 1) ? " or '" : ", '") + plan + "'";
  }
  require(std::find(plans.begin(), plans.end(), a.plan) != plans.end(), op, "expected plan ", served, ", got '", a.plan,
          "'");
  check_map(op, "features", a.features, "[B, h, w, C]", device);
  require(a.tokens.dim() == 3, op, "expected tokens of shape [T, P + N, D], got ", a.tokens);
  check_device(op, "tokens", a.tokens, a.features);
  check_residual(op, "tokens", a.tokens, "features", a.features);
  // Within these bounds neither the difference nor the square of a root can overflow.
  const int64_t prefix = a.num_prefix_tokens, length = a.tokens.size(1);
  const bool bounded = prefix >= 0 && prefix < length && length - prefix <= kMaxSide * kMaxSide;
  const int64_t patches = bounded ? length - prefix : 0;
  require(bounded && square_root(patches) * square_root(patches) == patches, op,
          "expected tokens with num_prefix_tokens of 0 or more and a square number of patch tokens, got ", a.tokens,
          " and ", prefix);
  const int64_t grid = square_root(patches), width = a.tokens.size(2), channels = a.features.size(3);
  const int64_t hidden = a.fc1_weight.dim() > 0 ? a.fc1_weight.size(0) : 0;
  require(width <= 1 || a.tokens.stride(2) == 1, op, "expected tokens with a last stride of 1, got ",
          a.tokens.stride(2));
  const Geometry geometry{a.features.size(0), a.features.size(1), a.features.size(2), a.tokens.size(0), grid};
  require(a.boxes.dim() != 2 || a.boxes.size(0) == geometry.tiles, op, "expected boxes of shape [", geometry.tiles,
          ", 4] (as tokens), got ", a.boxes);
  check_boxes(op, a.boxes, a.image_index, geometry, a.features);
  check_parameter(op, "fc1_weight", a.fc1_weight, a.features, {hidden, width + channels}, "[H, D + C]");
  check_parameter(op, "fc1_bias", a.fc1_bias, a.features, {hidden}, "[H]");
  check_parameter(op, "fc2_weight", a.fc2_weight, a.features, {width, hidden}, "[D, H]");
  check_parameter(op, "fc2_bias", a.fc2_bias, a.features, {width}, "[D]");
  check_parameter(op, "alpha", a.alpha, a.features, {1}, "[1]");
  const int64_t rows = checked_product(op, "tokens", {geometry.tiles, patches});
  checked_product(op, "a hidden activation", {rows, std::max(hidden, width + channels)});
  check_saved(op, "hidden", a.hidden, a.features, rows, hidden);
  check_saved(op, "branch", a.branch, a.features, rows, width);
  check_apart(op, a);
  return {prefix, grid, patches, width, hidden, channels, geometry};
}

}  // namespace fila
