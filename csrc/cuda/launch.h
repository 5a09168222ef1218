// Launches CUDA kernels on torch's current stream; a failed launch throws an error that names the kernel.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace fila {

// Torch's current stream on a device. Throws where torch was built without CUDA.
cudaStream_t current_stream(int32_t device);

// Throws what the launch of `kernel` just before has set: its name, the shape it was launched for, the error. The shape
// is whatever tells one call from another.
void check_launch(const char* kernel, std::initializer_list<int64_t> shape);

// The same for a call of the runtime itself.
void check_cuda(cudaError_t status, const char* kernel, std::initializer_list<int64_t> shape);

// Null for success, else what failed. The runtime is made to forget it: the next launch would be blamed for it.
inline const char* forget_error(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString((static_cast<void>(cudaGetLastError()), status));
}

// The compute capability of a device, major * 10 + minor.
int compute_capability(int32_t device);

}  // namespace fila
