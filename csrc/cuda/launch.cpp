#include "launch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <stdexcept>

// Weak: a torch without CUDA does not have it, and must still load this library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fila {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("fila: torch has no CUDA stream for device " + std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t status, const char* kernel, std::initializer_list<int64_t> shape) {
  if (status == cudaSuccess) {
    return;
  }
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
