// Maps flat rows to tokens: tile, patch, sample. The products run over all T * L rows of tokens [T, L, D], L = P + N,
// since patch tokens alone are not a matrix; tensors kept for the backward pass have T * N rows of samples.
//
// For host and device: the CUDA epilogues and the tests on the host execute the same functions.

#pragma once

#include <cstdint>

#include "sampling.h"

namespace fila {

// Division of numbers below 2^31 by one fixed divisor: a product's upper half, one addition and a shift (Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

inline Divisor make_divisor(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint64_t(1) << shift) < divisor) {
    ++shift;
  }
  const uint64_t excess = ((uint64_t(1) << shift) - divisor) << 32;
  return {divisor, static_cast<uint32_t>(excess / divisor + 1), shift};
}

FILA_HOST_DEVICE uint32_t quotient(uint32_t number, const Divisor& by) {
#if defined(__CUDA_ARCH__)
  const uint32_t upper = __umulhi(number, by.multiplier);
#else
  const uint32_t upper = static_cast<uint32_t>((uint64_t(number) * by.multiplier) >> 32);
#endif
  return (upper + number) >> by.shift;
}

// The flat rows of T tiles of P prefix and N patch tokens.
struct Rows {
  Divisor length;  // L
  int32_t prefix, patches;
};

inline Rows make_rows(int32_t prefix, int32_t patches) {
  return {make_divisor(static_cast<uint32_t>(prefix) + static_cast<uint32_t>(patches)), prefix, patches};
}

struct Token {
  int32_t tile;
  int32_t patch;  // negative for a prefix token
};

// Row below 2^31.
FILA_HOST_DEVICE Token token_of(int32_t row, const Rows& rows) {
  const int32_t tile = static_cast<int32_t>(quotient(static_cast<uint32_t>(row), rows.length));
  return {tile, row - tile * static_cast<int32_t>(rows.length.divisor) - rows.prefix};
}

FILA_HOST_DEVICE bool is_patch(const Token& token) {
  return token.patch >= 0;
}

// The row of a patch token among the T * N samples.
FILA_HOST_DEVICE int64_t sample_of(const Token& token, const Rows& rows) {
  return int64_t(token.tile) * rows.patches + token.patch;
}

// The tiles along K of a product over two operands side by side, [X ; S] W': each is padded to whole tiles by itself,
// so that no tile straddles both.
struct DepthTiles {
  int32_t first, second;
};

FILA_HOST_DEVICE DepthTiles depth_tiles(int32_t first_depth, int32_t second_depth, int32_t tile) {
  return {first_depth / tile + (first_depth % tile != 0), second_depth / tile + (second_depth % tile != 0)};
}

// After how many tiles a walk turns to the second operand; 0: never, there is none.
FILA_HOST_DEVICE int32_t turn_after(const DepthTiles& tiles) {
  return tiles.second > 0 ? tiles.first : 0;
}

// Of tiles [begin, begin + count), those of the first operand; the rest are the second's, from `second_begin` on.
struct DepthSplit {
  int32_t first_count, second_begin, second_count;
};

FILA_HOST_DEVICE DepthSplit split_depth(int32_t begin, int32_t count, const DepthTiles& tiles) {
  const int32_t left = tiles.first > begin ? tiles.first - begin : 0;
  const int32_t first_count = count < left ? count : left;
  return {first_count, begin + first_count - tiles.first, count - first_count};
}

}  // namespace fila
