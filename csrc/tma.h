// Requirements of the TMA unit on a matrix that it copies, checked so that an exception can name the one that fails;
// CuTe only asserts them, and prints what the driver says of the rest.

#pragma once

#include <cstdint>
#include <initializer_list>

namespace fila {

// Row-major, `stride` elements from row to row.
struct TmaMatrix {
  const void* data;
  int64_t stride, rows, columns;
};

// Why one of these matrices has no TMA descriptor, or null.
inline const char* tma_fault(std::initializer_list<TmaMatrix> matrices, int64_t element_bytes) {
  constexpr int64_t kBytes = 16, kMostBytes = int64_t(1) << 40, kMostExtent = int64_t(1) << 32;
  for (const TmaMatrix& matrix : matrices) {
    if (reinterpret_cast<uintptr_t>(matrix.data) % kBytes != 0) {
      return "TMA wants matrices at multiples of 16 bytes";
    }
    if (matrix.stride <= 0 || matrix.stride >= kMostBytes / element_bytes ||
        matrix.stride * element_bytes % kBytes != 0) {
      return "TMA wants rows a multiple of 16 bytes apart, less than 2^40";
    }
    if (matrix.rows < 1 || matrix.rows >= kMostExtent || matrix.columns < 1 || matrix.columns >= kMostExtent) {
      return "TMA wants 1 or more rows and columns, fewer than 2^32";
    }
  }
  return nullptr;
}

}  // namespace fila
