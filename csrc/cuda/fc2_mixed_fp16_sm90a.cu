#include "gemm_tma.h"

namespace fila {

template <>
const char* Kernel<9, Element::kFloat16>::run(const Fc2Mixed& call, CUstream_st* stream) {
  return run_tma<Sm90, Element::kFloat16>(call, stream);
}

}  // namespace fila
