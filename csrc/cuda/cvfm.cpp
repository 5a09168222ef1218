// The operators fila::cvfm_forward and fila::cvfm on CUDA tensors. Sample-first is the crop-resize pre-pass and two
// products, project-first the projection before these, single-pass one kernel; the kernels are in crop_resize.h, gemm.h
// and single_pass.h. No value is read that the host would have to wait for.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "arguments.h"
#include "crop_resize.h"
#include "gemm.h"
#include "launch.h"
#include "single_pass.h"
#include "single_pass_index.h"
#include "tensors.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "fila::cvfm_forward";
// Rows and what rounds them up to whole tiles are counted in 32 bits.
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1024;

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// A dense copy where the kernels cannot read the tensor where it lies.
Tensor dense(const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    return torch::stable::contiguous(tensor);
  }
  return is_aligned(tensor) ? tensor : torch::stable::clone(tensor);
}

// Tokens [T, L, D] whose flat rows [T * L, D] have one stride.
Tensor flat(const Tensor& tokens) {
  const int64_t tiles = tokens.size(0), length = tokens.size(1), stride = tokens.stride(1);
  const bool one_stride = length > 1 && (tiles == 1 || tokens.stride(0) == length * stride);
  return one_stride && stride >= tokens.size(2) && stride % kAlignment == 0 && is_aligned(tokens) ? tokens
                                                                                                  : dense(tokens);
}

bool is_mixed(const ForwardArguments& a) {
  return a.tokens.scalar_type() != a.features.scalar_type();
}

// Rows of one stride. That of a single row among its axis means nothing; then the tensor is dense.
Matrix view_rows(const Tensor& matrix) {
  const int64_t axis = matrix.dim() - 2;
  return {matrix.const_data_ptr(), matrix.size(axis) > 1 ? matrix.stride(axis) : matrix.size(axis + 1)};
}

void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr;
}

// Disables autograd for the torch calls inside an operator, whatever requires a gradient.
class WithoutGraph {
 public:
  WithoutGraph() { aoti_torch_grad_mode_set_enabled(false); }
  ~WithoutGraph() { aoti_torch_grad_mode_set_enabled(before_); }
  WithoutGraph(const WithoutGraph&) = delete;
  WithoutGraph& operator=(const WithoutGraph&) = delete;

 private:
  const bool before_ = aoti_torch_grad_mode_is_enabled();
};

// The tokens as fc1 multiplies them: themselves, or rounded to the products' type.
Tensor row_operand(const Tensor& tokens, const ForwardArguments& a) {
  if (!is_mixed(a)) {
    return tokens;
  }
  const WithoutGraph without_graph;
  Tensor rounded = torch::stable::new_empty(a.features, {tokens.size(0), tokens.size(1), tokens.size(2)});
  torch::stable::copy_(rounded, tokens);
  return rounded;
}

// x weight' + bias by torch's own library. Into a tensor of our dtype: aten::linear itself is on autocast's list, and
// would choose another for direct callers within torch.autocast.
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const WithoutGraph without_graph;
  const Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(std::optional<Tensor>(bias)),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  require(result.scalar_type() == x.scalar_type(), kOp, "expected torch's projection in the dtype of features");
  return result;
}

// Samples of a map [B, h, w, K] into the patch rows of `rows` [T, L, K]; its prefix rows stay as they are.
template <typename Scalar>
void sample(const Tensor& map, const ForwardArguments& a, const ForwardSizes& s, const Tensor& rows,
            cudaStream_t stream) {
  const int64_t columns = map.size(3);
  Scalar* first = static_cast<Scalar*>(rows.mutable_data_ptr()) + s.prefix * columns;
  launch_crop_resize<Scalar>(view_maps<Scalar>(map), view_boxes(a.boxes, a.image_index), s.grid,
                             {first, (s.prefix + s.patches) * columns, columns}, stream);
}

