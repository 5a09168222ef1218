// The transpose of crop_resize: every cell of a map gathers from the samples that read it.
//
// Each cell has one writer and a fixed order over tiles and samples, so the result does not depend on the number of
// threads. Slices in eager PyTorch fill and add up one whole map per tile instead.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../check.h"
#include "taps.h"
#include "vector.h"

namespace fila {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fila::crop_resize_backward";

// One sample that reads a cell: its gradient's channels, and how much of the cell it takes.
template <typename Scalar>
struct Reader {
  const Scalar* grad;
  accumulate_t<Scalar> weight;
};

// out = sum over readers of weight * grad, one rounding at the store. A weight of exactly one multiplies nothing away.
template <typename Scalar>
FILA_INLINE void sum_loop(const Reader<Scalar>* readers, int64_t count, Scalar* out, int64_t channels) {
  using Real = accumulate_t<Scalar>;
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  constexpr int64_t kVectors = 4;
  if (count == 1) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      store(readers[0].weight * widen(readers[0].grad[channel]), out + channel);
    }
    return;
  }
  int64_t channel = 0;
  for (; channel + kVectors * kLanes <= channels; channel += kVectors * kLanes) {
    lanes_t<Scalar> sums[kVectors] = {};
    for (int64_t reader = 0; reader < count; ++reader) {
      const Scalar* grad = readers[reader].grad + channel;
      for (int64_t k = 0; k < kVectors; ++k) {
        lanes_t<Scalar> lanes;
        load_lanes(grad + k * kLanes, lanes);
        sums[k] += readers[reader].weight * lanes;
      }
    }
    for (int64_t k = 0; k < kVectors; ++k) {
      store_lanes(sums[k], out + channel + k * kLanes);
    }
  }
  for (; channel < channels; ++channel) {
    Real sum = 0;
    for (int64_t reader = 0; reader < count; ++reader) {
      sum += readers[reader].weight * widen(readers[reader].grad[channel]);
    }
    store(sum, out + channel);
  }
}

FILA_VECTOR_CLONES void sum_readers(const Reader<float>* readers, int64_t count, float* out, int64_t channels) {
  sum_loop(readers, count, out, channels);
}

FILA_VECTOR_CLONES void sum_readers(const Reader<BFloat16>* readers, int64_t count, BFloat16* out, int64_t channels) {
  sum_loop(readers, count, out, channels);
}

FILA_VECTOR_CLONES void sum_readers(const Reader<double>* readers, int64_t count, double* out, int64_t channels) {
  sum_loop(readers, count, out, channels);
}

// The readers of one row of one map, sorted by cell: those of `cell` are [first[cell], first[cell + 1]).
template <typename Scalar>
class RowReaders {
 public:
  explicit RowReaders(int64_t width) : first_(width + 1) {}

  // `tiles` are those of the row's image, ascending. Returns whether there is any reader.
  bool collect(const Tensor& grad, const Taps& taps, const Geometry& g, const std::vector<int64_t>& tiles,
               int64_t row) {
    lines_.clear();
    for (const int64_t tile : tiles) {
      const float* box = taps.boxes.data() + tile * 4;
      const SampleRange range = box_samples<double>(box[0], box[2], row, g.size, g.height);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const double weight = tap_weight(taps.rows[tile * g.size + i], row);
        if (weight != 0.0) {
          lines_.push_back({tile, i, weight});
        }
      }
    }
    if (lines_.empty()) {
      return false;
    }
    // A counting sort by cell: how many, where each cell's begin, then each into its place, which moves `first_` on.
    first_.assign(first_.size(), 0);
    visit(grad, taps, g, [this](int64_t cell, const Reader<Scalar>&) { ++first_[cell + 1]; });
    for (size_t cell = 1; cell < first_.size(); ++cell) {
      first_[cell] += first_[cell - 1];
    }
    readers_.resize(first_.back());
    visit(grad, taps, g, [this](int64_t cell, const Reader<Scalar>& reader) { readers_[first_[cell]++] = reader; });
    return true;
  }

  int64_t begin(int64_t cell) const { return cell == 0 ? 0 : first_[cell - 1]; }
  int64_t end(int64_t cell) const { return first_[cell]; }
  const Reader<Scalar>* data() const { return readers_.data(); }

 private:
  struct Line {
    int64_t tile, index;
    double weight;
  };

  template <typename Visitor>
  void visit(const Tensor& grad, const Taps& taps, const Geometry& g, const Visitor& visitor) {
    using Real = accumulate_t<Scalar>;
    const Scalar* data = static_cast<const Scalar*>(grad.const_data_ptr());
    const int64_t stride_tile = grad.stride(0), stride_line = grad.stride(1), stride_sample = grad.stride(2);
    for (const Line& line : lines_) {
      const Scalar* samples = data + line.tile * stride_tile + line.index * stride_line;
      for (int64_t j = 0; j < g.size; ++j) {
        const Tap<double>& tap = taps.columns[line.tile * g.size + j];
        const double first = tap_weight(tap, tap.first);
        visitor(tap.first, {samples + j * stride_sample, static_cast<Real>(line.weight * first)});
        if (tap.second != tap.first) {
          visitor(tap.second, {samples + j * stride_sample, static_cast<Real>(line.weight * tap.weight)});
        }
      }
    }
  }

  std::vector<Line> lines_;
  std::vector<int64_t> first_;
  std::vector<Reader<Scalar>> readers_;
};

