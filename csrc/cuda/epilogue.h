// Arguments of the two layers' epilogues, on any architecture; pointwise.h has their arithmetic.

#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include "../pointwise.h"
#include "gemm.h"

namespace fila {

template <Element kElement>
using ScalarOf = cutlass::platform::conditional_t<kElement == Element::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;

// `kept` [T * N, width] takes Z or M of the patch rows, where it is not null.
template <typename Scalar>
struct Fc1Epilogue {
  Rows rows;
  Scalar* kept;
  int64_t width;
  bool has_addend;

  CUTLASS_DEVICE Fc1Layer layer() const { return {has_addend}; }
};

template <typename Scalar>
struct Fc2Epilogue {
  Rows rows;
  Scalar* kept;
  int64_t width;
  Scalar const* alpha;
  bool product;

  CUTLASS_DEVICE Fc2Layer layer() const { return {make_gate(static_cast<float>(*alpha), product)}; }
};

// Both layers are one product, [first ; second] weight', that differ in the epilogue, and in the type of its source and
// result.
template <typename ScalarType, class EpilogueType, typename ResidualType = ScalarType>
struct Product {
  using Scalar = ScalarType;
  using Epilogue = EpilogueType;
  using Residual = ResidualType;
  // Elements of 16 bytes, as TMA and vectors access them.
  static constexpr int kResidualAlignment = 16 / sizeof(Residual);

  int num_rows, num_columns;
  Matrix first, second;
  int first_depth, second_depth;
  Matrix weight;
  Scalar const* bias;  // or null
  Matrix source;       // or null
  Residual* out;
  Epilogue epilogue;
};

template <Element kElement>
Product<ScalarOf<kElement>, Fc1Epilogue<ScalarOf<kElement>>> make_product(const Fc1& call) {
  using Scalar = ScalarOf<kElement>;
  return {static_cast<int>(call.num_rows),
          static_cast<int>(call.hidden_width),
          call.tokens,
          call.samples,
          static_cast<int>(call.token_width),
          static_cast<int>(call.sample_width),
          call.weight,
          static_cast<Scalar const*>(call.bias),
          call.addend,
          static_cast<Scalar*>(call.activated),
          {call.rows, static_cast<Scalar*>(call.hidden), call.hidden_width, call.addend.data != nullptr}};
}

template <typename Scalar, typename Residual>
Product<Scalar, Fc2Epilogue<Scalar>, Residual> make_fc2(const Fc2& call) {
  return {static_cast<int>(call.num_rows),
          static_cast<int>(call.token_width),
          call.activated,
          {},
          static_cast<int>(call.hidden_width),
          0,
          call.weight,
          static_cast<Scalar const*>(call.bias),
          call.tokens,
          static_cast<Residual*>(call.out),
          {call.rows, static_cast<Scalar*>(call.branch), call.token_width, static_cast<Scalar const*>(call.alpha),
           call.product}};
}

template <Element kElement>
Product<ScalarOf<kElement>, Fc2Epilogue<ScalarOf<kElement>>> make_product(const Fc2& call) {
  return make_fc2<ScalarOf<kElement>, ScalarOf<kElement>>(call);
}

template <Element kElement>
Product<ScalarOf<kElement>, Fc2Epilogue<ScalarOf<kElement>>, float> make_product(const Fc2Mixed& call) {
  return make_fc2<ScalarOf<kElement>, float>(call);
}

template <Element kElement, class Call>
using ProductOf = decltype(make_product<kElement>(Call{}));

}  // namespace fila
