#include "gemm.h"

#include <sstream>
#include <stdexcept>

#include "launch.h"

namespace fila {
namespace {

const char* name_of(const Fc1&) {
  return "fc1";
}
const char* name_of(const Fc2&) {
  return "fc2";
}
const char* name_of(const Fc2Mixed&) {
  return "fc2_mixed";
}

// Selects the compiled kernels that a device runs: those of its own architecture, else those for any, of which
// the driver compiles what the library has as PTX.
int kernels_for(int capability) {
#ifdef FILA_SM90A
  if (capability == 90) {
    return 9;
  }
#endif
#ifdef FILA_SM100A
  if (capability == 100) {
    return 10;
  }
#endif
#ifdef FILA_SM80
  if (capability >= 80) {
    return 8;
  }
#endif
  return 0;
}

template <Element kElement, class Call>
const char* launch(int kernels, [[maybe_unused]] const Call& call, [[maybe_unused]] CUstream_st* stream) {
  switch (kernels) {
#ifdef FILA_SM80
    case 8:
      return Kernel<8, kElement>::run(call, stream);
#endif
#ifdef FILA_SM90A
    case 9:
      return Kernel<9, kElement>::run(call, stream);
#endif
#ifdef FILA_SM100A
    case 10:
      return Kernel<10, kElement>::run(call, stream);
#endif
    default:
      return "the library was built without kernels for this device; TORCH_CUDA_ARCH_LIST names others";
  }
}

template <class Call>
void run(const Call& call, int64_t num_columns, int64_t depth, int32_t device, CUstream_st* stream) {
  const int capability = compute_capability(device);
  const int kernels = kernels_for(capability);
  const bool bfloat16 = call.element == Element::kBFloat16;
  const char* error =
      bfloat16 ? launch<Element::kBFloat16>(kernels, call, stream) : launch<Element::kFloat16>(kernels, call, stream);
  if (error != nullptr) {
    std::ostringstream message;
    message << name_of(call) << (bfloat16 ? "_bf16" : "_fp16") << " for [" << call.num_rows << ", " << num_columns
            << ", " << depth << "] on compute capability " << capability / 10 << '.' << capability % 10
            << " failed: " << error;
    throw std::runtime_error(message.str());
  }
}

}  // namespace

void run_product(const Fc1& call, int32_t device, CUstream_st* stream) {
  run(call, call.hidden_width, call.token_width + call.sample_width, device, stream);
}

void run_product(const Fc2& call, int32_t device, CUstream_st* stream) {
  run(call, call.token_width, call.hidden_width, device, stream);
}

void run_product(const Fc2Mixed& call, int32_t device, CUstream_st* stream) {
  run(call, call.token_width, call.hidden_width, device, stream);
}

}  // namespace fila
