// The work of every GPU thread in crop_resize and its transpose: the kernels' bodies, without their launches.
//
// For host and device: csrc/tests/test_crop_resize_index.cpp walks every block and every thread of a launch on the
// host.
//
// Both directions write lines of cells of C channels: forward the samples of a tile's line, backward the cells of a
// map's row. A block takes kColumns neighbours of one line, and its threads share their channels, one vector per thread
// at a time. So the accesses of a warp are contiguous, and neighbours, which read the same rows of the map, share the
// first-level cache. Positions are float64, as in the definition, computed once per block or read from a table; sums
// are float32.

#pragma once

#include <cstdint>

#include "pack.h"
#include "sampling.h"

namespace fila {

// T boxes [T, 4] of any strides, and the image of each; an index outside the maps is clamped.
struct TileBoxes {
  const float* edges;
  int64_t stride_box, stride_edge;
  const void* image_index;
  bool wide_index;  // int64, else int32
  int64_t stride_index;
  int64_t tiles;

  FILA_HOST_DEVICE float edge(int64_t tile, int side) const { return edges[tile * stride_box + side * stride_edge]; }
  FILA_HOST_DEVICE int64_t image(int64_t tile, int64_t images) const {
    const int64_t offset = tile * stride_index;
    return clamp_cell(wide_index ? static_cast<const int64_t*>(image_index)[offset]
                                 : static_cast<const int32_t*>(image_index)[offset],
                      images);
  }
};

// Maps [B, h, w, C] with unit stride over channels.
template <typename Scalar>
struct FeatureMaps {
  const Scalar* data;
  int64_t stride_image, stride_row, stride_cell;
  int64_t images, height, width, channels;
};

// Where samples go: tile t's sample (i, j) to data + t * stride_tile + (i * size + j) * stride_sample. A buffer
// [T, P + N, C] takes them behind its prefix rows: data + P * C, strides (P + N) * C and C.
template <typename Scalar>
struct SampleRows {
  Scalar* data;
  int64_t stride_tile, stride_sample;
};

// Gradients [T, size, size, C] with unit stride over channels.
template <typename Scalar>
struct SampleGradients {
  const Scalar* data;
  int64_t stride_tile, stride_line, stride_sample;
  int64_t size, channels;
};

constexpr int kColumns = 8;
constexpr int kMostThreads = 256;
constexpr int kWarp = 32;

// Blocks over `lines` lines of `width` cells of `vectors` packs.
struct LineBlocks {
  int64_t lines, width;
  int32_t vectors;

