// The 16-bit types inside kernels, and loads and stores as wide as alignment allows.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>

#include "../pack.h"

namespace fila {

template <>
struct Number<__nv_bfloat16> {
  static __device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
};
template <>
struct Number<__half> {
  static __device__ __forceinline__ float widen(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
};

constexpr int64_t kVectorBytes = 16;

// Elements of 16 bytes if rows at these pointers and strides, of so many channels, can be accessed so; else one.
template <typename Scalar>
int vector_width(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  constexpr int64_t kWidth = kVectorBytes / int64_t(sizeof(Scalar));
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes != 0) {
      return 1;
    }
  }
  for (const int64_t stride : strides) {
    if (stride % kWidth != 0) {
      return 1;
    }
  }
  return kWidth;
}

// Blocks of a one-dimensional grid; kernels step through what is more.
inline unsigned grid_blocks(int64_t blocks) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

}  // namespace fila
