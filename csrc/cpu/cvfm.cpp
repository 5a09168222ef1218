// The fused forward pass on the CPU. Each block of rows passes through all steps while it is in cache.
//
// A block of [X ; S] is written once (tokens copied, features sampled in place), fc1 and fc2 are products of torch's
// own libraries, and one pass over M computes gate, residual and result. S and the hidden activation exist for one
// block of rows at a time, unless the backward pass asks for Z and M.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../check.h"
#include "crop_resize.h"
#include "gate.h"
#include "gemm.h"
#include "taps.h"
#include "vector.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fila::cvfm_forward";
// Of the hidden activation: with [X ; S] and M beside it a block stays within the second-level caches and what the
// third shares out. Smaller blocks make the products slower.
constexpr int64_t kBlockBytes = int64_t(5) << 19;

// The arguments of one call.
struct Call {
  Tensor tokens, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  ForwardSizes sizes;
  double alpha;
  bool product;
  bool projected;
};

// out = x + tanh(alpha m), or x + factor m, rounded once, in the tokens' own type.
template <typename Token, typename Scalar, bool product>
FILA_INLINE void gate_loop(const Token* x, const Scalar* m, accumulate_t<Scalar> factor, Token* out, int64_t width) {
  using Real = accumulate_t<Scalar>;
  for (int64_t i = 0; i < width; ++i) {
    const Real inner = factor * widen(m[i]);
    store(widen(x[i]) + (product ? gate_tanh(inner) : inner), out + i);
  }
}

FILA_VECTOR_CLONES void gate_row(const float* x, const float* m, float factor, bool product, float* out,
                                 int64_t width) {
  product ? gate_loop<float, float, true>(x, m, factor, out, width)
          : gate_loop<float, float, false>(x, m, factor, out, width);
}

FILA_VECTOR_CLONES void gate_row(const float* x, const BFloat16* m, float factor, bool product, float* out,
                                 int64_t width) {
  product ? gate_loop<float, BFloat16, true>(x, m, factor, out, width)
          : gate_loop<float, BFloat16, false>(x, m, factor, out, width);
}

FILA_VECTOR_CLONES void gate_row(const BFloat16* x, const BFloat16* m, float factor, bool product, BFloat16* out,
                                 int64_t width) {
  product ? gate_loop<BFloat16, BFloat16, true>(x, m, factor, out, width)
          : gate_loop<BFloat16, BFloat16, false>(x, m, factor, out, width);
}

FILA_VECTOR_CLONES void gate_row(const double* x, const double* m, double factor, bool product, double* out,
                                 int64_t width) {
  product ? gate_loop<double, double, true>(x, m, factor, out, width)
          : gate_loop<double, double, false>(x, m, factor, out, width);
}

template <typename Scalar>
const Scalar* data_of(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

template <typename Scalar>
Scalar* mutable_data_of(const Tensor& tensor) {
  return static_cast<Scalar*>(tensor.mutable_data_ptr());
}

// Patch row `row` of T * N, within the tokens or a result laid out like them.
template <typename Scalar>
Scalar* token_row(Scalar* data, int64_t stride_tile, int64_t stride_token, const ForwardSizes& s, int64_t row) {
  return data + row / s.patches * stride_tile + (s.prefix + row % s.patches) * stride_token;
}

// Rows [first, last) in lines of G samples. Blocks are whole tiles, or equal parts of one.
std::vector<std::pair<int64_t, int64_t>> make_blocks(const Call& call, int64_t element) {
  const ForwardSizes& s = call.sizes;
  const int64_t lines = call.sizes.geometry.tiles * s.grid;
  const int64_t line_bytes = std::max<int64_t>(1, s.grid * std::max(s.hidden, s.width) * element);
  const int64_t most = std::max<int64_t>(1, kBlockBytes / line_bytes);
  int64_t step = most / s.grid * s.grid;
  if (step == 0) {
    const int64_t parts = (s.grid + most - 1) / most;
    step = (s.grid + parts - 1) / parts;
  }
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t first = 0; first < lines;) {
    const int64_t within = step >= s.grid ? lines : (first / s.grid + 1) * s.grid;
    const int64_t last = std::min(first + step, within);
    blocks.emplace_back(first, last);
    first = last;
  }
  return blocks;
}

// Tokens as the products read them.
template <typename Scalar>
FILA_INLINE void copy_row(const Scalar* x, Scalar* out, int64_t width) {
  std::memcpy(out, x, width * sizeof(Scalar));
}

FILA_VECTOR_CLONES void copy_row(const float* x, BFloat16* out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    store(x[i], out + i);
  }
}

