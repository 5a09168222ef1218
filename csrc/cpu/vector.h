// Inner loops over channels, compiled once per vector width. The library chooses one as it loads, so the binary runs on
// any processor.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute) && !defined(FILA_NO_CLONES)
#if __has_attribute(target_clones)
#define FILA_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef FILA_VECTOR_CLONES
#define FILA_VECTOR_CLONES
#endif
// Into each of its caller's clones, so that it is compiled for that width.
#define FILA_INLINE inline __attribute__((always_inline))

namespace fila {

using torch::headeronly::BFloat16;

// The type that sums of a type are kept in: at least float32.
template <typename Scalar>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename Scalar>
using accumulate_t = typename Accumulate<Scalar>::type;

FILA_INLINE float widen(float value) {
  return value;
}
FILA_INLINE double widen(double value) {
  return value;
}
FILA_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

FILA_INLINE void store(float value, float* out) {
  *out = value;
}
FILA_INLINE void store(double value, double* out) {
  *out = value;
}
// To the nearest, ties to even, NaN quiet: in integers, because compilers vectorise those and not BFloat16's own.
FILA_INLINE void store(float value, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// 64 bytes of Real, in one to four registers of whatever width the clone has. Where a sum has to stay in registers over
// a loop, this says so; plain loops over an array of sums are sometimes vectorised across the wrong loop.
template <typename Real>
struct Lanes {
  static constexpr int64_t kCount = 64 / sizeof(Real);
  typedef Real type __attribute__((vector_size(64)));
};
template <typename Scalar>
using lanes_t = typename Lanes<accumulate_t<Scalar>>::type;

typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef uint16_t LaneHalves __attribute__((vector_size(32)));

// Through a reference: clones of different widths would pass vectors by value in different ways.
template <typename Scalar>
FILA_INLINE void load_lanes(const Scalar* from, lanes_t<Scalar>& lanes) {
  if constexpr (sizeof(Scalar) == sizeof(accumulate_t<Scalar>)) {
    std::memcpy(&lanes, from, sizeof(lanes));
  } else {
    LaneHalves halves;
    std::memcpy(&halves, from, sizeof(halves));
    const LaneBits bits = __builtin_convertvector(halves, LaneBits) << 16;
    std::memcpy(&lanes, &bits, sizeof(lanes));
  }
}

template <typename Scalar>
FILA_INLINE void store_lanes(const lanes_t<Scalar>& lanes, Scalar* to) {
  if constexpr (sizeof(Scalar) == sizeof(accumulate_t<Scalar>)) {
    std::memcpy(to, &lanes, sizeof(lanes));
  } else {
    LaneBits bits;
    std::memcpy(&bits, &lanes, sizeof(bits));
    const LaneBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const LaneBits quiet = LaneBits{} + 0x7fc0u;
    const LaneHalves halves = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, LaneHalves);
    std::memcpy(to, &halves, sizeof(halves));
  }
}

}  // namespace fila
