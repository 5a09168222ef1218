// Inner loops over channels, compiled once for each vector width and chosen when the library is loaded: the binary
// itself stays a generic one.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

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

// What a type is added up in: at least float32.
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

}  // namespace fila
