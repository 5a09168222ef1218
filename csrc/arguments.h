// Checks of maps, boxes and image indices. Every operator calls them, on whichever device its kernels run.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "check.h"

namespace fila {

// B maps of height x width cells, read by T boxes with `size` samples a side.
struct Geometry {
  int64_t images, height, width, tiles, size;
};

enum class Device { kCpu, kCuda };

// Refuses a map that is not [B, h, w, C] on the device with unit stride over channels, or of a dtype that has no
// kernels there: float32, bfloat16, and float64 on the CPU or float16 on a GPU.
void check_map(const char* op, const char* name, const torch::stable::Tensor& map, const char* shape, Device device);

// Refuses boxes and indices of a wrong shape or dtype or not on the device of `map`, and sizes that make no sense.
void check_boxes(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index,
                 const Geometry& geometry, const torch::stable::Tensor& map);

// Refuses a tensor that is not on the device of `like`.
void check_device(const char* op, const char* name, const torch::stable::Tensor& tensor,
                  const torch::stable::Tensor& like);

// The arguments of `crop_resize_backward`, on either device: boxes for every tile of `grad`, and sizes of a map that
// can be.
Geometry check_backward(const char* op, const torch::stable::Tensor& grad, const torch::stable::Tensor& boxes,
                        const torch::stable::Tensor& image_index, int64_t images, int64_t height, int64_t width,
                        Device device);

// The arguments of `gate_backward`, on either device: rows alike in shape, dtype and device.
void check_gate(const char* op, const torch::stable::Tensor& grad, const torch::stable::Tensor& branch,
                const torch::stable::Tensor& alpha, const torch::stable::Tensor& out, Device device);

// The arguments of the fused forward pass.
struct ForwardArguments {
  torch::stable::Tensor tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha;
  int64_t num_prefix_tokens;
  std::string gate, plan;
  std::optional<torch::stable::Tensor> hidden, branch;
};

// Letters: T tiles, P prefix tokens, G grid side, N = G * G, D token width, H hidden width, C feature channels.
struct ForwardSizes {
  int64_t prefix, grid, patches, width, hidden, channels;
  Geometry geometry;
};

// Refuses tensors that do not fit together and settings that are not served, `plans` being those that are.
ForwardSizes check_forward(const char* op, const ForwardArguments& arguments, Device device,
                           std::initializer_list<const char*> plans);

}  // namespace fila
