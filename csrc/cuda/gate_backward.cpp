// The operator fila::gate_backward on CUDA tensors.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "arguments.h"
#include "gate.h"
#include "launch.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

template <typename Scalar, typename Token = Scalar>
void run(const Tensor& grad, const Tensor& branch, const Tensor& alpha, const Tensor& out, double* parts,
         double* total) {
  const GateRows<Scalar, Token> rows{static_cast<const Token*>(grad.const_data_ptr()),
                                     static_cast<const Scalar*>(branch.const_data_ptr()),
                                     static_cast<Scalar*>(out.mutable_data_ptr()),
                                     grad.stride(0),
                                     branch.stride(0),
                                     grad.size(0),
                                     grad.size(1)};
  launch_gate_backward(rows, static_cast<const Scalar*>(alpha.const_data_ptr()), parts, total,
                       current_stream(grad.get_device_index()));
}

Tensor gate_backward(Tensor grad, Tensor branch, Tensor alpha, Tensor out) {
  check_gate("fila::gate_backward", grad, branch, alpha, out, Device::kCuda);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor total = torch::stable::new_empty(alpha, {1}, ScalarType::Double);
  const Tensor workspace = torch::stable::new_empty(alpha, {kGateBlocks}, ScalarType::Double);
  double* parts = static_cast<double*>(workspace.mutable_data_ptr());
  double* sum = static_cast<double*>(total.mutable_data_ptr());
  const bool wide = grad.scalar_type() == ScalarType::Float;
  switch (branch.scalar_type()) {
    case ScalarType::Float:
      run<float>(grad, branch, alpha, out, parts, sum);
      break;
    case ScalarType::BFloat16:
      wide ? run<__nv_bfloat16, float>(grad, branch, alpha, out, parts, sum)
           : run<__nv_bfloat16>(grad, branch, alpha, out, parts, sum);
      break;
    default:
      wide ? run<__half, float>(grad, branch, alpha, out, parts, sum)
           : run<__half>(grad, branch, alpha, out, parts, sum);
  }
  return total;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CUDA, m) {
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}

}  // namespace
}  // namespace fila
