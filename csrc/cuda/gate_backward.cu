#include "element.h"
#include "gate.h"
#include "launch.h"

namespace fila {
namespace {

// The sum over a block's threads, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double sums[kGateThreads];
  sums[threadIdx.x] = value;
  for (int half = kGateThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  return sums[0];
}

template <typename Scalar, int kWidth, typename Token>
__global__ void __launch_bounds__(kGateThreads)
    gate_bwd_kernel(GateRows<Scalar, Token> rows, const Scalar* p_alpha, double* parts) {
  const float alpha = Number<Scalar>::widen(*p_alpha);
  const double sum =
      block_sum(gate_share<Scalar, kWidth, Token>(rows, alpha, blockIdx.x, gridDim.x, threadIdx.x, kGateThreads));
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kGateThreads) gate_sum_kernel(const double* parts, int64_t count, double* total) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < count; part += kGateThreads) {
    sum += parts[part];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *total = sum;
  }
}

}  // namespace

template <typename Scalar, typename Token>
void launch_gate_backward(const GateRows<Scalar, Token>& rows, const Scalar* alpha, double* parts, double* total,
                          cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(Scalar);
  const int64_t blocks = rows.blocks();
  if (blocks > 0) {
    const bool vectors = vector_width<Scalar>({rows.grad, rows.branch, rows.out},
                                              {rows.grad_stride, rows.branch_stride, rows.width}) == kWidth;
    if (vectors) {
      gate_bwd_kernel<Scalar, kWidth, Token><<<grid_blocks(blocks), kGateThreads, 0, stream>>>(rows, alpha, parts);
    } else {
      gate_bwd_kernel<Scalar, 1, Token><<<grid_blocks(blocks), kGateThreads, 0, stream>>>(rows, alpha, parts);
    }
    check_launch("gate_bwd_kernel", {rows.rows, rows.width});
  }
  gate_sum_kernel<<<1, kGateThreads, 0, stream>>>(parts, blocks, total);
  check_launch("gate_sum_kernel", {blocks});
}

template void launch_gate_backward(const GateRows<float>&, const float*, double*, double*, cudaStream_t);
template void launch_gate_backward(const GateRows<__nv_bfloat16>&, const __nv_bfloat16*, double*, double*,
                                   cudaStream_t);
template void launch_gate_backward(const GateRows<__half>&, const __half*, double*, double*, cudaStream_t);
template void launch_gate_backward(const GateRows<__nv_bfloat16, float>&, const __nv_bfloat16*, double*, double*,
                                   cudaStream_t);
template void launch_gate_backward(const GateRows<__half, float>&, const __half*, double*, double*, cudaStream_t);

}  // namespace fila
