// Boxes to taps and back, against the definition in long double and by trying every cell and every sample.

#include "../sampling.h"

#include <limits>

#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

struct Box {
  float low, high;
};

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();
const std::vector<float> kEdges = {
    kNan,   kInfinity,  -kInfinity, 3e38f, -3e38f, 1e30f, -1e30f, 1e9f,  -1e9f,         16777216.0f,
    1e-45f, -1e-30f,    0.0f,       -0.0f, 0.5f,   1.0f,  1.5f,   -0.5f, 0.99999994f,   1.0000001f,
    7.0f,   6.9999995f, 7.0000005f, 8.0f,  39.0f,  40.0f, 40.5f,  -1.0f, 2147483648.0f, 9.3e18f,
};

Box random_box(int64_t cells) {
  const double low = uniform(-0.3, 1.1) * static_cast<double>(cells);
  const double extent = std::pow(2.0, uniform(-4, 7));
  switch (integer(0, 3)) {
    case 0:  // whole cells
      return {static_cast<float>(std::round(low)), static_cast<float>(std::round(low) + std::round(extent))};
    case 1:  // inverted
      return {static_cast<float>(low + extent), static_cast<float>(low)};
    default:
      return {static_cast<float>(low), static_cast<float>(low + extent)};
  }
}

long double clamp(long double value, long double low, long double high) {
  return value < low ? low : (value > high ? high : value);
}

// What a sample reads from a map whose cells hold their own numbers, less `origin`, an integer: far from the origin of
// a map the last digits of the positions themselves are beyond long double.
long double definition_on_ramp(Box box, int64_t index, int64_t size, int64_t cells, long double origin) {
  const long double low = box.low - origin, high = box.high - origin, extent = high - low;
  const long double least = -origin, most = static_cast<long double>(cells - 1) - origin;
  long double position =
      extent >= 1 ? clamp(low + (index + 0.5L) * extent / size - 0.5L, low, high - 1) : (low + high - 1) / 2;
  position = clamp(position, least, most);
  const long double below = std::floor(position), weight = position - below;
  const long double above = clamp(std::fmin(below + 1, std::ceil(high) - 1), least, most);
  return below + weight * (above - below);
}

template <typename Real>
void test_taps_follow_the_definition() {
  for (int round = 0; round < 20000; ++round) {
    const int64_t size = integer(1, 30), index = integer(0, size - 1);
    int64_t cells = integer(1, 60);
    Box box = random_box(cells);
    if (integer(0, 4) == 0) {  // far from the origin of a large map, where absolute float32 coordinates are coarse
      const int64_t offset = integer(0, 1 << 20);
      box = {box.low + static_cast<float>(offset), box.high + static_cast<float>(offset)};
      cells += offset;
    }
    const long double origin = std::floor(box.low);
    const Tap<Real> tap = box_tap<Real>(box.low, box.high, index, size, cells);
    const long double first = static_cast<long double>(tap.first) - origin;
    const long double got = first + tap.weight * static_cast<long double>(tap.second - tap.first);
    const long double want = definition_on_ramp(box, index, size, cells, origin);
    // Four roundings of numbers no larger than the box's extent and one cell; the origin is added in integers. The two
    // taps of an inverted box may lie far apart.
    const long double extent = std::fabs(static_cast<long double>(box.high) - static_cast<long double>(box.low));
    const long double allowed = 4 * static_cast<long double>(std::numeric_limits<Real>::epsilon()) * (extent + 2) *
                                std::fmax(1, std::fabs(static_cast<long double>(tap.second - tap.first)));
    EXPECT(std::fabs(got - want) <= allowed, "[", box.low, ", ", box.high, "] sample ", index, " of ", size, ", ",
           cells, " cells: off by ", static_cast<double>(got - want));
  }
}

// On whole cells float weighs as exactly as double: at scale 1 and odd scales one cell, at even scales halves.
void test_whole_cells_are_exact_in_float() {
  for (int64_t size = 1; size <= 40; ++size) {
    for (int64_t scale = 1; scale <= 12; ++scale) {
      const float low = static_cast<float>(integer(0, 100)), high = low + static_cast<float>(size * scale);
      for (int64_t index = 0; index < size; ++index) {
        const Tap<float> tap = box_tap<float>(low, high, index, size, 1000);
        const int64_t first = static_cast<int64_t>(low) + index * scale + (scale - 1) / 2;
        EXPECT(tap.first == first && tap.weight == (scale % 2 == 0 ? 0.5f : 0.0f), "size ", size, " scale ", scale);
        EXPECT(tap.second == (scale % 2 == 0 ? first + 1 : first), "size ", size, " scale ", scale);
      }
    }
  }
}

