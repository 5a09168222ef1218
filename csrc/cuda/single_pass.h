// The whole forward pass in one kernel, for D = H = 1024 on compute capability 9.0: S and the hidden activation are
// never in device memory. gemm.h explains the letters and the requirements on sizes and addresses.

#pragma once

#include <cstdint>

#include "../crop_resize_index.h"
#include "gemm.h"

namespace fila {

// Elements of the map are of 16 bits; strides are multiples of kAlignment.
struct SinglePass {
  Element element;
  Rows rows;
  int64_t num_rows, size;
  Matrix tokens;    // X [R, D] as it is multiplied
  Matrix residual;  // X as it is added: the same, or, where it is mixed, of float32
  bool mixed;
  FeatureMaps<uint16_t> maps;
  TileBoxes boxes;
  Matrix fc1_weight, fc2_weight;
  const void *fc1_bias, *fc2_bias, *alpha;
  bool product;
  void* out;     // [R, D], dense, of the residual's type
  void* hidden;  // Z [T * N, H], dense; or null
  void* branch;  // M [T * N, D], dense; or null
};

// Enqueues on `device`, which is the current one; an exception where it is not of compute capability 9.0, or the
// library has no kernel for it.
void run_single_pass(const SinglePass& call, int32_t device, CUstream_st* stream);

// The kernels, one unit for each element. It returns null, or why the launch failed.
template <Element kElement>
const char* launch_single_pass(const SinglePass& call, CUstream_st* stream);

}  // namespace fila
