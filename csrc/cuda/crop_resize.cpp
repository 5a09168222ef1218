// The operators fila::crop_resize and fila::crop_resize_backward on CUDA tensors. Values of boxes and indices are not
// checked, since a check would wait for the device; whatever they are, nothing outside is read or written.

#include "crop_resize.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "arguments.h"
#include "launch.h"
#include "tensors.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

template <typename Scalar>
void gather(const Tensor& features, const TileBoxes& boxes, int64_t size, const Tensor& out) {
  const SampleRows<Scalar> rows{static_cast<Scalar*>(out.mutable_data_ptr()), size * size * features.size(3),
                                features.size(3)};
  launch_crop_resize(view_maps<Scalar>(features), boxes, size, rows, current_stream(features.get_device_index()));
}

Tensor crop_resize(Tensor features, Tensor boxes, Tensor image_index, int64_t size, bool) {
  constexpr const char* kOp = "fila::crop_resize";
  check_map(kOp, "features", features, "[B, h, w, C]", Device::kCuda);
  const Geometry g{features.size(0), features.size(1), features.size(2), boxes.dim() == 2 ? boxes.size(0) : 0, size};
  check_boxes(kOp, boxes, image_index, g, features);
  check_sides(kOp, g, features.size(3));
  checked_product(kOp, "a result", {g.tiles, size, size, features.size(3)});

  const DeviceGuard guard(features.get_device_index());
  const Tensor out = torch::stable::new_empty(features, {g.tiles, size, size, features.size(3)});
  const TileBoxes tiles = view_boxes(boxes, image_index);
  switch (features.scalar_type()) {
    case ScalarType::Float:
      gather<float>(features, tiles, size, out);
      break;
    case ScalarType::BFloat16:
      gather<__nv_bfloat16>(features, tiles, size, out);
      break;
    default:
      gather<__half>(features, tiles, size, out);
  }
  return out;
}

template <typename Scalar>
void scatter(const Tensor& grad, const TileBoxes& boxes, const CropTables& tables, const Tensor& out) {
  const SampleGradients<Scalar> samples{static_cast<const Scalar*>(grad.const_data_ptr()),
                                        grad.stride(0),
                                        grad.stride(1),
                                        grad.stride(2),
                                        grad.size(1),
                                        grad.size(3)};
  launch_crop_resize_backward(samples, boxes, tables, static_cast<Scalar*>(out.mutable_data_ptr()),
                              current_stream(grad.get_device_index()));
}

Tensor crop_resize_backward(Tensor grad, Tensor boxes, Tensor image_index, int64_t images, int64_t height,
                            int64_t width, bool) {
  constexpr const char* kOp = "fila::crop_resize_backward";
  const Geometry g = check_backward(kOp, grad, boxes, image_index, images, height, width, Device::kCuda);
  check_sides(kOp, g, grad.size(3));
  checked_product(kOp, "tables", {g.tiles, 2 * g.size + height + width});

  const DeviceGuard guard(grad.get_device_index());
  const Tensor out = torch::stable::new_empty(grad, {images, height, width, grad.size(3)});
  CropTables tables{g.tiles, g.size, images, height, width, nullptr, nullptr, nullptr, nullptr};
  const Tensor workspace = torch::stable::new_empty(grad, {tables.bytes()}, ScalarType::Byte);
  tables.place(workspace.mutable_data_ptr());
  const TileBoxes tiles = view_boxes(boxes, image_index);
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      scatter<float>(grad, tiles, tables, out);
      break;
    case ScalarType::BFloat16:
      scatter<__nv_bfloat16>(grad, tiles, tables, out);
      break;
    default:
      scatter<__half>(grad, tiles, tables, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CUDA, m) {
  m.impl("crop_resize", TORCH_BOX(&crop_resize));
  m.impl("crop_resize_backward", TORCH_BOX(&crop_resize_backward));
}

}  // namespace
}  // namespace fila
