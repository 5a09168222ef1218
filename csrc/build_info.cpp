// Returns what the library was built with, on any machine: also without a GPU it says which CUDA kernels it holds.

#include <torch/csrc/stable/library.h>

#include <string>

namespace fila {
namespace {

// Lines of "key=value": cuda, the architectures separated by spaces (nothing where there are no CUDA kernels); toolkit,
// the CUDA compiler's version; without_cuda, why there are no CUDA kernels.
std::string build_info() {
  return
#include "build_info.inc"
      ;
}

// No tensor is among the arguments whose device could pick the kernel.
STABLE_TORCH_LIBRARY_IMPL(fila, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace
}  // namespace fila
