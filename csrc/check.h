// Refusing bad input: one exception type whose message names what was expected and what came.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace fila {

// std::invalid_argument, which reaches Python as ValueError.
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) {
    return;
  }
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text << (axis == 0 ? "" : ", ") << tensor.size(axis);
  }
  text << ']';
  return text.str();
}

}  // namespace fila
