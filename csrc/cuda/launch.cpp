#include "launch.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <stdexcept>

namespace fila {
namespace {

// The stable ABI's function that only a torch with CUDA has. A weak reference would stay empty: torch's own libraries
// are loaded for Python's module alone, not for all, so that only what a library names as needed is searched, and
// libtorch_cuda must not be needed. It is there already wherever there is a CUDA tensor.
using GetStream = AOTITorchError (*)(int32_t device, void** stream);

GetStream find_get_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* function = dlsym(RTLD_DEFAULT, kName);
  if (function == nullptr) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
      function = dlsym(library, kName);
    }
  }
  return reinterpret_cast<GetStream>(function);
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("fila: torch has no CUDA stream for device " + std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t status, const char* kernel, std::initializer_list<int64_t> shape) {
  if (status == cudaSuccess) {
    return;
  }
  cudaGetLastError();  // it would be the next launch's
  std::ostringstream message;
  message << kernel << " for [";
  const char* separator = "";
  for (const int64_t size : shape) {
    message << separator << size;
    separator = ", ";
  }
  message << "] failed: " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status) << ")";
  throw std::runtime_error(message.str());
}

void check_launch(const char* kernel, std::initializer_list<int64_t> shape) {
  check_cuda(cudaGetLastError(), kernel, shape);
}

int compute_capability(int32_t device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute",
             {device});
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute",
             {device});
  return major * 10 + minor;
}

}  // namespace fila
