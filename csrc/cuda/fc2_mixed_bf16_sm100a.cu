#include "gemm_tma.h"

namespace fila {

template <>
const char* Kernel<10, Element::kBFloat16>::run(const Fc2Mixed& call, CUstream_st* stream) {
  return run_tma<Sm100, Element::kBFloat16>(call, stream);
}

}  // namespace fila
