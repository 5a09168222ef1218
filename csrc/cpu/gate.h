// The gate's arithmetic: tanh for vectors of float32, and the gate applied to a row of tokens.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../sampling.h"
#include "vector.h"

namespace fila {

// e^x for x in [0, 80] within two units in the last place: 2^n e^r with |r| <= ln(2) / 2 (Cephes' polynomial).
FILA_INLINE float exp_positive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

// tanh within three units in the last place, also near zero; NaN stays NaN.
FILA_INLINE float gate_tanh(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = x + x * square * p;
  const float size = x < 0.0f ? -x : x;
  const float large = 1.0f - 2.0f / (exp_positive(2.0f * (size < 10.0f ? size : 10.0f)) + 1.0f);
  const float signed_large = x < 0.0f ? -large : large;
  return size < 0.625f || x != x ? small : signed_large;
}

FILA_INLINE double gate_tanh(double x) {
  return std::tanh(x);
}

// 1 - tanh^2(x) to a few units in the last place, also where tanh is so near 1 that the difference would vanish.
FILA_INLINE float gate_slope(float x) {
  const float size = x < 0.0f ? -x : x;
  const float share = 1.0f / (exp_positive(2.0f * (size < 40.0f ? size : 40.0f)) + 1.0f);
  return x != x ? x : 4.0f * share * (1.0f - share);
}

FILA_INLINE double gate_slope(double x) {
  const double tanh = std::tanh(x);
  return 1.0 - tanh * tanh;
}

}  // namespace fila
