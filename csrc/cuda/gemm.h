// The forward pass's two products; bias, activation, gate and residual are in their epilogues. Matrices are row-major,
// of bfloat16 or float16, accumulated in float32; each has its row stride in elements. R = T * L flat rows of tokens
// (rows.h).
//
//     fc1    Z = [X ; S] W1' + b1,  A = gelu(Z)
//     fc2    M = A W2' + b2,        out = X + tanh(alpha M)  or  X + tanh(alpha) M,  prefix tokens as they are
//
// Under autocast X and out of fc2 are of float32, and fc1 reads a copy of X in the products' type.
//
// Sizes and strides are multiples of kAlignment and addresses of 16 bytes: that is what TMA and 16-byte copies take.

#pragma once

#include <cstdint>

#include "../rows.h"

struct CUstream_st;

namespace fila {

constexpr int64_t kAlignment = 8;

enum class Element { kBFloat16, kFloat16 };

struct Matrix {
  const void* data;
  int64_t stride;
};

struct Fc1 {
  Element element;
  Rows rows;
  int64_t num_rows, hidden_width;
  // [X ; S]; without S (no data, width 0) the product is X's alone.
  Matrix tokens, samples;
  int64_t token_width, sample_width;
  Matrix weight;     // [H, D + C]
  const void* bias;  // [H], or null
  Matrix addend;     // [R, H], added to Z before all else; or null
  void* activated;   // A [R, H], dense
  void* hidden;      // Z [T * N, H], dense; or null
};

struct Fc2 {
  Element element;
  Rows rows;
  int64_t num_rows, hidden_width, token_width;
  Matrix activated;   // A [R, H]
  Matrix weight;      // [D, H]
  const void* bias;   // [D]
  Matrix tokens;      // X [R, D]
  const void* alpha;  // one element
  bool product;
  void* out;     // [R, D], dense
  void* branch;  // M [T * N, D], dense; or null
};

// The same where the tokens and the result are of float32.
struct Fc2Mixed : Fc2 {};

// Enqueue the product on `device`, which is the current one. What cannot be launched is an exception that names kernel
// and shape.
void run_product(const Fc1& call, int32_t device, CUstream_st* stream);
void run_product(const Fc2& call, int32_t device, CUstream_st* stream);
void run_product(const Fc2Mixed& call, int32_t device, CUstream_st* stream);

// The kernels, one unit for each function: fc1_bf16_sm90a.cu holds Kernel<9, Element::kBFloat16>::run(const Fc1&, ...),
// the number being the compute capability's major one. They return null, or why the launch failed.
template <int kMajor, Element kElement>
struct Kernel {
  static const char* run(const Fc1& call, CUstream_st* stream);
  static const char* run(const Fc2& call, CUstream_st* stream);
  static const char* run(const Fc2Mixed& call, CUstream_st* stream);
};

}  // namespace fila
