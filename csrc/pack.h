// Packs: as many neighbouring elements of 16 or 32 bits as fill 16 bytes, the unit in which GPU kernels read and write.
// For host and device.

#pragma once

#include <cstdint>

#include "sampling.h"

namespace fila {

// How a stored type becomes float32 and is made of it.
template <typename Scalar>
struct Number;
template <>
struct Number<float> {
  static FILA_HOST_DEVICE float widen(float value) { return value; }
  static FILA_HOST_DEVICE float narrow(float value) { return value; }
};

// Neighbouring channels that are read and written at once.
template <typename Scalar, int kWidth>
struct alignas(sizeof(Scalar) * kWidth) Pack {
  Scalar element[kWidth];
};

// Reads a pack that nobody writes meanwhile, on a GPU in one access of 16 bytes.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE Pack<Scalar, kWidth> load_pack(const Scalar* in) {
  using Vector = Pack<Scalar, kWidth>;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Vector) == sizeof(uint4)) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(in));
    return *reinterpret_cast<const Vector*>(&bits);
  }
#endif
  return *reinterpret_cast<const Vector*>(in);
}

// Writes a pack, on a GPU in one access of 16 bytes: copies of the structure are at times split into four.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE void store_pack(const Pack<Scalar, kWidth>& pack, Scalar* out) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    __stwb(reinterpret_cast<uint4*>(out), *reinterpret_cast<const uint4*>(&pack));
    return;
  }
#endif
  *reinterpret_cast<Pack<Scalar, kWidth>*>(out) = pack;
}

}  // namespace fila
