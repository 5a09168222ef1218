// The taps of all tiles from boxes and indices of any layout; values that are refused, and values that are not checked.

#include "../cpu/taps.h"

#include "tensors.h"

namespace {

using namespace fila;
using namespace fila::testing;

const float kNan = std::numeric_limits<float>::quiet_NaN();

void test_layouts_and_index_types() {
  const Geometry g{3, 7, 9, 2, 4};
  std::vector<float> dense = {1, 2, 5, 8, 0.5f, -1, 3, 4};
  std::vector<float> across(16), down(8);  // every other column; transposed
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t side = 0; side < 4; ++side) {
      across[tile * 8 + side * 2] = down[side * 2 + tile] = dense[tile * 4 + side];
    }
  }
  std::vector<int32_t> ints = {2, 0};
  std::vector<int64_t> longs = {2, -1, 0};
  const Tensor index = view_of(ints, {2}), spread = view_of(longs, {2}, {2});
  const Taps want = make_taps("op", view_of(dense, {2, 4}), index, g, true);
  EXPECT(want.boxes == dense && want.image == (std::vector<int64_t>{2, 0}));
  for (const Taps& taps : {make_taps("op", view_of(across, {2, 4}, {8, 2}), spread, g, true),
                           make_taps("op", view_of(down, {2, 4}, {1, 2}), index, g, true)}) {
    EXPECT(taps.boxes == dense && taps.image == want.image);
    for (int64_t i = 0; i < 8; ++i) {
      EXPECT(taps.rows[i].first == want.rows[i].first && taps.columns[i].second == want.columns[i].second);
    }
  }
  for (int64_t i = 0; i < 4; ++i) {
    const Tap<double> row = box_tap<double>(0.5f, 3, i, 4, 7), column = box_tap<double>(-1, 4, i, 4, 9);
    EXPECT(want.rows[4 + i].first == row.first && want.rows[4 + i].weight == row.weight);
    EXPECT(want.columns[4 + i].first == column.first && want.columns[4 + i].weight == column.weight);
  }
}

void test_values() {
  const Geometry g{2, 4, 4, 1, 2};
  const auto with = [&](std::vector<float> box, int64_t image, bool check) {
    std::vector<int64_t> index = {image};
    return refusal([&] { make_taps("op", view_of(box, {1, 4}), view_of(index, {1}), g, check); });
  };
  EXPECT(with({0, 0, 4, 4}, 1, true).empty());
  for (const std::vector<float>& box : {std::vector<float>{0, kNan, 1, 1},
                                        {0, 0, HUGE_VALF, 1},
                                        {2, 0, 1, 1},
                                        {0, 3, 1, 2},
                                        {1, 0, 1, 2},
                                        {0, 2, 3, 2}}) {
    const std::string text = with(box, 0, true);
    EXPECT(contains(text, "op: expected finite boxes with y0 < y1 and x0 < x1, got [") && contains(text, "] at tile 0"),
           text);
    EXPECT(with(box, 0, false).empty());
  }
  EXPECT(contains(with({0, 0, 4, 4}, 2, true), "image_index between 0 and 1, got 2 at tile 0"));
  EXPECT(contains(with({0, 0, 4, 4}, -1, true), "image_index between 0 and 1, got -1 at tile 0"));
  for (const int64_t image : {int64_t(1) << 62, -(int64_t(1) << 62), int64_t(-1)}) {
    std::vector<int64_t> index = {image};
    std::vector<float> box = {0, 0, 4, 4};
    const Taps taps = make_taps("op", view_of(box, {1, 4}), view_of(index, {1}), g, false);
    EXPECT(taps.image[0] == (image > 0 ? 1 : 0));
  }
}

}  // namespace

int main() {
  test_layouts_and_index_types();
  test_values();
  return finish();
}