// fc1 before its activation, or with it, for blocks of lines.
template <typename Token, typename Scalar>
class FirstLayer {
 public:
  FirstLayer(const Call& call, const Tensor& features, const Taps& taps, int64_t most_rows)
      : call_(call), taps_(taps), map_(features) {
    const ForwardSizes& s = call.sizes;
    if (call.projected) {
      // R(F) W' = R(F W'), and a constant passes through R unchanged: bilinear weights sum to one.
      const Geometry& g = call.sizes.geometry;
      const Tensor cells = torch::stable::reshape(features, {g.images * g.height * g.width, s.channels});
      weight_x_ = matrix_columns(call.fc1_weight, 0, s.width);
      const Tensor weight_s = matrix_columns(call.fc1_weight, s.width, s.channels);
      const Tensor projection = torch::stable::new_empty(features, {cells.size(0), s.hidden});
      linear_into(projection, call.fc1_bias, cells, weight_s);
      map_ = torch::stable::view(projection, {g.images, g.height, g.width, s.hidden});
    }
    const int64_t columns = call.projected ? s.width : s.width + s.channels;
    joint_ = torch::stable::new_empty(call.fc1_weight, {most_rows, columns});
  }

  // [X ; S] of lines [first, last).
  Tensor joint(int64_t first, int64_t last) {
    const ForwardSizes& s = call_.sizes;
    const int64_t columns = s.width + s.channels;
    Scalar* target = mutable_data_of<Scalar>(joint_);
    const MapView<Scalar> map = view_map<Scalar>(map_);
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      copy_tokens(begin, end, target + (begin - first) * s.grid * columns, columns);
      gather_lines(map, taps_, s.grid, begin, end, target + (begin - first) * s.grid * columns + s.width, columns);
    });
    return matrix_rows(joint_, 0, (last - first) * s.grid);
  }

  // Z of lines [first, last) into `out`.
  void operator()(int64_t first, int64_t last, const Tensor& out) {
    const ForwardSizes& s = call_.sizes;
    if (!call_.projected) {
      linear_into(out, call_.fc1_bias, joint(first, last), call_.fc1_weight);
      return;
    }
    const int64_t rows = (last - first) * s.grid;
    Scalar* target = mutable_data_of<Scalar>(out);
    const MapView<Scalar> map = view_map<Scalar>(map_);
    const bool as_they_lie = std::is_same_v<Token, Scalar> && first / s.grid == (last - 1) / s.grid;
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      gather_lines(map, taps_, s.grid, begin, end, target + (begin - first) * s.grid * s.hidden, s.hidden);
      if (!as_they_lie) {
        copy_tokens(begin, end, mutable_data_of<Scalar>(joint_) + (begin - first) * s.grid * s.width, s.width);
      }
    });
    if (as_they_lie) {
      const Tensor tile = torch::stable::select(call_.tokens, 0, first / s.grid);
      linear_into(out, out, matrix_rows(tile, s.prefix + first % s.grid * s.grid, rows), weight_x_);
    } else {
      linear_into(out, out, matrix_rows(joint_, 0, rows), weight_x_);
    }
  }

 private:
  void copy_tokens(int64_t first, int64_t last, Scalar* out, int64_t out_stride) const {
    const ForwardSizes& s = call_.sizes;
    const Token* tokens = data_of<Token>(call_.tokens);
    const int64_t stride_tile = call_.tokens.stride(0), stride_token = call_.tokens.stride(1);
    for (int64_t row = first * s.grid; row < last * s.grid; ++row, out += out_stride) {
      copy_row(token_row(tokens, stride_tile, stride_token, s, row), out, s.width);
    }
  }

  const Call& call_;
  const Taps& taps_;
  Tensor map_, joint_, weight_x_;
};

// The rows of a block, from a product's own result to where they are kept.
void copy_rows(const Tensor& from, const Tensor& to) {
  Tensor target = to;
  torch::stable::copy_(target, from);
}