  FILA_HOST_DEVICE int64_t per_line() const { return (width + kColumns - 1) / kColumns; }
  FILA_HOST_DEVICE int64_t count() const { return lines * per_line(); }
  FILA_HOST_DEVICE int64_t line(int64_t block) const { return block / per_line(); }
  FILA_HOST_DEVICE int64_t first_column(int64_t block) const { return block % per_line() * kColumns; }
  FILA_HOST_DEVICE int32_t columns(int64_t block) const {
    const int64_t left = width - first_column(block);
    return static_cast<int32_t>(left < kColumns ? left : kColumns);
  }
  // Threads that have something to do, in whole warps.
  int threads() const {
    const int64_t items = (int64_t(kColumns) * vectors + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(items < kMostThreads ? items : kMostThreads);
  }
};

// A tap as kernels want it: where both cells lie, and their weights. A second weight of zero: that cell is not read.
struct PlacedTap {
  int64_t first, second;
  float lower, upper;
};

// Thread `lane` of a block of samples finds the tap of one column, or, behind them, of the line.
template <typename Scalar>
FILA_HOST_DEVICE PlacedTap place_tap(const FeatureMaps<Scalar>& maps, const TileBoxes& boxes, int64_t size,
                                     int64_t line, int64_t first_column, int lane) {
  const bool is_line = lane == kColumns;
  const int64_t index = is_line ? line % size : first_column + lane;
  const int64_t tile = line / size;
  const int64_t stride = is_line ? maps.stride_row : maps.stride_cell;
  const Tap<double> tap = box_tap<double>(boxes.edge(tile, is_line ? 0 : 1), boxes.edge(tile, is_line ? 2 : 3), index,
                                          size, is_line ? maps.height : maps.width);
  return {tap.first * stride, tap.second * stride, static_cast<float>(1.0 - tap.weight),
          static_cast<float>(tap.weight)};
}

// One pack of one sample: out = ly (lx a + ux b) + uy (lx c + ux d), rounded once. A cell of weight zero is neither
// read nor multiplied, since 0 * inf would be NaN.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE Pack<Scalar, kWidth> sample_pack(const Scalar* image, const PlacedTap& y, const PlacedTap& x) {
  using Vector = Pack<Scalar, kWidth>;
  using N = Number<Scalar>;
  const auto read = [image](int64_t offset) { return load_pack<Scalar, kWidth>(image + offset); };
  const bool two_columns = !(x.upper == 0.0f), two_rows = !(y.upper == 0.0f);
  const Vector a = read(y.first + x.first);
  Vector b = a, c = a, d = a;
  if (two_columns) {
    b = read(y.first + x.second);
  }
  if (two_rows) {
    c = read(y.second + x.first);
  }
  if (two_columns && two_rows) {
    d = read(y.second + x.second);
  }
  Vector result;
  for (int k = 0; k < kWidth; ++k) {
    float upper = N::widen(a.element[k]), lower = N::widen(c.element[k]);
    if (two_columns) {
      upper = x.lower * upper + x.upper * N::widen(b.element[k]);
      lower = x.lower * lower + x.upper * N::widen(d.element[k]);
    }
    result.element[k] = N::narrow(two_rows ? y.lower * upper + y.upper * lower : upper);
  }
  return result;
}

// Thread `thread` of `threads` gathers its share of block `block` from `taps`: kColumns columns', then the line's.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE void gather_share(const FeatureMaps<Scalar>& maps, const TileBoxes& boxes, int64_t size,
                                   const SampleRows<Scalar>& out, const LineBlocks& blocks, int64_t block,
                                   const PlacedTap* taps, int32_t thread, int32_t threads) {
  const int64_t line = blocks.line(block), tile = line / size;
  const Scalar* image = maps.data + boxes.image(tile, maps.images) * maps.stride_image;
  Scalar* samples =
      out.data + tile * out.stride_tile + (line % size * size + blocks.first_column(block)) * out.stride_sample;
  const int32_t items = blocks.columns(block) * blocks.vectors;
  for (int32_t item = thread; item < items; item += threads) {
    const int32_t column = item / blocks.vectors;
    const int64_t channel = int64_t(item % blocks.vectors) * kWidth;
    store_pack(sample_pack<Scalar, kWidth>(image + channel, taps[kColumns], taps[column]),
               samples + column * out.stride_sample + channel);
  }
}

// The transpose needs, for every cell, the samples that read it. Tables say so: for each tile the taps of its samples
// along both axes and the samples that read each row and each column; and the tiles sorted by image, in their order.
struct TableTap {
  int32_t first, second;
  float lower, upper;
};
struct TableRange {
  int32_t begin, end;
};

struct CropTables {
  int64_t tiles, size, images, height, width;
  TableTap* taps;      // [T, 2, size]: rows', then columns'
  TableRange* ranges;  // [T, h + w]
  int32_t* order;      // [T]: the tiles of image b are order[starts[b]] up to order[starts[b + 1]], ascending
  int32_t* starts;     // [B + 1]

  FILA_HOST_DEVICE int64_t num_taps() const { return tiles * 2 * size; }
  FILA_HOST_DEVICE int64_t num_ranges() const { return tiles * (height + width); }
  FILA_HOST_DEVICE int64_t entries() const { return num_taps() + num_ranges() + tiles + images + 1; }

  // The parts of a workspace aligned to 16 bytes, and how large it is.
  void place(void* workspace) {
    taps = static_cast<TableTap*>(workspace);
    ranges = reinterpret_cast<TableRange*>(taps + num_taps());
    order = reinterpret_cast<int32_t*>(ranges + num_ranges());
    starts = order + tiles;
  }
  int64_t bytes() const {
    return num_taps() * int64_t(sizeof(TableTap)) + num_ranges() * int64_t(sizeof(TableRange)) +
           (tiles + images + 1) * int64_t(sizeof(int32_t));
  }
};

// The exact range of a box's samples that read a cell.
FILA_HOST_DEVICE TableRange reading_samples(float low, float high, int64_t cell, int64_t size, int64_t cells) {
  SampleRange range = box_samples<double>(low, high, cell, size, cells);
  while (range.begin < range.end && tap_weight(box_tap<double>(low, high, range.begin, size, cells), cell) == 0.0) {
    ++range.begin;
  }
  while (range.begin < range.end && tap_weight(box_tap<double>(low, high, range.end - 1, size, cells), cell) == 0.0) {
    --range.end;
  }
  return {static_cast<int32_t>(range.begin), static_cast<int32_t>(range.end)};
}

