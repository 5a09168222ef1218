// The work of each block of a cluster in the single-pass kernel, and its operands' places in shared memory.
//
// Four blocks share 128 rows. Along K a cluster walks through one sequence of tiles of 64: those of X, those of S, and
// those of the hidden activation, of which each block makes four. All blocks need the same rows, and each provides its
// part: a quarter of the rows of X and S, and the whole tile of its own hidden columns.
//
// For host and device, so that the tests execute it.

#pragma once

#include <cstdint>

#include "sampling.h"

namespace fila {

constexpr int kSinglePassWidth = 1024;  // D and H
constexpr int kClusterBlocks = 4;
constexpr int kClusterRows = 128;
constexpr int kQuarterRows = kClusterRows / kClusterBlocks;
constexpr int kBlockColumns = kSinglePassWidth / kClusterBlocks;  // of the hidden activation, then of the result
constexpr int kDepthTile = 64;
constexpr int kVectorElements = 8;  // of 16 bits, in 16 bytes
constexpr int kTileVectors = kDepthTile / kVectorElements;

// Where vector `vector` of row `row` lies in a tile of rows of 64 elements of 16 bits, in elements, as TMA and wgmma
// swizzle 128 bytes: a row's eight vectors are permuted by the row's last three bits. The tile begins at a multiple of
// 1024 bytes.
FILA_HOST_DEVICE int32_t swizzled(int32_t row, int32_t vector) {
  return row * kDepthTile + (vector ^ row % 8) * kVectorElements;
}

enum class Operand { kTokens, kSamples, kHidden };

struct WalkTile {
  Operand operand;
  int32_t index;  // within the operand
};

struct Walk {
  int32_t token_tiles, sample_tiles, hidden_tiles;

  FILA_HOST_DEVICE int32_t count() const { return token_tiles + sample_tiles + hidden_tiles; }
  FILA_HOST_DEVICE WalkTile tile(int32_t at) const {
    if (at < token_tiles) {
      return {Operand::kTokens, at};
    }
    at -= token_tiles;
    return at < sample_tiles ? WalkTile{Operand::kSamples, at} : WalkTile{Operand::kHidden, at - sample_tiles};
  }
};

FILA_HOST_DEVICE Walk make_walk(int32_t channels) {
  return {kSinglePassWidth / kDepthTile, (channels + kDepthTile - 1) / kDepthTile, kSinglePassWidth / kDepthTile};
}

// The block that makes a hidden tile, and which of its own it is.
FILA_HOST_DEVICE int32_t hidden_owner(int32_t index) {
  return index / (kBlockColumns / kDepthTile);
}
FILA_HOST_DEVICE int32_t hidden_slot(int32_t index) {
  return index % (kBlockColumns / kDepthTile);
}

// The ring of stages that all tiles go through: which one, and how often it was filled before, modulo two.
template <int kStages>
struct Ring {
  int32_t stage = 0;
  uint32_t phase = 0;

  FILA_HOST_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1u;
    }
  }
};

// Where the sums of one group's wgmma of 64 rows lie (PTX ISA, "wgmma.mma_async", layout of D): a thread has pairs of
// neighbours, in two rows eight apart by turns, and after both in the next vector of columns.
constexpr int kPairs = kClusterRows / 2 * kBlockColumns / 128 / 2;  // of each thread

struct SumPair {
  int32_t half, vector;  // 0 for the upper row and 1 for the lower; the columns' vector
};

FILA_HOST_DEVICE constexpr SumPair sum_pair(int32_t pair) {
  return {pair % 2, pair / 2};
}
FILA_HOST_DEVICE int32_t sum_row(int32_t thread, int32_t half) {
  return thread / 32 * 16 + thread % 32 / 4 + half * 8;
}
// Within the vector.
FILA_HOST_DEVICE int32_t sum_column(int32_t thread) {
  return thread % 4 * 2;
}

}  // namespace fila
