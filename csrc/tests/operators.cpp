// The operators' inner loops for one vector width, against loops in float64: `operators LIBRARY [FEATURE]`.
//
// LIBRARY is libfila_kernels.so, whose loops are chosen for this processor as it loads, or the same sources compiled
// for one width alone, which needs the processor's FEATURE. All widths have the same bounds, derived from the sizes of
// the terms in each sum.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>

#include "../sampling.h"
#include "tensors.h"

namespace {

using namespace fila;
using namespace fila::testing;

template <typename... Arguments>
Tensor call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Case {
  int64_t images, height, width, channels, tiles, size;
  std::vector<float> boxes;
  std::vector<int64_t> index;
};

Case make_case(int64_t channels, int64_t size) {
  Case c{2, integer(1, 30), integer(1, 30), channels, integer(1, 5), size, {}, {}};
  for (int64_t tile = 0; tile < c.tiles; ++tile) {
    const double top = uniform(-3, static_cast<double>(c.height)), left = uniform(-3, static_cast<double>(c.width));
    const double bottom = top + uniform(0.2, 20), right = left + uniform(0.2, 20);
    const bool whole = tile % 2 == 0;
    for (const double edge : {top, left}) {
      c.boxes.push_back(static_cast<float>(whole ? std::floor(edge) : edge));
    }
    for (const double edge : {bottom, right}) {
      c.boxes.push_back(static_cast<float>(whole ? std::floor(edge) + 1 : edge));
    }
    c.index.push_back(integer(0, c.images - 1));
  }
  return c;
}

// Calls visitor(sample, cell, weight) for every cell that a sample reads; both are numbers of rows of channels.
template <typename Visitor>
void visit_taps(const Case& c, const Visitor& visitor) {
  for (int64_t tile = 0; tile < c.tiles; ++tile) {
    const float* box = c.boxes.data() + tile * 4;
    for (int64_t i = 0; i < c.size * c.size; ++i) {
      const Tap<double> y = box_tap<double>(box[0], box[2], i / c.size, c.size, c.height);
      const Tap<double> x = box_tap<double>(box[1], box[3], i % c.size, c.size, c.width);
      for (const auto& [row, down] : {std::pair{y.first, 1 - y.weight}, {y.second, y.weight}}) {
        for (const auto& [column, across] : {std::pair{x.first, 1 - x.weight}, {x.second, x.weight}}) {
          if (down * across != 0) {
            visitor(tile * c.size * c.size + i, (c.index[tile] * c.height + row) * c.width + column, down * across);
          }
        }
      }
    }
  }
}

// Sums with what bounds their rounding: the sum of their terms' sizes, and how many there are.
struct Sums {
  std::vector<double> value, size;
  std::vector<int64_t> terms;

  explicit Sums(int64_t count) : value(count), size(count), terms(count) {}

  void add(int64_t place, double term) {
    value[place] += term;
    size[place] += std::fabs(term);
    ++terms[place];
  }

  // Each term is made by up to four roundings and added by one; the result is rounded once more, to the nearest.
  template <typename Scalar>
  void expect(const char* what, const Scalar* got) const {
    for (size_t i = 0; i < value.size(); ++i) {
      const double allowed = static_cast<double>(terms[i] + 5) * kSumEpsilon<Scalar> * size[i] +
                             kEpsilon<Scalar> / 2 * std::fabs(value[i]);
      EXPECT(std::fabs(number(got[i]) - value[i]) <= allowed, what, " at ", i, ": got ", number(got[i]), ", exact ",
             value[i], ", allowed ", allowed);
    }
  }
};

template <typename Scalar>
void test_crop_resize(int64_t channels, int64_t size) {
  Case c = make_case(channels, size);
  std::vector<Scalar> map = normals<Scalar>(c.images * c.height * c.width * channels);
  std::vector<Scalar> grad = normals<Scalar>(c.tiles * size * size * channels);
  Sums sampled(static_cast<int64_t>(grad.size())), gathered(static_cast<int64_t>(map.size()));
  visit_taps(c, [&](int64_t sample, int64_t cell, double weight) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      sampled.add(sample * channels + channel, weight * number(map[cell * channels + channel]));
      gathered.add(cell * channels + channel, weight * number(grad[sample * channels + channel]));
    }
  });
  const Tensor boxes = view_of(c.boxes, {c.tiles, 4}), index = view_of(c.index, {c.tiles});
  const Tensor out =
      call("fila::crop_resize", view_of(map, {c.images, c.height, c.width, channels}), boxes, index, size, true);
  sampled.expect("crop_resize", data_of<Scalar>(out));
  const Tensor back = call("fila::crop_resize_backward", view_of(grad, {c.tiles, size, size, channels}), boxes, index,
                           c.images, c.height, c.width, true);
  gathered.expect("crop_resize_backward", data_of<Scalar>(back));
}

