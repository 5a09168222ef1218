// The work of every GPU thread in the product gate's backward pass; for host and device.
//
//     out = alpha (1 - tanh^2(alpha m)) grad,    total = sum (1 - tanh^2(alpha m)) grad m
//
// A block takes every so many rows, its threads share out a row's packs. Sums are those of one thread, of the block's
// threads, and of the blocks, each in a fixed order: equal to the last bit each time.

#pragma once

#include <cmath>
#include <cstdint>

#include "pack.h"

namespace fila {

constexpr int kGateThreads = 128;
constexpr int64_t kGateBlocks = 2048;  // at most; enough for every multiprocessor to have all the threads it holds

// The gradient of float32 tokens stays in float32 beside a branch of 16 bits.
template <typename Scalar, typename Token = Scalar>
struct GateRows {
  const Token* grad;
  const Scalar* branch;
  Scalar* out;  // dense
  int64_t grad_stride, branch_stride, rows, width;

  int64_t blocks() const {
    const int64_t most = width == 0 ? 0 : rows;
    return most < kGateBlocks ? most : kGateBlocks;
  }
};

// 1 - tanh^2(u), also where tanh is so near 1 that the difference would vanish.
FILA_HOST_DEVICE float tanh_slope(float u) {
  const float e = expf(-2.0f * fabsf(u));
  const float sum = 1.0f + e;
  return 4.0f * e / (sum * sum);
}

// One entry's term of alpha's gradient: an infinite one has saturated the gate, and one that is not finite is
// nothing to a closed gate.
FILA_HOST_DEVICE float alpha_term(float slope, float m, float alpha) {
  const bool quiet = std::isinf(m) || (std::isnan(m) && alpha == 0.0f);
  return quiet ? 0.0f : slope * m;
}

// Thread `thread` of `threads` writes its share of the rows of block `block` of `blocks`, and returns its sum.
template <typename Scalar, int kWidth, typename Token>
FILA_HOST_DEVICE double gate_share(const GateRows<Scalar, Token>& rows, float alpha, int64_t block, int64_t blocks,
                                   int thread, int threads) {
  using Vector = Pack<Scalar, kWidth>;
  // As many elements as one access takes: wider types come in several.
  constexpr int kPart = kWidth > 1 && sizeof(Token) > sizeof(Scalar) ? kWidth / 2 : kWidth;
  using GradVector = Pack<Token, kPart>;
  using N = Number<Scalar>;
  double total = 0;
  for (int64_t row = block; row < rows.rows; row += blocks) {
    for (int64_t channel = int64_t(thread) * kWidth; channel < rows.width; channel += int64_t(threads) * kWidth) {
      GradVector grad[kWidth / kPart];
      for (int part = 0; part < kWidth / kPart; ++part) {
        grad[part] = *reinterpret_cast<const GradVector*>(rows.grad + row * rows.grad_stride + channel + part * kPart);
      }
      const Vector branch = *reinterpret_cast<const Vector*>(rows.branch + row * rows.branch_stride + channel);
      Vector result;
      float sum = 0;
      for (int k = 0; k < kWidth; ++k) {
        const float m = N::widen(branch.element[k]);
        const float slope = tanh_slope(alpha * m) * Number<Token>::widen(grad[k / kPart].element[k % kPart]);
        result.element[k] = N::narrow(alpha * slope);
        sum += alpha_term(slope, m, alpha);
      }
      store_pack(result, rows.out + row * rows.width + channel);
      total += sum;
    }
  }
  return total;
}

}  // namespace fila
