// The products of torch's libraries behind gemm.h, against loops in float64: strides, a row or a matrix added, in
// place.

#include "../cpu/gemm.h"

#include "tensors.h"

namespace {

using namespace fila;
using namespace fila::testing;

// out [rows, n] = x [rows, k] weight [n, k]' + addend, held to the rounding of sums of k + 1 terms and of one store.
template <typename Scalar, typename X, typename W, typename A>
void expect_product(const char* what, const Scalar* got, int64_t rows, int64_t n, int64_t k, const X& x,
                    const W& weight, const A& addend) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double sum = addend(row, column), size = std::fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        const double term = x(row, i) * weight(column, i);
        sum += term;
        size += std::fabs(term);
      }
      const double allowed =
          kEpsilon<Scalar> * std::fabs(sum) + static_cast<double>(k + 2) * kSumEpsilon<Scalar> * size;
      const double value = number(got[row * n + column]);
      EXPECT(std::fabs(value - sum) <= allowed, what, " at [", row, ", ", column, "]: got ", value, ", exact ", sum);
    }
  }
}

template <typename Scalar>
void test_linear_into(int64_t rows, int64_t n, int64_t k) {
  const int64_t pitch = k + 3;  // both operands are columns of wider matrices
  std::vector<Scalar> x = normals<Scalar>(rows * pitch), weight = normals<Scalar>(n * pitch), bias = normals<Scalar>(n);
  std::vector<Scalar> matrix = normals<Scalar>(rows * n), out(rows * n, Scalar(NAN));
  const auto x_at = [&](int64_t row, int64_t i) { return number(x[row * pitch + 1 + i]); };
  const auto weight_at = [&](int64_t row, int64_t i) { return number(weight[row * pitch + 2 + i]); };
  const Tensor x_view = matrix_columns(view_of(x, {rows, pitch}), 1, k);
  const Tensor weight_view = matrix_columns(view_of(weight, {n, pitch}), 2, k);
  const Tensor out_view = view_of(out, {rows, n});

  linear_into(out_view, view_of(bias, {n}), x_view, weight_view);
  expect_product("bias", out.data(), rows, n, k, x_at, weight_at, [&](int64_t, int64_t i) { return number(bias[i]); });

  const std::vector<Scalar> before = matrix;
  const Tensor in_place = view_of(matrix, {rows, n});
  linear_into(in_place, in_place, x_view, weight_view);
  expect_product("in place", matrix.data(), rows, n, k, x_at, weight_at,
                 [&](int64_t row, int64_t i) { return number(before[row * n + i]); });

  std::vector<Scalar> dense_x, dense_weight;
  for (int64_t row = 0; row < rows; ++row) {
    dense_x.insert(dense_x.end(), x.begin() + row * pitch + 1, x.begin() + row * pitch + 1 + k);
  }
  for (int64_t row = 0; row < n; ++row) {
    dense_weight.insert(dense_weight.end(), weight.begin() + row * pitch + 2, weight.begin() + row * pitch + 2 + k);
  }
  const Tensor x_dense = view_of(dense_x, {rows, k}), weight_dense = view_of(dense_weight, {n, k});
  EXPECT(rows < 2 || (!has_linear(x_view, weight_dense) && !has_linear(x_dense, weight_view)),
         "oneDNN wants dense matrices");
  if (has_linear(x_dense, weight_dense)) {
    const Tensor result = linear(x_dense, weight_dense, view_of(bias, {n}));
    expect_product("oneDNN", data_of<Scalar>(result), rows, n, k, x_at, weight_at,
                   [&](int64_t, int64_t i) { return number(bias[i]); });
  }
}

template <typename Scalar>
void test_gelu() {
  std::vector<Scalar> z = normals<Scalar>(1000, 3);
  z.insert(z.end(), {Scalar(0), Scalar(50), Scalar(-50), Scalar(NAN)});
  const std::vector<Scalar> before = z;
  gelu_inplace(view_of(z, {static_cast<int64_t>(z.size())}));
  for (size_t i = 0; i < z.size(); ++i) {
    const double x = number(before[i]), exact = 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))), got = number(z[i]);
    // Where erf is near -1 the sum cancels: torch's own error there is of the size of its last digit.
    const double allowed = kEpsilon<Scalar> * std::fabs(exact) + 4 * kSumEpsilon<Scalar> * std::fabs(x);
    EXPECT(std::isnan(exact) ? std::isnan(got) : got == exact || std::fabs(got - exact) <= allowed, "gelu(", x,
           ") = ", got, ", exact ", exact);
  }
}

void test_views_share_memory() {
  std::vector<float> values(20);
  const Tensor matrix = view_of(values, {4, 5});
  EXPECT(data_of<float>(matrix_rows(matrix, 1, 2)) == values.data() + 5);
  EXPECT(matrix_rows(matrix, 1, 2).size(0) == 2 && matrix_rows(matrix, 4, 0).numel() == 0);
  EXPECT(data_of<float>(matrix_columns(matrix, 3, 2)) == values.data() + 3);
  EXPECT(matrix_columns(matrix, 3, 2).size(1) == 2 && matrix_columns(matrix, 3, 2).stride(0) == 5);
}

template <typename Scalar>
void test_dtype() {
  test_linear_into<Scalar>(1, 1, 1);
  test_linear_into<Scalar>(7, 5, 3);
  test_linear_into<Scalar>(33, 48, 70);
  test_linear_into<Scalar>(0, 4, 4);
  test_gelu<Scalar>();
}

}  // namespace

int main() {
  test_dtype<float>();
  test_dtype<double>();
  test_dtype<BFloat16>();
  test_views_share_memory();
  return finish();
}
