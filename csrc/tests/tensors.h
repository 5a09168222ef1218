// Tensors over vectors, and numbers in the dtypes that the CPU kernels take, for the tests.

#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "testing.h"

namespace fila::testing {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Scalar>
constexpr ScalarType kDtype = std::is_same_v<Scalar, float>      ? ScalarType::Float
                              : std::is_same_v<Scalar, double>   ? ScalarType::Double
                              : std::is_same_v<Scalar, BFloat16> ? ScalarType::BFloat16
                              : std::is_same_v<Scalar, int32_t>  ? ScalarType::Int
                                                                 : ScalarType::Long;

// The distance from 1 to the next number, and that of the type a kernel adds up in.
template <typename Scalar>
constexpr double kEpsilon = std::is_same_v<Scalar, double>  ? std::numeric_limits<double>::epsilon()
                            : std::is_same_v<Scalar, float> ? std::numeric_limits<float>::epsilon()
                                                            : 1.0 / 128;
template <typename Scalar>
constexpr double kSumEpsilon =
    std::is_same_v<Scalar, double> ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();

// Numbers that the dtype holds exactly.
template <typename Scalar>
std::vector<Scalar> normals(int64_t count, double scale = 1) {
  std::vector<Scalar> values(count);
  for (Scalar& value : values) {
    value = static_cast<Scalar>(static_cast<float>(normal() * scale));
  }
  return values;
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * sizes[axis];
  }
  return strides;
}

// A view of `values`, which have to outlive it.
template <typename Scalar>
Tensor view_of(std::vector<Scalar>& values, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return torch::stable::from_blob(values.data(), sizes, strides, torch::stable::Device("cpu"), kDtype<Scalar>);
}

template <typename Scalar>
Tensor view_of(std::vector<Scalar>& values, const std::vector<int64_t>& sizes) {
  return view_of(values, sizes, dense_strides(sizes));
}

template <typename Scalar>
const Scalar* data_of(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

template <typename Scalar>
double number(Scalar value) {
  return static_cast<double>(value);
}
inline double number(BFloat16 value) {
  return static_cast<double>(static_cast<float>(value));
}

}  // namespace fila::testing
