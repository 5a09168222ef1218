// Launchers of the product gate's backward kernels. Scalar is float, __nv_bfloat16 or __half, Token that or float.

#pragma once

#include <cuda_runtime_api.h>

#include "../gate_index.h"

namespace fila {

// Writes every element of `rows.out`, and the sum to `total`. `parts` has room for kGateBlocks sums.
template <typename Scalar, typename Token>
void launch_gate_backward(const GateRows<Scalar, Token>& rows, const Scalar* alpha, double* parts, double* total,
                          cudaStream_t stream);

}  // namespace fila
