// The gate's tanh and its slope in float32, in units of the last place of the exact value.

#include "../cpu/gate.h"

#include "tensors.h"

namespace {

using namespace fila;
using namespace fila::testing;

double units(float got, long double exact) {
  const float nearest = static_cast<float>(exact);
  const float next = std::nextafter(std::fabs(nearest), HUGE_VALF);
  const long double unit = static_cast<long double>(next) - std::fabs(static_cast<long double>(nearest));
  return static_cast<double>(std::fabs(static_cast<long double>(got) - exact) / unit);
}

// Every float of 16 leading bits, both signs: all magnitudes from denormal to infinite.
template <typename Visitor>
void visit_floats(const Visitor& visitor) {
  for (uint32_t high = 0; high < 0x7f80u; ++high) {
    for (const uint32_t low : {0u, 0x5555u, 0xffffu}) {
      const uint32_t bits = high << 16 | low;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      visitor(value);
      visitor(-value);
    }
  }
}

}  // namespace

int main() {
  double worst_tanh = 0, worst_slope = 0;
  visit_floats([&](float x) {
    const long double exact = std::tanh(static_cast<long double>(x));
    const double error = units(gate_tanh(x), exact);
    EXPECT(error <= 2, "tanh(", x, ") = ", gate_tanh(x), ", ", error, " units off");
    worst_tanh = std::fmax(worst_tanh, error);
    // 1 - tanh^2 = 1 / cosh^2, which does not cancel. Below e^-80 the exponential's range ends and zero will do.
    const long double cosh = std::cosh(static_cast<long double>(std::fmin(std::fabs(x), 1000.0f)));
    const float slope = gate_slope(x);
    if (std::fabs(x) <= 40) {
      const double off = units(slope, 1 / (cosh * cosh));
      EXPECT(off <= 4, "slope(", x, ") = ", slope, ", ", off, " units off");
      worst_slope = std::fmax(worst_slope, off);
    } else {
      EXPECT(slope >= 0 && slope < 1e-33f, "slope(", x, ") = ", slope);
    }
  });
  std::cerr << "tanh " << worst_tanh << ", slope " << worst_slope << " units of the last place\n";
  EXPECT(gate_tanh(INFINITY) == 1 && gate_tanh(-INFINITY) == -1 && std::isnan(gate_tanh(NAN)));
  EXPECT(std::isnan(gate_slope(NAN)) && gate_slope(0.0f) == 1);
  return finish();
}
