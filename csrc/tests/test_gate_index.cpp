// Walks every block and every thread of the product gate's CUDA kernel on the host: each element is written exactly
// once, with the derivative in float64, and so is the sum.

#include "../gate_index.h"

#include <limits>
#include <vector>

#include "testing.h"

namespace fila {

// A float32 that counts how often it is stored.
struct Stored {
  float value = std::numeric_limits<float>::quiet_NaN();
  int32_t writes = 0;
  Stored() = default;
  explicit Stored(float number) : value(number) {}
  Stored(const Stored&) = default;
  Stored& operator=(const Stored& other) {
    value = other.value;
    ++writes;
    return *this;
  }
};
template <>
struct Number<Stored> {
  static float widen(const Stored& number) { return number.value; }
  static Stored narrow(float value) { return Stored(value); }
};

namespace {

using namespace fila::testing;

constexpr int kWide = 4;
using Rows = std::vector<Pack<Stored, kWide>>;

Rows make_rows(int64_t elements, double scale) {
  Rows rows(elements / kWide + 1);
  for (auto& pack : rows) {
    for (Stored& element : pack.element) {
      element.value = static_cast<float>(scale * normal());
    }
  }
  return rows;
}

template <int kWidth>
void test_rows(int64_t rows, int64_t width, int64_t padding, float alpha, double scale) {
  const int64_t stride = width + padding;
  Rows grad = make_rows(rows * stride, 1), branch = make_rows(rows * stride, scale), out = make_rows(rows * width, 0);
  const GateRows<Stored> view{
      grad.data()->element, branch.data()->element, out.data()->element, stride, stride, rows, width};
  double total = 0;
  for (int64_t block = view.blocks() - 1; block >= 0; --block) {
    for (int thread = kGateThreads - 1; thread >= 0; --thread) {
      total += gate_share<Stored, kWidth>(view, alpha, block, view.blocks(), thread, kGateThreads);
    }
  }
  double expected = 0, largest = 0;
  for (int64_t element = 0; element < rows * width; ++element) {
    const int64_t from = element / width * stride + element % width;
    const double m = view.branch[from].value, cosh = std::cosh(std::fmin(std::fabs(double(alpha) * m), 300.0));
    const double slope = double(view.grad[from].value) / (cosh * cosh);
    expected += slope * m;
    largest += std::fabs(slope * m);
    const double want = alpha * slope, got = view.out[element].value;
    EXPECT(view.out[element].writes == 1, rows, " x ", width, ", element ", element);
    // Rounding 2 alpha m moves its exponential by |2 alpha m| units in the last place.
    const double bound = 1.2e-7 * (8 + 4 * std::fabs(alpha * m)) * std::fabs(want) + 1e-37;
    EXPECT(std::fabs(got - want) <= bound, "alpha m = ", alpha * m, ": ", got, " for ", want);
  }
  EXPECT(std::fabs(total - expected) <= 2e-6 * largest, rows, " x ", width, ": ", total, " for ", expected);
}

// Of 16 bits, all but the type's rounding: stored as whole numbers.
struct Short {
  int16_t value;
};
}  // namespace
template <>
struct Number<Short> {
  static float widen(Short number) { return number.value; }
  static Short narrow(float value) { return {static_cast<int16_t>(std::lrint(value))}; }
};
namespace {

// The gradient of float32 tokens is read in two accesses for each of the branch: every element by its own.
void test_a_wider_gradient() {
  constexpr int kPack = 8, kRows = 5, kWidth = 3 * kPack;
  std::vector<Pack<float, 4>> grad(kRows * kWidth / 4);
  std::vector<Pack<Short, kPack>> branch(kRows * kWidth / kPack), out(branch.size());
  for (int i = 0; i < kRows * kWidth; ++i) {
    grad[i / 4].element[i % 4] = static_cast<float>(i + 1);
    branch[i / kPack].element[i % kPack] = {0};
  }
  const GateRows<Short, float> view{
      grad.data()->element, branch.data()->element, out.data()->element, kWidth, kWidth, kRows, kWidth};
  for (int64_t block = 0; block < view.blocks(); ++block) {
    for (int thread = 0; thread < kGateThreads; ++thread) {
      gate_share<Short, kPack>(view, 2.0f, block, view.blocks(), thread, kGateThreads);
    }
  }
  for (int i = 0; i < kRows * kWidth; ++i) {
    EXPECT(view.out[i].value == 2 * (i + 1), "element ", i, ": ", view.out[i].value);
  }
}

void test_entries_that_are_not_finite() {
  const float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT(tanh_slope(kInf) == 0.0f && tanh_slope(-kInf) == 0.0f && tanh_slope(0.0f) == 1.0f);
  EXPECT(std::isnan(tanh_slope(kNan)));
  EXPECT(alpha_term(0.0f, kInf, 0.5f) == 0.0f && alpha_term(0.0f, -kInf, 0.5f) == 0.0f, "a saturated gate");
  EXPECT(alpha_term(kNan, kNan, 0.0f) == 0.0f, "a closed gate");
  EXPECT(std::isnan(alpha_term(kNan, kNan, 0.5f)), "an open one");
}

}  // namespace
}  // namespace fila

int main() {
  for (const double scale : {1e-3, 1.0, 30.0}) {
    fila::test_rows<1>(7, 13, 3, 0.7f, scale);
    fila::test_rows<4>(5, 1024, 0, -1.5f, scale);
    fila::test_rows<4>(5000, 8, 4, 0.7f, scale);  // more rows than blocks
    fila::test_rows<1>(3, 300, 0, 0.0f, scale);   // more elements than threads, a closed gate
  }
  fila::test_rows<1>(0, 4, 0, 1.0f, 1.0);
  fila::test_rows<1>(4, 0, 0, 1.0f, 1.0);
  fila::test_a_wider_gradient();
  fila::test_entries_that_are_not_finite();
  return fila::testing::finish();
}
