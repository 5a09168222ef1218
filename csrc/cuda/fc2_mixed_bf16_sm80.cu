#include "gemm_sm80.h"

namespace fila {

template <>
const char* Kernel<8, Element::kBFloat16>::run(const Fc2Mixed& call, CUstream_st* stream) {
  return run_sm80<Element::kBFloat16>(call, stream);
}

}  // namespace fila
