// The epilogues' arithmetic on the host against float64: each function, and the forward pass over flat rows composed of
// them as the CUDA kernels compose it.

#include "../pointwise.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "../rows.h"
#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

double exact_gelu(double z) {
  return 0.5 * z * std::erfc(-z * std::sqrt(0.5));
}

bool near(double got, double exact, double size) {
  return std::fabs(got - exact) <= 4 * kEpsilon * size;
}

bool same_bits(float a, float b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

void test_gelu() {
  for (double z = -12; z <= 12; z += 1.0 / 1024) {
    // 1 + erf loses what it cancels: the error is of the size of z, not of the result.
    EXPECT(near(gelu(static_cast<float>(z)), exact_gelu(z), std::fabs(z)), "z = ", z);
  }
  EXPECT(gelu(kInfinity) == kInfinity);
  EXPECT(std::isnan(gelu(-kInfinity)) && std::isnan(gelu(kNan)));
}

void test_gate() {
  for (const bool product : {true, false}) {
    for (const float m : {0.0f, 1.5f, -7.0f, kInfinity, -kInfinity, kNan}) {
      for (const float x : {0.0f, -0.0f, 3.25f, -1e-30f}) {
        EXPECT(same_bits(gated(x, m, make_gate(0.0f, product)), x), "x = ", x, ", m = ", m);
        EXPECT(same_bits(gated(x, m, make_gate(-0.0f, product)), x), "x = ", x, ", m = ", m);
      }
    }
    for (int i = 0; i < 20000; ++i) {
      const float x = static_cast<float>(normal()), m = static_cast<float>(3 * normal());
      const float alpha = static_cast<float>(normal());
      const double gate = product ? std::tanh(double(alpha) * m) : std::tanh(double(alpha)) * m;
      EXPECT(near(gated(x, m, make_gate(alpha, product)), x + gate, std::fabs(x) + 2 * std::fabs(gate)), "x = ", x,
             ", m = ", m, ", alpha = ", alpha);
    }
    EXPECT(std::isnan(gated(1.0f, kNan, make_gate(0.5f, product))));
  }
  EXPECT(gated(1.0f, kInfinity, make_gate(0.5f, true)) == 2.0f);
  EXPECT(gated(1.0f, -kInfinity, make_gate(0.5f, true)) == 0.0f);
  EXPECT(gated(1.0f, kInfinity, make_gate(0.5f, false)) == kInfinity);
}

// T tiles of L rows, S holding NaN in the rows of prefix tokens, which nobody wrote.
void test_flat_rows() {
  constexpr int kTiles = 3, kPrefix = 2, kPatches = 9, kLength = kPrefix + kPatches, kRows = kTiles * kLength;
  constexpr int kWidth = 8, kChannels = 5, kHidden = 7;
  const auto random = [](size_t size) {
    std::vector<float> values(size);
    for (float& value : values) {
      value = static_cast<float>(normal());
    }
    return values;
  };
  const auto x = random(kRows * kWidth), w1 = random(kHidden * (kWidth + kChannels)), b1 = random(kHidden);
  const auto w2 = random(kWidth * kHidden), b2 = random(kWidth);
  auto s = random(kRows * kChannels);
  const Rows rows = make_rows(kPrefix, kPatches);
  for (int row = 0; row < kRows; ++row) {
    if (row % kLength < kPrefix) {
      std::fill_n(s.begin() + row * kChannels, kChannels, kNan);
    }
  }

  for (const bool projected : {false, true}) {
    for (const bool product : {false, true}) {
      for (const float alpha : {0.0f, 0.7f}) {
        const Fc1Layer fc1{projected};
        const Fc2Layer fc2{make_gate(alpha, product)};
        std::vector<float> hidden(kTiles * kPatches * kHidden, kNan), branch(kTiles * kPatches * kWidth, kNan);
        std::vector<float> activated(kRows * kHidden), out(kRows * kWidth);
        for (int row = 0; row < kRows; ++row) {
          const Token token = token_of(row, rows);
          for (int h = 0; h < kHidden; ++h) {
            double sum = 0, samples = 0;
            for (int k = 0; k < kWidth; ++k) {
              sum += double(x[row * kWidth + k]) * w1[h * (kWidth + kChannels) + k];
            }
            for (int k = 0; k < kChannels; ++k) {
              samples += double(s[row * kChannels + k]) * w1[h * (kWidth + kChannels) + kWidth + k];
            }
            // The projection holds the bias; what is added in the first form, nobody wrote.
            const float z = projected ? fc1.keep(static_cast<float>(sum), 0.0f, static_cast<float>(samples + b1[h]))
                                      : fc1.keep(static_cast<float>(sum + samples), b1[h], kNan);
            if (is_patch(token)) {
              hidden[sample_of(token, rows) * kHidden + h] = z;
            }
            activated[row * kHidden + h] = fc1.finish(z, kNan, is_patch(token));
          }
          for (int d = 0; d < kWidth; ++d) {
            double sum = 0;
            for (int h = 0; h < kHidden; ++h) {
              sum += double(activated[row * kHidden + h]) * w2[d * kHidden + h];
            }
            const float m = fc2.keep(static_cast<float>(sum), b2[d], x[row * kWidth + d]);
            if (is_patch(token)) {
              branch[sample_of(token, rows) * kWidth + d] = m;
            }
            out[row * kWidth + d] = fc2.finish(m, x[row * kWidth + d], is_patch(token));
          }
        }

        for (int tile = 0, sample = 0; tile < kTiles; ++tile) {
          for (int place = 0; place < kLength; ++place) {
            const int row = tile * kLength + place;
            if (place < kPrefix) {
              for (int d = 0; d < kWidth; ++d) {
                EXPECT(same_bits(out[row * kWidth + d], x[row * kWidth + d]), "prefix row ", row);
              }
              continue;
            }
            std::vector<double> a(kHidden);
            for (int h = 0; h < kHidden; ++h) {
              double z = b1[h];
              for (int k = 0; k < kWidth + kChannels; ++k) {
                z += double(k < kWidth ? x[row * kWidth + k] : s[row * kChannels + k - kWidth]) *
                     w1[h * (kWidth + kChannels) + k];
              }
              EXPECT(near(hidden[sample * kHidden + h], z, 100), "hidden of row ", row);
              a[h] = exact_gelu(z);
            }
            for (int d = 0; d < kWidth; ++d) {
              double m = b2[d];
              for (int h = 0; h < kHidden; ++h) {
                m += a[h] * w2[d * kHidden + h];
              }
              EXPECT(near(branch[sample * kWidth + d], m, 300), "branch of row ", row);
              const double gate = product ? std::tanh(alpha * m) : std::tanh(double(alpha)) * m;
              EXPECT(near(out[row * kWidth + d], x[row * kWidth + d] + gate, 300), "row ", row);
              EXPECT(alpha != 0 || same_bits(out[row * kWidth + d], x[row * kWidth + d]), "closed at row ", row);
            }
            ++sample;
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_gelu();
  test_gate();
  test_flat_rows();
  return finish();
}