template <typename Scalar>
void test_gate_backward(int64_t rows, int64_t width) {
  std::vector<Scalar> grad = normals<Scalar>(rows * width), branch = normals<Scalar>(rows * width, 4);
  std::vector<Scalar> alpha = {Scalar(0.75f)}, out(rows * width, Scalar(NAN));
  if (!branch.empty()) {
    branch.front() = Scalar(INFINITY);  // a gate that has saturated
  }
  const Tensor total = call("fila::gate_backward", view_of(grad, {rows, width}), view_of(branch, {rows, width}),
                            view_of(alpha, {1}), view_of(out, {rows, width}));
  double sum = 0, size = 0;
  for (int64_t i = 0; i < rows * width; ++i) {
    const double m = number(branch[i]), tanh = std::tanh(0.75 * m), slope = (1 - tanh) * (1 + tanh);
    const double exact = 0.75 * slope * number(grad[i]);
    // The slope's own error and that of the product before it, of which it is as far off as its argument is large; in
    // double it is a difference from one.
    const double allowed = (16 + 4 * std::fmin(std::fabs(m), 100)) * kSumEpsilon<Scalar> * std::fabs(exact) +
                           kEpsilon<Scalar> * std::fabs(exact) +
                           (std::is_same_v<Scalar, double> ? 4 * kSumEpsilon<Scalar> * std::fabs(number(grad[i]))
                                                           : 1e-33 * std::fabs(number(grad[i])));
    EXPECT(std::fabs(number(out[i]) - exact) <= allowed, "gate_backward at ", i, " of branch ", m, ": got ",
           number(out[i]), ", exact ", exact);
    if (std::isfinite(m)) {
      sum += slope * number(grad[i]) * m;
      size += std::fabs(number(grad[i]) * m);
    }
  }
  const double got = *data_of<double>(total);
  EXPECT(std::fabs(got - sum) <= 64 * kSumEpsilon<Scalar> * size, "alpha's gradient: got ", got, ", exact ", sum);
}

// [rows, k] times [n, k]' plus a row, with a bound on the error of the result: what the operands' own errors make of
// it, what adding up makes, and the rounding of the result.
template <typename Scalar, typename Weights>
void multiply(const std::vector<double>& x, const std::vector<double>& error, const Weights& weight,
              const Weights& bias, int64_t k, std::vector<double>& out, std::vector<double>& out_error) {
  const int64_t n = static_cast<int64_t>(bias.size()), rows = static_cast<int64_t>(x.size()) / k;
  out.assign(rows * n, 0);
  out_error.assign(rows * n, 0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double sum = number(bias[column]), size = std::fabs(sum), carried = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double factor = number(weight[column * k + i]);
        sum += x[row * k + i] * factor;
        size += std::fabs(x[row * k + i] * factor);
        carried += error[row * k + i] * std::fabs(factor);
      }
      out[row * n + column] = sum;
      out_error[row * n + column] =
          carried + static_cast<double>(k + 2) * kSumEpsilon<Scalar> * size + kEpsilon<Scalar> * std::fabs(sum);
    }
  }
}