// Neither S nor the hidden activation in device memory.
void run_in_one(const ForwardArguments& a, const ForwardSizes& s, const Tensor& out, Element element) {
  require(s.width == kSinglePassWidth && s.hidden == kSinglePassWidth, kOp, "expected D and H of ", kSinglePassWidth,
          " for plan 'single_pass', got ", s.width, " and ", s.hidden);
  const int32_t device = a.tokens.get_device_index();
  const Tensor tokens = flat(a.tokens), operand = row_operand(tokens, a);
  const Tensor fc1_weight = dense(a.fc1_weight), fc2_weight = dense(a.fc2_weight);
  const Tensor fc1_bias = dense(a.fc1_bias), fc2_bias = dense(a.fc2_bias);
  const bool by_vectors = is_aligned(a.features) && a.features.stride(0) % kAlignment == 0 &&
                          a.features.stride(1) % kAlignment == 0 && a.features.stride(2) % kAlignment == 0;
  const Tensor features = by_vectors ? a.features : dense(a.features);

  SinglePass call{};
  call.element = element;
  call.rows = make_rows(static_cast<int32_t>(s.prefix), static_cast<int32_t>(s.patches));
  call.num_rows = s.geometry.tiles * (s.prefix + s.patches);
  call.size = s.grid;
  call.tokens = view_rows(operand);
  call.residual = view_rows(tokens);
  call.mixed = is_mixed(a);
  call.maps = view_maps<uint16_t>(features);
  call.boxes = view_boxes(a.boxes, a.image_index);
  call.fc1_weight = view_rows(fc1_weight);
  call.fc2_weight = view_rows(fc2_weight);
  call.fc1_bias = fc1_bias.const_data_ptr();
  call.fc2_bias = fc2_bias.const_data_ptr();
  call.alpha = a.alpha.const_data_ptr();
  call.product = a.gate == "product";
  call.out = out.mutable_data_ptr();
  call.hidden = data_or_null(a.hidden);
  call.branch = data_or_null(a.branch);
  run_single_pass(call, device, current_stream(device));
}

template <typename Scalar>
void run(const ForwardArguments& a, const ForwardSizes& s, const Tensor& out, Element element) {
  const int32_t device = a.tokens.get_device_index();
  const cudaStream_t stream = current_stream(device);
  const Geometry& g = s.geometry;
  const int64_t length = s.prefix + s.patches, num_rows = g.tiles * length;
  const Rows rows = make_rows(static_cast<int32_t>(s.prefix), static_cast<int32_t>(s.patches));
  const Tensor tokens = flat(a.tokens), operand = row_operand(tokens, a);
  const Tensor fc1_weight = dense(a.fc1_weight), fc2_weight = dense(a.fc2_weight);
  const Tensor fc1_bias = dense(a.fc1_bias), fc2_bias = dense(a.fc2_bias);
  const Tensor activated = torch::stable::new_empty(a.features, {g.tiles, length, s.hidden});

  Fc1 fc1{};
  fc1.element = element;
  fc1.rows = rows;
  fc1.num_rows = num_rows;
  fc1.hidden_width = s.hidden;
  fc1.tokens = view_rows(operand);
  fc1.token_width = s.width;
  fc1.weight = view_rows(fc1_weight);
  fc1.activated = activated.mutable_data_ptr();
  fc1.hidden = data_or_null(a.hidden);
  Tensor samples = activated;
  if (a.plan == "sample_first") {
    samples = torch::stable::new_empty(a.features, {g.tiles, length, s.channels});
    sample<Scalar>(a.features, a, s, samples, stream);
    fc1.samples = view_rows(samples);
    fc1.sample_width = s.channels;
    fc1.bias = fc1_bias.const_data_ptr();
  } else {
    // R(F) W' = R(F W'), and a constant passes through R unchanged: bilinear weights sum to one. R(P) lies where A
    // will; the epilogue reads each element before it writes it.
    Tensor weight_s = fc1_weight;
    weight_s = torch::stable::narrow(weight_s, 1, s.width, s.channels);
    const Tensor cells = torch::stable::reshape(a.features, {g.images * g.height * g.width, s.channels});
    const Tensor projected =
        torch::stable::view(linear(cells, weight_s, fc1_bias), {g.images, g.height, g.width, s.hidden});
    sample<Scalar>(projected, a, s, activated, stream);
    fc1.addend = view_rows(activated);
  }
  run_product(fc1, device, stream);

  Fc2Mixed fc2{};
  fc2.element = element;
  fc2.rows = rows;
  fc2.num_rows = num_rows;
  fc2.hidden_width = s.hidden;
  fc2.token_width = s.width;
  fc2.activated = view_rows(activated);
  fc2.weight = view_rows(fc2_weight);
  fc2.bias = fc2_bias.const_data_ptr();
  fc2.tokens = view_rows(tokens);
  fc2.alpha = a.alpha.const_data_ptr();
  fc2.product = a.gate == "product";
  fc2.out = out.mutable_data_ptr();
  fc2.branch = data_or_null(a.branch);
  if (is_mixed(a)) {
    run_product(fc2, device, stream);
  } else {
    run_product(static_cast<const Fc2&>(fc2), device, stream);
  }
}

