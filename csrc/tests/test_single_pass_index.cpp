// The index arithmetic of the single-pass kernel: the swizzle against the hardware's rule for addresses, the walk
// over the three operands, the ring's phases against a count, the pairs of sums against the whole matrix.

#include "../single_pass_index.h"

#include <algorithm>
#include <set>
#include <utility>

#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

// Of a byte's address, bits 4 to 6 are combined with bits 7 to 9.
int32_t swizzled_address(int32_t address) {
  return address ^ (address >> 3 & 0x70);
}

void test_swizzle() {
  std::set<int32_t> places;
  for (int32_t row = 0; row < kBlockColumns; ++row) {
    for (int32_t vector = 0; vector < kTileVectors; ++vector) {
      const int32_t place = swizzled(row, vector);
      EXPECT(place * 2 == swizzled_address(row * kDepthTile * 2 + vector * 16), "row ", row, ", vector ", vector);
      EXPECT(swizzled(row + 8, vector) == place + 8 * kDepthTile, "row ", row, ", vector ", vector);
      places.insert(place);
    }
    // Quarters of a tile are contiguous: this is how they are copied from block to block.
    const int32_t quarter = row / kQuarterRows;
    EXPECT(*places.begin() == 0 && *places.rbegin() < (quarter + 1) * kQuarterRows * kDepthTile, "row ", row);
  }
  EXPECT(places.size() == size_t(kBlockColumns * kTileVectors));
}

void test_walk() {
  for (const int32_t channels : {8, 64, 72, 192, 384, 768, 1536}) {
    const Walk walk = make_walk(channels);
    EXPECT(walk.sample_tiles * kDepthTile >= channels && (walk.sample_tiles - 1) * kDepthTile < channels);
    int32_t at = 0;
    for (const auto& [operand, count] : {std::pair(Operand::kTokens, kSinglePassWidth / kDepthTile),
                                         {Operand::kSamples, walk.sample_tiles},
                                         {Operand::kHidden, kSinglePassWidth / kDepthTile}}) {
      for (int32_t index = 0; index < count; ++index, ++at) {
        const WalkTile tile = walk.tile(at);
        EXPECT(tile.operand == operand && tile.index == index, "tile ", at, " of ", channels, " channels");
      }
    }
    EXPECT(at == walk.count());
  }
  for (int32_t index = 0; index < kSinglePassWidth / kDepthTile; ++index) {
    EXPECT(hidden_owner(index) * kBlockColumns + hidden_slot(index) * kDepthTile == index * kDepthTile);
    EXPECT(hidden_slot(index) < kBlockColumns / kDepthTile);
  }
}

void test_ring() {
  Ring<3> ring;
  for (int fills = 0; fills < 100; ++fills, ring.next()) {
    EXPECT(ring.stage == fills % 3 && ring.phase == uint32_t(fills / 3 % 2), "after ", fills);
  }
}

// The sums of two groups of 128 threads are all of 128 rows of 256 columns, once.
void test_sums() {
  std::set<std::pair<int32_t, int32_t>> seen;
  for (int32_t group = 0; group < 2; ++group) {
    for (int32_t thread = 0; thread < 128; ++thread) {
      for (int32_t i = 0; i < kPairs; ++i) {
        const SumPair pair = sum_pair(i);
        for (int32_t j = 0; j < 2; ++j) {
          const int32_t row = group * 64 + sum_row(thread, pair.half);
          const int32_t column = pair.vector * kVectorElements + sum_column(thread) + j;
          EXPECT(row < kClusterRows && column < kBlockColumns);
          EXPECT(seen.emplace(row, column).second, "row ", row, ", column ", column, " twice");
        }
      }
    }
  }
  EXPECT(seen.size() == size_t(kClusterRows * kBlockColumns));
}

}  // namespace

int main() {
  test_swizzle();
  test_walk();
  test_ring();
  test_sums();
  return finish();
}
