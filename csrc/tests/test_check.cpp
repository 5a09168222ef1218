// Error messages name the operator, what was expected and what came.

#include "../check.h"

#include "../arguments.h"
#include "tensors.h"

namespace {

using namespace fila;
using namespace fila::testing;

void test_messages() {
  std::vector<float> values(12);
  const Tensor tensor = view_of(values, {3, 4});
  EXPECT(refusal([&] { require(true, "op", "nothing"); }).empty());
  const std::string text = refusal([&] { require(false, "fila::op", "expected x of shape ", tensor, ", got ", 2.5); });
  EXPECT(text == "fila::op: expected x of shape [3, 4], got 2.5", text);
  const Tensor scalar = view_of(values, {});
  EXPECT(refusal([&] { require(false, "op", scalar); }) == "op: []");
}

void test_products() {
  EXPECT(checked_product("op", "a result", {3, 4, 5}) == 60);
  EXPECT(checked_product("op", "a result", {}) == 1);
  EXPECT(checked_product("op", "a result", {int64_t(1) << 59}) == int64_t(1) << 59);
  const int64_t most = std::numeric_limits<int64_t>::max();
  for (const auto& sizes : {std::vector<int64_t>{int64_t(1) << 60, 1}, {most, most}, {most, 2}, {1 << 30, 1 << 30}}) {
    const std::string text = refusal([&] { checked_product("op", "a result", {sizes[0], sizes[1]}); });
    EXPECT(text == "op: expected a result of fewer than 2^60 elements", text);
  }
  EXPECT(checked_product("op", "a result", {0, most}) == 0);
}

void test_maps_and_boxes() {
  std::vector<float> values(2 * 4 * 4 * 3), edges(8);
  std::vector<int32_t> indices(2);
  std::vector<int64_t> long_indices(2);
  const Tensor map = view_of(values, {2, 4, 4, 3}), boxes = view_of(edges, {2, 4});
  const Tensor index = view_of(indices, {2}), long_index = view_of(long_indices, {2});
  const Geometry geometry{2, 4, 4, 2, 3};
  const auto maps = [&](const Tensor& tensor) {
    return refusal([&] { check_map("op", "features", tensor, "[B, h, w, C]", Device::kCpu); });
  };
  const auto sampling = [&](const Tensor& box, const Tensor& image, const Geometry& g) {
    return refusal([&] { check_boxes("op", box, image, g, map); });
  };
  EXPECT(maps(map).empty());
  EXPECT(contains(maps(boxes), "op: expected features of shape [B, h, w, C], got [2, 4]"), maps(boxes));
  EXPECT(contains(maps(view_of(values, {2, 3, 4, 4}, {48, 16, 1, 4})), "unit stride over channels, got 4"));
  EXPECT(maps(view_of(values, {2, 3, 4, 1}, {48, 16, 1, 4})).empty(), "one channel has no stride");
  EXPECT(contains(maps(view_of(long_indices, {1, 1, 1, 2})), "dtype float32, bfloat16 or float64, got Long"));

  EXPECT(sampling(boxes, index, geometry).empty());
  EXPECT(sampling(boxes, long_index, geometry).empty());
  EXPECT(contains(sampling(map, index, geometry), "boxes of shape [T, 4], got [2, 4, 4, 3]"));
  EXPECT(contains(sampling(boxes, boxes, geometry), "image_index of shape [2] (one entry a box), got [2, 4]"));
  EXPECT(contains(sampling(boxes, view_of(edges, {2}), geometry), "image_index of dtype int32 or int64, got Float"));
  EXPECT(contains(sampling(boxes, index, {2, 4, 4, 2, 0}), "size between 1 and 16777216, got 0"));
  EXPECT(contains(sampling(boxes, index, {2, 0, 4, 2, 3}), "at least one map of at least one cell, got 2 of 0 x 4"));
  EXPECT(sampling(boxes, index, {0, 0, 0, 0, 3}).empty(), "no tiles need no maps");
}

}  // namespace

int main() {
  test_messages();
  test_products();
  test_maps_and_boxes();
  return finish();
}
