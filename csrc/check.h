// Refuses bad input with one exception type, whose message names what was expected and what came.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fila {

// A tensor in a message stands for its shape.
inline std::ostream& write_part(std::ostream& text, const torch::stable::Tensor& tensor) {
  text << '[';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text << (axis == 0 ? "" : ", ") << tensor.size(axis);
  }
  return text << ']';
}

template <typename Part>
std::ostream& write_part(std::ostream& text, const Part& part) {
  return text << part;
}

// std::invalid_argument, which reaches Python as ValueError.
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) {
    return;
  }
  std::ostringstream message;
  message << op << ": ";
  (write_part(message, parts), ...);
  throw std::invalid_argument(message.str());
}

inline void require_cpu(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  require(tensor.is_cpu(), op, "expected ", name, " on the CPU, got another device");
}

// The product of sizes that are at least 0, refused where a tensor of that many elements could not be addressed.
inline int64_t checked_product(const char* op, const char* what, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    require(!__builtin_mul_overflow(product, size, &product) && product < (int64_t(1) << 60), op, "expected ", what,
            " of fewer than 2^60 elements");
  }
  return product;
}

// Refuses to write to memory that is also read: by the range of addresses, whatever lies between a tensor's strides.
inline void require_apart(const char* op, const char* name, const torch::stable::Tensor& written,
                          const char* other_name, const torch::stable::Tensor& other) {
  if (written.numel() == 0 || other.numel() == 0) {
    return;
  }
  const auto end = [](const torch::stable::Tensor& tensor) {
    uintptr_t bytes = tensor.element_size();
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      bytes += static_cast<uintptr_t>((tensor.size(axis) - 1) * tensor.stride(axis)) * tensor.element_size();
    }
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + bytes;
  };
  const bool apart = end(written) <= reinterpret_cast<uintptr_t>(other.const_data_ptr()) ||
                     end(other) <= reinterpret_cast<uintptr_t>(written.const_data_ptr());
  require(apart, op, "expected ", name, ", which is written to, in other memory than ", other_name);
}

// Sizes along one axis stay below this, so that sums and products of two of them cannot overflow.
constexpr int64_t kMaxSide = int64_t(1) << 24;

}  // namespace fila