template <typename Scalar>
void test_cvfm(bool product, bool projected) {
  const int64_t size = 5, prefix = 2, width = 70, channels = 33, hidden = 90, joint = width + channels;
  Case c = make_case(channels, size);
  const int64_t patches = size * size, length = prefix + patches, rows = c.tiles * patches;
  std::vector<Scalar> tokens = normals<Scalar>(c.tiles * length * width);
  std::vector<Scalar> map = normals<Scalar>(c.images * c.height * c.width * channels);
  std::vector<Scalar> w1 = normals<Scalar>(hidden * joint, 0.1), b1 = normals<Scalar>(hidden, 0.1);
  std::vector<Scalar> w2 = normals<Scalar>(width * hidden, 0.1), b2 = normals<Scalar>(width, 0.1);
  std::vector<Scalar> alpha = {Scalar(0.75f)};

  // The samples are rounded when they are stored; projected features instead once a cell and once a sample, as columns
  // of Z, of which a bound that holds for both takes twice the share.
  Sums sampled(rows * channels);
  visit_taps(c, [&](int64_t sample, int64_t cell, double weight) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      sampled.add(sample * channels + channel, weight * number(map[cell * channels + channel]));
    }
  });
  std::vector<double> x(rows * joint), x_error(rows * joint), z, z_error, m, m_error;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < joint; ++i) {
      const int64_t token = row / patches * length + prefix + row % patches, sample = row * channels + i - width;
      x[row * joint + i] = i < width ? number(tokens[token * width + i]) : sampled.value[sample];
      x_error[row * joint + i] = i < width ? 0 : 2 * (8 * kSumEpsilon<Scalar> + kEpsilon<Scalar>)*sampled.size[sample];
    }
  }
  multiply<Scalar>(x, x_error, w1, b1, joint, z, z_error);
  for (size_t i = 0; i < z.size(); ++i) {
    const double activated = 0.5 * z[i] * (1 + std::erf(z[i] / std::sqrt(2.0)));
    // GELU's slope stays below 1.13.
    z_error[i] =
        1.13 * 2 * z_error[i] + kEpsilon<Scalar> * std::fabs(activated) + 4 * kSumEpsilon<Scalar> * std::fabs(z[i]);
    z[i] = activated;
  }
  multiply<Scalar>(z, z_error, w2, b2, hidden, m, m_error);

  const Tensor out = call(
      "fila::cvfm", view_of(tokens, {c.tiles, length, width}), view_of(map, {c.images, c.height, c.width, channels}),
      view_of(c.boxes, {c.tiles, 4}), view_of(c.index, {c.tiles}), view_of(w1, {hidden, joint}), view_of(b1, {hidden}),
      view_of(w2, {width, hidden}), view_of(b2, {width}), view_of(alpha, {1}), prefix,
      std::string(product ? "product" : "scale"), std::string(projected ? "project_first" : "sample_first"), true);
  const Scalar* got = data_of<Scalar>(out);
  for (int64_t token = 0; token < c.tiles * length; ++token) {
    const int64_t patch = token % length - prefix, row = token / length * patches + patch;
    for (int64_t i = 0; i < width; ++i) {
      const double before = number(tokens[token * width + i]), value = number(got[token * width + i]);
      if (patch < 0) {
        EXPECT(value == before, "prefix token ", token);
        continue;
      }
      const double branch = m[row * width + i];
      const double exact = before + (product ? std::tanh(0.75 * branch) : std::tanh(0.75) * branch);
      const double allowed = m_error[row * width + i] +
                             8 * kSumEpsilon<Scalar> * (std::fabs(before) + std::fabs(branch)) +
                             kEpsilon<Scalar> * std::fabs(exact);
      EXPECT(std::fabs(value - exact) <= allowed, "cvfm at [", token, ", ", i, "]: got ", value, ", exact ", exact,
             ", allowed ", allowed);
    }
  }
}

template <typename Scalar>
void test_dtype() {
  for (const int64_t channels : {1, 3, 16, 64, 70, 129, 320}) {  // whole vectors of every width, and what is left
    test_crop_resize<Scalar>(channels, 1);
    test_crop_resize<Scalar>(channels, 7);
    test_gate_backward<Scalar>(5, channels);
  }
  for (const bool product : {true, false}) {
    test_cvfm<Scalar>(product, false);
    test_cvfm<Scalar>(product, true);
  }
}

bool has_feature(const std::string& feature) {
#if defined(__x86_64__)
  if (feature == "avx2") {
    return __builtin_cpu_supports("avx2");
  }
  if (feature == "avx512f") {
    return __builtin_cpu_supports("avx512f");
  }
#endif
  return feature.empty();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: operators LIBRARY [FEATURE]\n";
    return 2;
  }
  if (!has_feature(argc > 2 ? argv[2] : "")) {
    std::cerr << "this processor has no " << argv[2] << '\n';
    return kSkipped;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  test_dtype<float>();
  test_dtype<BFloat16>();
  test_dtype<double>();
  return finish();
}
