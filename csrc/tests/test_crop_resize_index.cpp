// Walks every block and every thread of the CUDA kernels' launches on the host: each element of the result is written
// exactly once, forward with the CPU kernel's value, and back with that of the transposed definition.

#include "../crop_resize_index.h"

#include <limits>
#include <vector>

#include "../cpu/crop_resize.h"
#include "testing.h"

namespace fila {

// A float32 that counts how often it is stored.
struct Counted {
  float value = std::numeric_limits<float>::quiet_NaN();
  int32_t writes = 0;
  Counted() = default;
  explicit Counted(float number) : value(number) {}
  Counted(const Counted&) = default;
  Counted& operator=(const Counted& other) {
    value = other.value;
    ++writes;
    return *this;
  }
};
template <>
struct Number<Counted> {
  static float widen(const Counted& number) { return number.value; }
  static Counted narrow(float value) { return Counted(value); }
};

namespace {

using namespace fila::testing;

// Values that are aligned for packs of four.
class Buffer {
 public:
  explicit Buffer(size_t size) : packs_((size + 3) / 4), size_(size) {}
  explicit Buffer(const std::vector<float>& values) : Buffer(values.size()) {
    for (size_t i = 0; i < size_; ++i) {
      data()[i].value = values[i];
    }
  }
  Counted* data() { return packs_.data()->element; }
  Counted& operator[](size_t i) { return data()[i]; }
  size_t size() const { return size_; }

 private:
  std::vector<Pack<Counted, 4>> packs_;
  size_t size_;
};

struct Case {
  const char* name;
  int64_t tiles, size, images, height, width, channels;
  int64_t prefix;  // rows of another kind before each tile's samples
  double spread;   // how far off the map boxes reach, in maps
  bool whole;      // boxes on whole cells
  bool wide_index;
};

constexpr Case kCases[] = {
    {"plain", 3, 4, 2, 10, 12, 8, 1, 0.2, false, true},
    {"odd", 5, 5, 2, 9, 17, 3, 3, 0.2, false, false},
    {"real", 5, 24, 1, 48, 48, 16, 1, 0.0, true, true},
    {"identity", 2, 8, 2, 8, 8, 4, 0, 0.0, true, false},
    {"more columns than a block", 2, 19, 1, 6, 21, 4, 0, 0.1, false, true},
    {"more packs than threads", 1, 3, 1, 4, 4, 404, 0, 0.1, false, true},
    {"one cell", 4, 2, 1, 1, 1, 4, 0, 1.0, false, true},
    {"one sample", 3, 1, 2, 7, 5, 4, 2, 0.1, false, true},
    {"off the map", 8, 4, 3, 6, 7, 4, 1, 3.0, false, true},
    {"many tiles", 60, 3, 7, 12, 10, 4, 0, 0.3, false, false},
};

struct Inputs {
  std::vector<float> features, boxes, grad;
  std::vector<int64_t> wide_index;
  std::vector<int32_t> narrow_index;

  explicit Inputs(const Case& c)
      : features(c.images * c.height * c.width * c.channels),
        boxes(c.tiles * 4),
        grad(c.tiles * c.size * c.size * c.channels),
        wide_index(c.tiles),
        narrow_index(c.tiles) {
    for (float& value : features) {
      value = static_cast<float>(normal());
    }
    for (float& value : grad) {
      value = static_cast<float>(normal());
    }
    for (int64_t tile = 0; tile < c.tiles; ++tile) {
      // Now and then an index off the maps, which is clamped.
      wide_index[tile] = integer(0, c.images);
      narrow_index[tile] = static_cast<int32_t>(wide_index[tile]);
      for (int axis = 0; axis < 2; ++axis) {
        const double cells = axis == 0 ? c.height : c.width;
        double low = uniform(-c.spread * cells, (1.0 + c.spread) * cells);
        double high = uniform(-c.spread * cells, (1.0 + c.spread) * cells);
        if (c.whole) {
          low = 0, high = cells;
        }
        boxes[tile * 4 + axis] = static_cast<float>(std::min(low, high));
        boxes[tile * 4 + axis + 2] = static_cast<float>(std::max(low, high));
      }
    }
  }