Tensor forward(const ForwardArguments& a) {
  const ForwardSizes s = check_forward(kOp, a, Device::kCuda, {"sample_first", "project_first", "single_pass"});
  const ScalarType dtype = a.features.scalar_type();
  require(dtype != ScalarType::Float, kOp,
          "expected features of dtype bfloat16 or float16, got float32, whose products on a GPU are torch's: "
          "fila_kernels.cvfm composes them");
  for (const int64_t width : {s.width, s.channels, s.hidden}) {
    require(width > 0 && width % kAlignment == 0, kOp, "expected D, C and H that are multiples of ", kAlignment,
            ", got ", s.width, ", ", s.channels, " and ", s.hidden);
  }
  check_sides(kOp, s.geometry, std::max({s.width, s.channels, s.hidden}));
  require(s.geometry.tiles * a.tokens.size(1) <= kMostRows, kOp, "expected at most ", kMostRows, " tokens in all, got ",
          a.tokens);
  for (const auto& [name, kept] : {std::pair("hidden", &a.hidden), std::pair("branch", &a.branch)}) {
    require(!kept->has_value() || is_aligned(**kept), kOp, "expected ", name, " at a multiple of 16 bytes");
  }

  const DeviceGuard guard(a.tokens.get_device_index());
  const Tensor out = torch::stable::new_empty(a.tokens, {a.tokens.size(0), a.tokens.size(1), a.tokens.size(2)});
  if (a.tokens.numel() == 0) {
    return out;
  }
  if (a.plan == "single_pass") {
    run_in_one(a, s, out, dtype == ScalarType::BFloat16 ? Element::kBFloat16 : Element::kFloat16);
  } else if (dtype == ScalarType::BFloat16) {
    run<__nv_bfloat16>(a, s, out, Element::kBFloat16);
  } else {
    run<__half>(a, s, out, Element::kFloat16);
  }
  return out;
}

Tensor cvfm_forward(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight,
                    Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int64_t num_prefix_tokens,
                    std::string gate, std::string plan, std::optional<Tensor> hidden, std::optional<Tensor> branch,
                    bool) {
  return forward({tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
                  num_prefix_tokens, gate, plan, hidden, branch});
}

Tensor cvfm(Tensor tokens, Tensor features, Tensor boxes, Tensor image_index, Tensor fc1_weight, Tensor fc1_bias,
            Tensor fc2_weight, Tensor fc2_bias, Tensor alpha, int64_t num_prefix_tokens, std::string gate,
            std::string plan, bool) {
  return forward({tokens, features, boxes, image_index, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha,
                  num_prefix_tokens, gate, plan, std::nullopt, std::nullopt});
}

STABLE_TORCH_LIBRARY_IMPL(fila, CUDA, m) {
  m.impl("cvfm", TORCH_BOX(&cvfm));
  m.impl("cvfm_forward", TORCH_BOX(&cvfm_forward));
}

}  // namespace
}  // namespace fila
