// Matrix products by the libraries that torch ships, called through its stable ABI.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fila {

// Rows [first, first + count) of a matrix, a view.
torch::stable::Tensor matrix_rows(const torch::stable::Tensor& matrix, int64_t first, int64_t count);

// Columns [first, first + count) of a matrix, a view.
torch::stable::Tensor matrix_columns(const torch::stable::Tensor& matrix, int64_t first, int64_t count);

// out = x weight' + addend, all of them matrices of any stride but `addend`, which may also be one row. `out` may be
// `addend`.
void linear_into(const torch::stable::Tensor& out, const torch::stable::Tensor& addend, const torch::stable::Tensor& x,
                 const torch::stable::Tensor& weight);

// Whether `linear` can be called: oneDNN is in this torch, and it has kernels for this processor and these matrices.
bool has_linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight);

// x weight' + bias by oneDNN. On float32 it is faster than `linear_into`, which takes MKL, even with the copy that its
// new tensor may need.
torch::stable::Tensor linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                             const torch::stable::Tensor& bias);

// Erf GELU in place.
void gelu_inplace(const torch::stable::Tensor& z);

}  // namespace fila
