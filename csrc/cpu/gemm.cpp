#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <string>

// Weak: a torch built without oneDNN does not have it, and must still load this library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* result);

namespace fila {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor matrix_rows(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, first, count);
}

Tensor matrix_columns(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, count);
}

void linear_into(const Tensor& out, const Tensor& addend, const Tensor& x, const Tensor& weight) {
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), x.get(), transposed.get(), 1.0, 1.0));
}

bool has_linear(const Tensor& x, const Tensor& weight) {
#if defined(__x86_64__)
  if (aoti_torch_cpu__linear_pointwise == nullptr || x.numel() == 0 || weight.numel() == 0 || !x.is_contiguous() ||
      !weight.is_contiguous()) {
    return false;
  }
  static const bool fp32 = __builtin_cpu_supports("avx2");
  static const bool bf16 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return (x.scalar_type() == ScalarType::Float && fp32) || (x.scalar_type() == ScalarType::BFloat16 && bf16);
#else
  static_cast<void>(x);
  static_cast<void>(weight);
  return false;
#endif
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor dense = bias.is_contiguous() ? bias : torch::stable::contiguous(bias);  // oneDNN reads no strides
  AtenTensorHandle bias_handle = dense.get();
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), &bias_handle, "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

void gelu_inplace(const Tensor& z) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(z), torch::stable::detail::from(std::string("none"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

}  // namespace fila
