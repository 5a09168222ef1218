#include "single_pass.h"

#include <sstream>
#include <stdexcept>

#include "../single_pass_index.h"
#include "launch.h"

namespace fila {

void run_single_pass(const SinglePass& call, [[maybe_unused]] int32_t device, [[maybe_unused]] CUstream_st* stream) {
  const char* error = "its kernel is for compute capability 9.0, compiled as 9.0a";
#ifdef FILA_SM90A
  if (compute_capability(device) == 90) {
    error = call.element == Element::kBFloat16 ? launch_single_pass<Element::kBFloat16>(call, stream)
                                               : launch_single_pass<Element::kFloat16>(call, stream);
  }
#endif
  if (error != nullptr) {
    std::ostringstream message;
    message << "single_pass for [" << call.num_rows << ", " << kSinglePassWidth << ", "
            << kSinglePassWidth + call.maps.channels << "] failed: " << error;
    throw std::runtime_error(message.str());
  }
}

}  // namespace fila