template <typename Token, typename Scalar>
void run(const Call& call, const Tensor& features, const Taps& taps, const Tensor& out, const Tensor* hidden,
         const Tensor* branch) {
  using Real = accumulate_t<Scalar>;
  const ForwardSizes& s = call.sizes;
  const Geometry& g = call.sizes.geometry;
  const bool closed = call.alpha == 0.0;
  const int64_t stride_tile = call.tokens.stride(0), stride_token = call.tokens.stride(1);
  const Token* tokens = data_of<Token>(call.tokens);
  Token* target = mutable_data_of<Token>(out);
  const int64_t length = s.prefix + s.patches;

  // Tokens that pass through: the prefix, or under a closed gate all of them.
  const int64_t passing = closed ? length : s.prefix;
  torch::stable::parallel_for(0, g.tiles, closed ? 1 : 256, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t token = 0; token < passing; ++token) {
        std::memcpy(target + (tile * length + token) * s.width, tokens + tile * stride_tile + token * stride_token,
                    s.width * sizeof(Token));
      }
    }
  });
  if (closed && hidden == nullptr && branch == nullptr) {
    return;
  }

  const auto blocks = make_blocks(call, sizeof(Scalar));
  int64_t most_rows = 0;
  for (const auto& [first, last] : blocks) {
    most_rows = std::max(most_rows, (last - first) * s.grid);
  }
  FirstLayer<Token, Scalar> first_layer(call, features, taps, most_rows);
  const Tensor activated = torch::stable::new_empty(call.fc1_weight, {most_rows, s.hidden});
  const Tensor scratch = torch::stable::new_empty(call.fc1_weight, {most_rows, s.width});
  // The same products whether or not Z and M are kept, so that training and inference give the same bits. GELU is a
  // pass of its own for the same reason: fused into the product it would see what is not rounded to Z.
  const bool by_onednn = !call.projected && has_linear(activated, call.fc1_weight);
  const Real factor = static_cast<Real>(call.product ? call.alpha : std::tanh(call.alpha));

  for (const auto& [first, last] : blocks) {
    const int64_t row = first * s.grid, rows = (last - first) * s.grid;
    Tensor a = matrix_rows(activated, 0, rows);
    if (by_onednn) {
      a = linear(first_layer.joint(first, last), call.fc1_weight, call.fc1_bias);
      if (hidden != nullptr) {
        copy_rows(a, matrix_rows(*hidden, row, rows));
      }
    } else {
      const Tensor z = hidden != nullptr ? matrix_rows(*hidden, row, rows) : a;
      first_layer(first, last, z);
      if (hidden != nullptr) {
        copy_rows(z, a);
      }
    }
    gelu_inplace(a);

    Tensor m = branch != nullptr ? matrix_rows(*branch, row, rows) : matrix_rows(scratch, 0, rows);
    if (has_linear(a, call.fc2_weight)) {
      const Tensor product = linear(a, call.fc2_weight, call.fc2_bias);
      if (branch != nullptr) {
        copy_rows(product, m);
      }
      m = product;
    } else {
      linear_into(m, call.fc2_bias, a, call.fc2_weight);
    }

    if (!closed) {
      const Scalar* m_data = data_of<Scalar>(m);
      torch::stable::parallel_for(0, rows, 1 + 32768 / (s.width + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          gate_row(token_row(tokens, stride_tile, stride_token, s, row + i), m_data + i * s.width, factor, call.product,
                   token_row(target, length * s.width, s.width, s, row + i), s.width);
        }
      });
    }
  }
}

double scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *data_of<float>(tensor);
    case ScalarType::BFloat16:
      return static_cast<float>(*data_of<BFloat16>(tensor));
    default:
      return *data_of<double>(tensor);
  }
}

Tensor cvfm_forward(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight,
                    Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int64_t num_prefix_tokens,
                    std::string gate, std::string plan, std::optional<Tensor> hidden, std::optional<Tensor> branch,
                    bool check_values) {
  const ForwardSizes sizes = check_forward(kOp,
                                           {tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight,
                                            fc2_bias, alpha, num_prefix_tokens, gate, plan, hidden, branch},
                                           Device::kCpu, {"sample_first", "project_first"});
  const Taps taps = make_taps(kOp, boxes, image_index, sizes.geometry, check_values);

  const Tensor out = torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1), tokens.size(2)});
  if (tokens.numel() == 0) {
    return out;
  }
  const Call call{tokens,           fc1_weight,        fc1_bias,
                  fc2_weight,       fc2_bias,          sizes,
                  scalar_of(alpha), gate == "product", plan == "project_first"};
  const Tensor* hidden_rows = hidden.has_value() ? &*hidden : nullptr;
  const Tensor* branch_rows = branch.has_value() ? &*branch : nullptr;
  switch (features.scalar_type()) {
    case ScalarType::Float:
      run<float, float>(call, features, taps, out, hidden_rows, branch_rows);
      break;
    case ScalarType::BFloat16:
      if (tokens.scalar_type() == ScalarType::Float) {
        run<float, BFloat16>(call, features, taps, out, hidden_rows, branch_rows);
      } else {
        run<BFloat16, BFloat16>(call, features, taps, out, hidden_rows, branch_rows);
      }
      break;
    default:
      run<double, double>(call, features, taps, out, hidden_rows, branch_rows);
  }
  return out;
}

// Called directly and not through the dispatcher, whose C interface loses what an exception says.
Tensor cvfm(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight, Tensor fc1_bias,
            Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int64_t num_prefix_tokens, std::string gate,
            std::string plan, bool check_values) {
  return cvfm_forward(tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
                      num_prefix_tokens, gate, plan, std::nullopt, std::nullopt, check_values);
}

STABLE_TORCH_LIBRARY_IMPL(fila, CPU, m) {
  m.impl("cvfm", TORCH_BOX(&cvfm));
  m.impl("cvfm_forward", TORCH_BOX(&cvfm_forward));
}

}  // namespace
}  // namespace fila
