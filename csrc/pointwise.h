// The arithmetic of the products' epilogues on one element, for host and device: the tests run the GPU's own functions.
// A layer's epilogue turns the accumulator first into Z or M, which the backward pass may keep, then into its result.

#pragma once

#include <cmath>

#include "sampling.h"

namespace fila {

// GELU by the error function, as torch's: NaN at -infinity.
FILA_HOST_DEVICE float gelu(float z) {
  return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
}

// X + tanh(alpha M), or X + tanh(alpha) M.
struct Gate {
  float alpha, factor;
  bool product;
};

FILA_HOST_DEVICE Gate make_gate(float alpha, bool product) {
  return {alpha, product ? 1.0f : tanhf(alpha), product};
}

// A closed gate passes `x` on as it is, whatever M holds.
FILA_HOST_DEVICE float gated(float x, float m, const Gate& gate) {
  if (gate.alpha == 0.0f) {
    return x;
  }
  return x + gate.factor * (gate.product ? tanhf(gate.alpha * m) : m);
}

// fc1: Z, with the interpolated projection added where there is one, and A = gelu(Z).
struct Fc1Layer {
  bool has_addend;

  FILA_HOST_DEVICE float keep(float sum, float bias, float addend) const {
    return sum + bias + (has_addend ? addend : 0.0f);
  }
  FILA_HOST_DEVICE float finish(float z, float, bool) const { return gelu(z); }
};

// fc2: M and the fused token. The rows of prefix tokens, whose S nobody wrote, hold X.
struct Fc2Layer {
  Gate gate;

  FILA_HOST_DEVICE float keep(float sum, float bias, float) const { return sum + bias; }
  FILA_HOST_DEVICE float finish(float m, float x, bool patch) const { return patch ? gated(x, m, gate) : x; }
};

}  // namespace fila