// Entry `entry` of all tables together; none needs another, so that one launch fills them. A tile's place among the
// sorted is counted: T * T reads, a tenth of what the samples of T tiles cost while T is below 100,000.
FILA_HOST_DEVICE void fill_entry(const CropTables& tables, const TileBoxes& boxes, int64_t entry) {
  const int64_t size = tables.size;
  if (entry < tables.num_taps()) {
    const int64_t tile = entry / (2 * size);
    const bool is_row = entry % (2 * size) < size;
    const Tap<double> tap = box_tap<double>(boxes.edge(tile, is_row ? 0 : 1), boxes.edge(tile, is_row ? 2 : 3),
                                            entry % size, size, is_row ? tables.height : tables.width);
    tables.taps[entry] = {static_cast<int32_t>(tap.first), static_cast<int32_t>(tap.second),
                          static_cast<float>(1.0 - tap.weight), static_cast<float>(tap.weight)};
    return;
  }
  entry -= tables.num_taps();
  if (entry < tables.num_ranges()) {
    const int64_t tile = entry / (tables.height + tables.width);
    const int64_t line = entry % (tables.height + tables.width);
    const bool is_row = line < tables.height;
    tables.ranges[entry] =
        reading_samples(boxes.edge(tile, is_row ? 0 : 1), boxes.edge(tile, is_row ? 2 : 3),
                        is_row ? line : line - tables.height, size, is_row ? tables.height : tables.width);
    return;
  }
  entry -= tables.num_ranges();
  const bool is_tile = entry < tables.tiles;
  const int64_t image = is_tile ? boxes.image(entry, tables.images) : entry - tables.tiles;
  int32_t before = 0;
  for (int64_t other = 0; other < tables.tiles; ++other) {
    const int64_t its = boxes.image(other, tables.images);
    before += its < image || (is_tile && its == image && other < entry);
  }
  if (is_tile) {
    tables.order[before] = static_cast<int32_t>(entry);
  } else {
    tables.starts[image] = before;
  }
}

// How much of `cell` a sample takes, as `tap_weight`.
FILA_HOST_DEVICE float table_weight(const TableTap& tap, int64_t cell) {
  float weight = tap.first == cell ? tap.lower : 0.0f;
  if (tap.second == cell && !(tap.upper == 0.0f)) {
    weight += tap.upper;
  }
  return weight;
}

// One pack of one cell: the sum over the tiles of its image, and their samples, in order.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE void sum_pack(const SampleGradients<Scalar>& grad, const CropTables& tables, int64_t image,
                               int64_t row, int64_t column, int64_t channel, Scalar* out) {
  using Vector = Pack<Scalar, kWidth>;
  float sum[kWidth] = {};
  for (int32_t place = tables.starts[image]; place < tables.starts[image + 1]; ++place) {
    const int64_t tile = tables.order[place];
    const TableRange* ranges = tables.ranges + tile * (tables.height + tables.width);
    const TableRange rows = ranges[row];
    if (rows.begin == rows.end) {
      continue;
    }
    const TableRange columns = ranges[tables.height + column];
    const TableTap* taps = tables.taps + tile * 2 * tables.size;
    for (int32_t i = rows.begin; i < rows.end; ++i) {
      const float weight_y = table_weight(taps[i], row);
      const Scalar* samples = grad.data + tile * grad.stride_tile + i * grad.stride_line + channel;
      for (int32_t j = columns.begin; j < columns.end; ++j) {
        const float weight = weight_y * table_weight(taps[tables.size + j], column);
        const Vector value = *reinterpret_cast<const Vector*>(samples + j * grad.stride_sample);
        for (int k = 0; k < kWidth; ++k) {
          sum[k] += weight * Number<Scalar>::widen(value.element[k]);
        }
      }
    }
  }
  Vector result;
  for (int k = 0; k < kWidth; ++k) {
    result.element[k] = Number<Scalar>::narrow(sum[k]);
  }
  store_pack(result, out);
}

// Thread `thread` of `threads` sums its share of block `block` of the dense maps' rows.
template <typename Scalar, int kWidth>
FILA_HOST_DEVICE void sum_share(const SampleGradients<Scalar>& grad, const CropTables& tables, Scalar* out,
                                const LineBlocks& blocks, int64_t block, int32_t thread, int32_t threads) {
  const int64_t line = blocks.line(block);
  const int64_t first = blocks.first_column(block);
  const int32_t items = blocks.columns(block) * blocks.vectors;
  for (int32_t item = thread; item < items; item += threads) {
    const int64_t column = first + item / blocks.vectors;
    const int64_t channel = int64_t(item % blocks.vectors) * kWidth;
    sum_pack<Scalar, kWidth>(grad, tables, line / tables.height, line % tables.height, column, channel,
                             out + (line * tables.width + column) * grad.channels + channel);
  }
}

}  // namespace fila