template <typename Scalar>
void scatter(const Tensor& grad, const Taps& taps, const Geometry& g, const Tensor& out, bool is_zero) {
  const int64_t channels = grad.size(3);
  Scalar* target = static_cast<Scalar*>(out.mutable_data_ptr());
  std::vector<std::vector<int64_t>> tiles(g.images);
  for (int64_t tile = 0; tile < g.tiles; ++tile) {
    tiles[taps.image[tile]].push_back(tile);
  }
  const int64_t grain = 1 + 16384 / (g.width * channels + 1);
  torch::stable::parallel_for(0, g.images * g.height, grain, [&](int64_t begin, int64_t end) {
    RowReaders<Scalar> readers(g.width);
    for (int64_t row = begin; row < end; ++row) {
      Scalar* cells = target + row * g.width * channels;
      if (!readers.collect(grad, taps, g, tiles[row / g.height], row % g.height)) {
        if (!is_zero) {
          std::memset(cells, 0, g.width * channels * sizeof(Scalar));
        }
        continue;
      }
      for (int64_t cell = 0; cell < g.width; ++cell, cells += channels) {
        const int64_t count = readers.end(cell) - readers.begin(cell);
        if (count > 0) {
          sum_readers(readers.data() + readers.begin(cell), count, cells, channels);
        } else if (!is_zero) {
          std::memset(cells, 0, channels * sizeof(Scalar));
        }
      }
    }
  });
}

// At most how many cells are read: the taps' rows times their columns, tile by tile.
int64_t most_cells(const Taps& taps, const Geometry& g) {
  const auto distinct = [&](const std::vector<Tap<double>>& along, int64_t tile) {
    int64_t count = 0, last = -1;
    for (int64_t i = 0; i < g.size; ++i) {
      const Tap<double>& tap = along[tile * g.size + i];
      count += (tap.first > last) + (tap.second > tap.first && tap.second > last);
      last = tap.second > last ? tap.second : last;
    }
    return count;
  };
  int64_t cells = 0;
  for (int64_t tile = 0; tile < g.tiles; ++tile) {
    cells += distinct(taps.rows, tile) * distinct(taps.columns, tile);
  }
  return cells;
}

// Zeros from calloc, which for a large block are pages that nobody has touched: those that stay so cost nothing. For a
// map of 384 x 384 x 192 float32 of which 8 % is read this takes a sixth of the time of filling it.
Tensor untouched_zeros(const Tensor& like, const std::vector<int64_t>& sizes, int64_t bytes) {
  constexpr size_t kAlignment = 64;
  char* block = static_cast<char*>(std::calloc(1, static_cast<size_t>(bytes) + 2 * kAlignment));
  require(block != nullptr, kOp, "expected room for a gradient of ", bytes, " bytes");
  // The first aligned address with room before it for the block's own.
  char* data = block + sizeof(char*);
  data += (kAlignment - reinterpret_cast<uintptr_t>(data) % kAlignment) % kAlignment;
  std::memcpy(data - sizeof(char*), &block, sizeof(char*));
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size() - 1; axis > 0; --axis) {
    strides[axis - 1] = strides[axis] * sizes[axis];
  }
  return torch::stable::from_blob(
      data, sizes, strides, like.device(), like.scalar_type(), +[](void* aligned) {
        char* start;
        std::memcpy(&start, static_cast<char*>(aligned) - sizeof(char*), sizeof(char*));
        std::free(start);
      });
}

Tensor crop_resize_backward(Tensor grad, Tensor boxes, Tensor image_index, int64_t images, int64_t height,
                            int64_t width, bool check_values) {
  const Geometry g = check_backward(kOp, grad, boxes, image_index, images, height, width, Device::kCpu);
  const std::vector<int64_t> sizes{images, height, width, grad.size(3)};
  const int64_t element = grad.element_size();
  const int64_t bytes = element * checked_product(kOp, "a gradient", {images, height, width, grad.size(3)});
  const Taps taps = make_taps(kOp, boxes, image_index, g, check_values);

  const bool sparse = bytes >= (1 << 20) && 2 * most_cells(taps, g) < images * height * width;
  const Tensor out = sparse ? untouched_zeros(grad, sizes, bytes) : torch::stable::new_empty(grad, sizes);
  if (out.numel() == 0) {
    return out;
  }
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      scatter<float>(grad, taps, g, out, sparse);
      break;
    case ScalarType::BFloat16:
      scatter<BFloat16>(grad, taps, g, out, sparse);
      break;
    default:
      scatter<double>(grad, taps, g, out, sparse);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fila, CPU, m) {
  m.impl("crop_resize_backward", TORCH_BOX(&crop_resize_backward));
}

}  // namespace
}  // namespace fila
