// The geometry of the products over flat rows, as the CUDA epilogues and main loops execute it, against loops over
// tiles, tokens and operands.

#include "../rows.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

void test_quotient() {
  constexpr uint32_t kMost = 0x7fffffffu;
  std::vector<uint32_t> divisors{1,   2,    3,     5,     7,     10,        17,        64,   576,
                                 577, 1024, 65535, 65536, 65537, kMost / 2, kMost - 1, kMost};
  for (int i = 0; i < 200; ++i) {
    divisors.push_back(static_cast<uint32_t>(integer(1, kMost)));
    divisors.push_back(static_cast<uint32_t>(integer(1, 5000)));
  }
  for (const uint32_t by : divisors) {
    const Divisor divisor = make_divisor(by);
    const auto check = [&](uint64_t number) {
      if (number <= kMost) {
        const uint32_t got = quotient(static_cast<uint32_t>(number), divisor);
        EXPECT(got == number / by, number, " / ", by, " came out as ", got);
      }
    };
    for (int i = 0; i < 200; ++i) {
      // Around multiples of the divisor, where a wrong multiplier shows first.
      const uint64_t multiple = static_cast<uint64_t>(integer(0, kMost / by)) * by;
      for (const uint64_t number : {multiple - (multiple > 0), multiple, multiple + 1}) {
        check(number);
      }
      check(static_cast<uint64_t>(integer(0, kMost)));
    }
    for (const uint64_t number : {uint64_t(0), uint64_t(1), uint64_t(kMost) - 1, uint64_t(kMost)}) {
      check(number);
    }
  }
}

void test_tokens() {
  for (const auto& [tiles, prefix, patches] : {std::array{1, 0, 1}, {3, 1, 4}, {5, 1, 576}, {4, 0, 9}, {2, 7, 16}}) {
    const Rows rows = make_rows(prefix, patches);
    int32_t row = 0;
    int64_t sample = 0;
    for (int32_t tile = 0; tile < tiles; ++tile) {
      for (int32_t place = 0; place < prefix + patches; ++place, ++row) {
        const Token token = token_of(row, rows);
        EXPECT(token.tile == tile && token.patch == place - prefix, "row ", row);
        EXPECT(is_patch(token) == (place >= prefix), "row ", row);
        if (is_patch(token)) {
          EXPECT(sample_of(token, rows) == sample, "row ", row);
          ++sample;
        }
      }
    }
    EXPECT(sample == int64_t(tiles) * patches);
  }
  // The last row that 32 bits count, whose sample's elements 32 bits do not.
  const Rows rows = make_rows(1, 576);
  const Token last = token_of(0x7fffffff, rows);
  EXPECT(last.tile == 0x7fffffff / 577 && sample_of(last, rows) * 1024 > (int64_t(1) << 40));
}

// However a walk over the tiles of [X ; S] is cut into pieces, each operand's tiles come once and in order, and all of
// the first's before the second's.
void test_depth() {
  for (const auto& [first, second] :
       {std::pair(64, 64), {64, 0}, {1024, 1536}, {1000, 200}, {8, 8}, {72, 1}, {1024, 192}}) {
    for (const int32_t tile : {32, 64}) {
      const DepthTiles tiles = depth_tiles(first, second, tile);
      EXPECT(tiles.first * tile >= first && (tiles.first - 1) * tile < first);
      EXPECT(second == 0 ? tiles.second == 0 : tiles.second * tile >= second && (tiles.second - 1) * tile < second);
      for (int32_t piece = 1; piece <= tiles.first + tiles.second; ++piece) {
        std::vector<int32_t> walked_first, walked_second;
        for (int32_t begin = 0; begin < tiles.first + tiles.second; begin += piece) {
          const int32_t count = std::min(piece, tiles.first + tiles.second - begin);
          const DepthSplit split = split_depth(begin, count, tiles);
          EXPECT(split.first_count + split.second_count == count);
          for (int32_t i = 0; i < split.first_count; ++i) {
            EXPECT(walked_second.empty());
            walked_first.push_back(begin + i);
          }
          for (int32_t i = 0; i < split.second_count; ++i) {
            walked_second.push_back(split.second_begin + i);
          }
        }
        std::vector<int32_t> expected(tiles.first);
        std::iota(expected.begin(), expected.end(), 0);
        EXPECT(walked_first == expected, "pieces of ", piece);
        expected.resize(tiles.second);
        std::iota(expected.begin(), expected.end(), 0);
        EXPECT(walked_second == expected, "pieces of ", piece);
      }
    }
  }
}

}  // namespace

int main() {
  test_quotient();
  test_tokens();
  test_depth();
  return finish();
}