template <typename Real>
void check_tap_is_safe(Box box, int64_t index, int64_t size, int64_t cells) {
  const Tap<Real> tap = box_tap<Real>(box.low, box.high, index, size, cells);
  const bool finite = std::isfinite(static_cast<Real>(box.high) - static_cast<Real>(box.low));
  EXPECT(tap.first >= 0 && tap.first < cells && tap.second >= 0 && tap.second < cells, "[", box.low, ", ", box.high,
         "] sample ", index, " of ", size, ": cells ", tap.first, " and ", tap.second, " of ", cells);
  EXPECT(finite ? tap.weight >= 0 && tap.weight <= 1 : std::isnan(tap.weight), "[", box.low, ", ", box.high,
         "]: weight ", tap.weight);
  EXPECT(tap.weight != Real(0) || tap.second == tap.first, "[", box.low, ", ", box.high, "] reads a cell for nothing");
}

template <typename Real>
void test_taps_of_any_box_lie_on_the_map() {
  const std::vector<int64_t> sizes = {1, 2, 3, 24, 1000, int64_t(1) << 24};
  for (const float low : kEdges) {
    for (const float high : kEdges) {
      for (const int64_t size : sizes) {
        for (const int64_t cells : {int64_t(1), int64_t(2), int64_t(40), int64_t(1) << 24}) {
          for (const int64_t index : {int64_t(0), size / 2, size - 1}) {
            check_tap_is_safe<Real>({low, high}, index, size, cells);
          }
        }
      }
    }
  }
}

template <typename Real>
void check_range(Box box, int64_t size, int64_t cells) {
  std::vector<Tap<Real>> taps;
  for (int64_t index = 0; index < size; ++index) {
    taps.push_back(box_tap<Real>(box.low, box.high, index, size, cells));
  }
  std::vector<Real> sums(size, Real(0));
  for (int64_t cell = 0; cell < cells; ++cell) {
    const SampleRange range = box_samples<Real>(box.low, box.high, cell, size, cells);
    EXPECT(range.begin >= 0 && range.begin <= range.end && range.end <= size, "[", box.low, ", ", box.high, "]");
    for (int64_t index = 0; index < size; ++index) {
      const Real weight = tap_weight(taps[index], cell);
      const bool inside = index >= range.begin && index < range.end;
      EXPECT(inside || weight == Real(0), "[", box.low, ", ", box.high, "]: sample ", index, " of ", size,
             " reads cell ", cell, " of ", cells, ", the range is [", range.begin, ", ", range.end, ")");
      sums[index] += weight;
    }
  }
  for (int64_t index = 0; index < size; ++index) {
    EXPECT(std::isnan(sums[index]) || std::fabs(sums[index] - Real(1)) <= std::numeric_limits<Real>::epsilon(), "[",
           box.low, ", ", box.high, "]: weights of sample ", index, " add up to ", sums[index]);
  }
}

template <typename Real>
void test_ranges_hold_every_sample_that_reads_a_cell() {
  for (const float low : kEdges) {
    for (const float high : kEdges) {
      check_range<Real>({low, high}, 5, 9);
      check_range<Real>({low, high}, 24, 40);
    }
  }
  for (int round = 0; round < 4000; ++round) {
    const int64_t cells = integer(1, 40);
    check_range<Real>(random_box(cells), integer(1, 30), cells);
  }
}

// They would hold them all if they were the whole box: away from the borders no more than three samples are too many on
// either side.
void test_ranges_are_narrow() {
  for (int round = 0; round < 2000; ++round) {
    const int64_t cells = integer(20, 60), size = integer(1, 30);
    const Box box = random_box(cells);
    const double extent = static_cast<double>(box.high) - static_cast<double>(box.low);
    if (extent < 1) {
      continue;
    }
    const double step = extent / static_cast<double>(size);
    for (int64_t cell = 1; cell + 1 < cells; ++cell) {
      const SampleRange range = box_samples<double>(box.low, box.high, cell, size, cells);
      const double readers = 2 / step, clamped = cell - 1 <= box.low || cell + 1 >= box.high - 1 ? 1 / step + 1 : 0;
      EXPECT(static_cast<double>(range.end - range.begin) <= readers + clamped + 6, "[", box.low, ", ", box.high,
             "] cell ", cell, ": [", range.begin, ", ", range.end, ") of ", size);
    }
  }
}

}  // namespace

int main() {
  test_taps_follow_the_definition<double>();
  test_taps_follow_the_definition<float>();
  test_whole_cells_are_exact_in_float();
  test_taps_of_any_box_lie_on_the_map<double>();
  test_taps_of_any_box_lie_on_the_map<float>();
  test_ranges_hold_every_sample_that_reads_a_cell<double>();
  test_ranges_hold_every_sample_that_reads_a_cell<float>();
  test_ranges_are_narrow();
  return finish();
}
