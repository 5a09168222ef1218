// The native operators' schemas. Kernels register themselves beside their code, in cpu/ and (with a CUDA build) cuda/.
//
// Everything here stands on LibTorch's stable ABI: one binary serves every torch from TORCH_TARGET_VERSION on, whatever
// C++ ABI that torch was built with. Schemas are fixed: an argument is never added to one, a new operator is.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fila, m) {
  // features [B, h, w, C], boxes [T, 4] float32 y0 x0 y1 x1 in cells, image_index [T]  ->  [T, size, size, C].
  // Without check_values any box and index is safe: indices are clamped, a box that is not finite gives NaN. On CUDA
  // values are never looked at, whatever check_values says: looking would wait for the device.
  m.def(
      "crop_resize(Tensor features, Tensor boxes, Tensor image_index, int size, *, bool check_values=True) -> Tensor");
  // grad [T, size, size, C]  ->  [images, height, width, C]
  m.def(
      "crop_resize_backward(Tensor grad, Tensor boxes, Tensor image_index, int images, int height, int width, *, "
      "bool check_values=True) -> Tensor");
  // The fused forward pass; plan is "sample_first", "project_first" or, on CUDA, "single_pass", gate "product" or
  // "scale". Where they are given, hidden [T * N, H] takes fc1's result and branch [T * N, D] fc2's, for the backward
  // pass.
  m.def(
      "cvfm_forward(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight, "
      "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int num_prefix_tokens, str gate, str plan, "
      "Tensor(a!)? hidden=None, Tensor(b!)? branch=None, *, bool check_values=True) -> Tensor");
  // The same without what is kept: no argument is written to, as torch.export wants it.
  m.def(
      "cvfm(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight, Tensor fc1_bias, "
      "Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int num_prefix_tokens, str gate, str plan, *, "
      "bool check_values=True) -> Tensor");
  // The product gate's derivative: grad, branch [rows, D]  ->  out = alpha (1 - tanh^2(alpha branch)) grad, and the sum
  // of (1 - tanh^2) grad branch, float64 [1], which is alpha's gradient.
  m.def("gate_backward(Tensor grad, Tensor branch, Tensor alpha, Tensor(a!) out) -> Tensor");
  // What the library was built with, as lines of key=value; see csrc/build_info.cpp.
  m.def("build_info() -> str");
}
