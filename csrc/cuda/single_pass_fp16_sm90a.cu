#include "single_pass_sm90a.h"

namespace fila {

template const char* launch_single_pass<Element::kFloat16>(const SinglePass& call, CUstream_st* stream);

}  // namespace fila
