// Launchers of crop_resize's kernels. They take device pointers and strides in elements, no tensors, so that nvcc sees
// nothing of torch. Scalar is float, __nv_bfloat16 or __half.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../crop_resize_index.h"

namespace fila {

// Samples `size` x `size` positions of every box, rounded once. Loads and stores are 16 bytes wide where pointers,
// strides and channels allow it, else one element. Sizes along an axis are at most 2^24; an empty result is no launch.
template <typename Scalar>
void launch_crop_resize(const FeatureMaps<Scalar>& maps, const TileBoxes& boxes, int64_t size,
                        const SampleRows<Scalar>& out, cudaStream_t stream);

// The transpose, into every element of the dense `out` [B, h, w, C]. One writer a cell, which adds up in the order of
// the tiles: equal to the last bit each time. `tables` names the sizes and a workspace of `tables.bytes()`.
template <typename Scalar>
void launch_crop_resize_backward(const SampleGradients<Scalar>& grad, const TileBoxes& boxes, const CropTables& tables,
                                 Scalar* out, cudaStream_t stream);

}  // namespace fila