  TileBoxes view(const Case& c) const {
    const void* index = c.wide_index ? static_cast<const void*>(wide_index.data()) : narrow_index.data();
    return {boxes.data(), 4, 1, index, c.wide_index, 1, c.tiles};
  }
  int64_t image(const Case& c, int64_t tile) const { return clamp_cell(wide_index[tile], c.images); }
};

// What the kernel's grid does: blocks in steps of the grid, threads in any order, here the last first.
template <typename Body>
void launch(const LineBlocks& blocks, int64_t grid, const Body& body) {
  for (int64_t first = 0; first < grid; ++first) {
    for (int64_t block = first; block < blocks.count(); block += grid) {
      body(block);
    }
  }
}

template <int kWidth>
void test_forward(const Case& c, int64_t grid) {
  const Inputs inputs(c);
  Buffer maps(inputs.features);
  const int64_t rows = c.prefix + c.size * c.size;
  Buffer out(c.tiles * rows * c.channels);
  const FeatureMaps<Counted> view{
      maps.data(), c.height * c.width * c.channels, c.width * c.channels, c.channels, c.images, c.height, c.width,
      c.channels};
  const SampleRows<Counted> samples{out.data() + c.prefix * c.channels, rows * c.channels, c.channels};
  const TileBoxes boxes = inputs.view(c);
  const LineBlocks blocks{c.tiles * c.size, c.size, static_cast<int32_t>(c.channels / kWidth)};
  launch(blocks, grid, [&](int64_t block) {
    PlacedTap taps[kColumns + 1];
    for (int lane = 0; lane <= kColumns; ++lane) {
      taps[lane] = place_tap(view, boxes, c.size, blocks.line(block), blocks.first_column(block), lane);
    }
    for (int thread = blocks.threads() - 1; thread >= 0; --thread) {
      gather_share<Counted, kWidth>(view, boxes, c.size, samples, blocks, block, taps, thread, blocks.threads());
    }
  });

  Taps taps;
  taps.boxes = inputs.boxes;
  for (int64_t tile = 0; tile < c.tiles; ++tile) {
    const float* box = inputs.boxes.data() + tile * 4;
    taps.image.push_back(inputs.image(c, tile));
    for (int64_t i = 0; i < c.size; ++i) {
      taps.rows.push_back(box_tap<double>(box[0], box[2], i, c.size, c.height));
      taps.columns.push_back(box_tap<double>(box[1], box[3], i, c.size, c.width));
    }
  }
  std::vector<float> expected(c.tiles * c.size * c.size * c.channels);
  const MapView<float> map{inputs.features.data(), c.height * c.width * c.channels, c.width * c.channels, c.channels,
                           c.channels};
  gather_lines(map, taps, c.size, 0, c.tiles * c.size, expected.data(), c.channels);

  for (int64_t element = 0; element < static_cast<int64_t>(out.size()); ++element) {
    const int64_t row = element / c.channels % rows, tile = element / c.channels / rows;
    const bool is_sample = row >= c.prefix;
    EXPECT(out[element].writes == (is_sample ? 1 : 0), c.name, ", element ", element, " written ", out[element].writes,
           " times");
    if (is_sample) {
      const int64_t sample = tile * c.size * c.size + row - c.prefix;
      const float want = expected[sample * c.channels + element % c.channels];
      EXPECT(std::fabs(out[element].value - want) <= 4e-7f * (std::fabs(want) + 4), c.name, ", element ", element, ": ",
             out[element].value, " for ", want);
    }
  }
}

template <int kWidth>
void test_backward(const Case& c, int64_t grid) {
  const Inputs inputs(c);
  Buffer grad(inputs.grad);
  Buffer out(c.images * c.height * c.width * c.channels);
  const TileBoxes boxes = inputs.view(c);
  const SampleGradients<Counted> view{
      grad.data(), c.size * c.size * c.channels, c.size * c.channels, c.channels, c.size, c.channels};
  CropTables tables{c.tiles, c.size, c.images, c.height, c.width, nullptr, nullptr, nullptr, nullptr};
  std::vector<double> workspace((tables.bytes() + sizeof(double) - 1) / sizeof(double),
                                std::numeric_limits<double>::quiet_NaN());
  tables.place(workspace.data());
  for (int64_t entry = tables.entries() - 1; entry >= 0; --entry) {
    fill_entry(tables, boxes, entry);
  }
  const LineBlocks blocks{c.images * c.height, c.width, static_cast<int32_t>(c.channels / kWidth)};
  launch(blocks, grid, [&](int64_t block) {
    for (int thread = blocks.threads() - 1; thread >= 0; --thread) {
      sum_share<Counted, kWidth>(view, tables, out.data(), blocks, block, thread, blocks.threads());
    }
  });

  std::vector<double> expected(out.size()), largest(out.size());
  for (int64_t tile = 0; tile < c.tiles; ++tile) {
    const float* box = inputs.boxes.data() + tile * 4;
    for (int64_t sample = 0; sample < c.size * c.size; ++sample) {
      const Tap<double> y = box_tap<double>(box[0], box[2], sample / c.size, c.size, c.height);
      const Tap<double> x = box_tap<double>(box[1], box[3], sample % c.size, c.size, c.width);
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t row = corner / 2 ? y.second : y.first, column = corner % 2 ? x.second : x.first;
        const double weight = (corner / 2 ? y.weight : 1 - y.weight) * (corner % 2 ? x.weight : 1 - x.weight);
        for (int64_t channel = 0; channel < c.channels; ++channel) {
          const double term = weight * inputs.grad[(tile * c.size * c.size + sample) * c.channels + channel];
          const int64_t cell = (inputs.image(c, tile) * c.height + row) * c.width + column;
          expected[cell * c.channels + channel] += term;
          largest[cell * c.channels + channel] += std::fabs(term);
        }
      }
    }
  }
  for (int64_t element = 0; element < static_cast<int64_t>(out.size()); ++element) {
    EXPECT(out[element].writes == 1, c.name, ", element ", element, " written ", out[element].writes, " times");
    // A sum of n terms in float32, each with a weight rounded twice.
    const double bound = 1.2e-7 * (4 + 4.0 * c.tiles) * largest[element];
    EXPECT(std::fabs(out[element].value - expected[element]) <= bound, c.name, ", element ", element, ": ",
           out[element].value, " for ", expected[element]);
  }
}

// Any box and index: taps stay on the map, a box that is not finite gives NaN and reads nothing else.
void test_wild_values() {
  const float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  const float kLargest = std::numeric_limits<float>::max();
  const float edges[] = {kNan, kInf, -kInf, kLargest, -kLargest, 1e30f, -1e30f, 0.0f, 3.0f, 1e-40f, 16777217.0f};
  const int64_t cells = 5, size = 3;
  for (const float low : edges) {
    for (const float high : edges) {
      for (int64_t cell = 0; cell < cells; ++cell) {
        const TableRange range = reading_samples(low, high, cell, size, cells);
        EXPECT(range.begin >= 0 && range.begin <= range.end && range.end <= size, low, " to ", high, ", cell ", cell);
        for (int64_t i = 0; i < size; ++i) {
          const Tap<double> tap = box_tap<double>(low, high, i, size, cells);
          EXPECT(tap.first >= 0 && tap.second >= 0 && tap.first < cells && tap.second < cells, low, " to ", high,
                 ", sample ", i);
          const bool reads = !(tap_weight(tap, cell) == 0.0);
          const bool listed = i >= range.begin && i < range.end;
          EXPECT(!reads || listed, low, " to ", high, ", cell ", cell, ", sample ", i);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fila

int main() {
  for (const fila::Case& c : fila::kCases) {
    for (const int64_t grid : {int64_t(1) << 30, int64_t(7)}) {  // a block each, and steps through them
      const int64_t most = grid < 100 ? grid : 100000;
      fila::test_forward<1>(c, most);
      fila::test_backward<1>(c, most);
      if (c.channels % 4 == 0) {
        fila::test_forward<4>(c, most);
        fila::test_backward<4>(c, most);
      }
    }
  }
  fila::test_wild_values();
  return fila::testing::finish();
}
