#include "gemm_tma.h"

namespace fila {

template <>
const char* Kernel<10, Element::kFloat16>::run(const Fc2Mixed& call, CUstream_st* stream) {
  return run_tma<Sm100, Element::kFloat16>(call, stream);
}

}  // namespace fila
