// The product gate's backward pass in one sweep over memory; torch needs eight elementwise operations, each with its
// own buffer.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <vector>

#include "../arguments.h"
#include "gate.h"
#include "vector.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fila::gate_backward";
constexpr int64_t kLanes = 64;  // partial sums side by side, which is what lets the loop vectorise

// out = alpha (1 - tanh^2(alpha m)) grad of one row, and the row's sum of (1 - tanh^2) grad m. An infinite m has
// saturated the gate and adds nothing to alpha's gradient; a NaN stays one.
template <typename Token, typename Scalar>
FILA_INLINE double slope_loop(const Token* grad, const Scalar* m, accumulate_t<Scalar> alpha, Scalar* out,
                              int64_t width) {
  using Real = accumulate_t<Scalar>;
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real sums[kLanes] = {};
  const auto one = [&](int64_t i, Real* sum) __attribute__((always_inline)) {
    const Real value = widen(m[i]);
    const Real slope = gate_slope(alpha * value) * widen(grad[i]);
    store(alpha * slope, out + i);
    const Real size = value < Real(0) ? -value : value;
    *sum += size == kInfinity ? Real(0) : slope * value;
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      one(i + lane, sums + lane);
    }
  }
  for (; i < width; ++i) {
    one(i, sums);
  }
  double total = 0;
  for (const Real sum : sums) {
    total += sum;
  }
  return total;
}

FILA_VECTOR_CLONES double slope_row(const float* grad, const float* m, float alpha, float* out, int64_t width) {
  return slope_loop(grad, m, alpha, out, width);
}

FILA_VECTOR_CLONES double slope_row(const float* grad, const BFloat16* m, float alpha, BFloat16* out, int64_t width) {
  return slope_loop(grad, m, alpha, out, width);
}

FILA_VECTOR_CLONES double slope_row(const BFloat16* grad, const BFloat16* m, float alpha, BFloat16* out,
                                    int64_t width) {
  return slope_loop(grad, m, alpha, out, width);
}

FILA_VECTOR_CLONES double slope_row(const double* grad, const double* m, double alpha, double* out, int64_t width) {
  return slope_loop(grad, m, alpha, out, width);
}

template <typename Token, typename Scalar>
double run(const Tensor& grad, const Tensor& branch, const Tensor& alpha, const Tensor& out) {
  const Token* grad_data = static_cast<const Token*>(grad.const_data_ptr());
  const Scalar* m_data = static_cast<const Scalar*>(branch.const_data_ptr());
  Scalar* target = static_cast<Scalar*>(out.mutable_data_ptr());
  const auto factor = widen(*static_cast<const Scalar*>(alpha.const_data_ptr()));
  const int64_t rows = grad.size(0), width = grad.size(1);
  const int64_t grad_stride = grad.stride(0), m_stride = branch.stride(0), out_stride = out.stride(0);
  // One number a row, added up in their order: the same for any number of threads.
  std::vector<double> sums(rows);
  torch::stable::parallel_for(0, rows, 1 + 32768 / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      sums[row] =
          slope_row(grad_data + row * grad_stride, m_data + row * m_stride, factor, target + row * out_stride, width);
    }
  });
  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return total;
}

Tensor gate_backward(Tensor grad, Tensor branch, Tensor alpha, Tensor out) {
  check_gate(kOp, grad, branch, alpha, out, Device::kCpu);
  const Tensor total = torch::stable::new_empty(alpha, {1}, ScalarType::Double);
  double* sum = static_cast<double*>(total.mutable_data_ptr());
  switch (branch.scalar_type()) {
    case ScalarType::Float:
      *sum = run<float, float>(grad, branch, alpha, out);
      break;
    case ScalarType::BFloat16:
      *sum = grad.scalar_type() == ScalarType::Float ? run<float, BFloat16>(grad, branch, alpha, out)
                                                     : run<BFloat16, BFloat16>(grad, branch, alpha, out);
      break;
    default:
      *sum = run<double, double>(grad, branch, alpha, out);
  }
  return total;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CPU, m) {
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}

}  // namespace
}  // namespace fila
