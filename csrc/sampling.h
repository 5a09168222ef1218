// Boxes to taps: which two cells of a map a sample reads along one axis, and with what weight.
//
// The definition, for a box [lo, hi) in cells (cell i spans [i, i + 1)) and sample i of size:
//
//     y(i) = clamp(lo + (i + 1/2) (hi - lo) / size - 1/2,  lo,  hi - 1)    boxes of one cell or more
//     y(i) = (lo + hi - 1) / 2                                             smaller boxes
//     y(i) clamped to [0, cells - 1];  taps floor(y) and min(floor(y) + 1, ceil(hi) - 1), each clamped to the map
//
// Positions are kept in the box's own frame, relative to floor(lo): far from the origin of a large map the spacing of
// absolute fp32 coordinates is 20 times coarser than the weights need. One header for host and device, so that both
// read the same cells. The taps lie on the map for any box, also one of NaN or infinities; a box that is not finite
// gets a NaN weight, hence NaN samples. A second tap of weight zero equals the first: a neighbour without weight is not
// read, so its NaN or infinity does not spread.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FILA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FILA_HOST_DEVICE inline
#endif

namespace fila {

// Sample = (1 - weight) * map[first] + weight * map[second].
template <typename Real>
struct Tap {
  int64_t first;
  int64_t second;
  Real weight;
};

template <typename Real>
FILA_HOST_DEVICE Real clamp_real(Real value, Real low, Real high) {
  return value < low ? low : (value > high ? high : value);
}

FILA_HOST_DEVICE int64_t clamp_cell(int64_t value, int64_t cells) {
  return value < 0 ? 0 : (value > cells - 1 ? cells - 1 : value);
}

// No map has cells so far out; integer arithmetic on numbers within it stays far from overflow.
constexpr int64_t kReach = int64_t(1) << 40;

// Where a box's own frame begins. A box from beyond reach has no digits to lose: its frame is the map's.
template <typename Real>
FILA_HOST_DEVICE Real box_origin(Real low) {
  const Real reach = static_cast<Real>(kReach);
  return low > -reach && low < reach ? std::floor(low) : Real(0);
}

// The tap of sample `index` of `size` along an axis of `cells` >= 1 cells. Real is the type of the arithmetic: double
// follows the definition to the last bit, float is what a GPU kernel wants.
template <typename Real>
FILA_HOST_DEVICE Tap<Real> box_tap(float box_low, float box_high, int64_t index, int64_t size, int64_t cells) {
  const Real low = static_cast<Real>(box_low);
  const Real high = static_cast<Real>(box_high);
  const Real extent = high - low;
  if (!std::isfinite(extent)) {
    return {0, 0, static_cast<Real>(NAN)};
  }

  const Real origin = box_origin(low);
  const Real start = low - origin;
  Real position;
  if (extent >= Real(1)) {
    position = start + ((static_cast<Real>(index) + Real(0.5)) * extent / static_cast<Real>(size) - Real(0.5));
    position = clamp_real(position, start, start + (extent - Real(1)));
  } else {
    position = start + (extent - Real(1)) / Real(2);
  }

  // A box may lie anywhere: beyond reach on either side all positions read the border cell.
  const Real reach = static_cast<Real>(kReach);
  const Real cell = std::floor(position);
  const int64_t first = static_cast<int64_t>(origin) + static_cast<int64_t>(clamp_real(cell, -reach, reach));
  const int64_t last = static_cast<int64_t>(clamp_real(std::ceil(high), -reach, reach)) - 1;

  // Beyond the centres of the border cells the position is clamped to them, and the weight with it.
  const Real weight = first < 0 || first >= cells - 1 ? Real(0) : position - cell;
  const int64_t next = first + 1 < last ? first + 1 : last;
  const int64_t near = clamp_cell(first, cells);
  return {near, weight == Real(0) ? near : clamp_cell(next, cells), weight};
}

// How much of `cell` a sample takes. Not zero either where the weight is NaN.
template <typename Real>
FILA_HOST_DEVICE Real tap_weight(const Tap<Real>& tap, int64_t cell) {
  Real weight = tap.first == cell ? Real(1) - tap.weight : Real(0);
  if (tap.second == cell && !(tap.weight == Real(0))) {
    weight += tap.weight;
  }
  return weight;
}

// Samples [begin, end) of a box.
struct SampleRange {
  int64_t begin;
  int64_t end;
};

// The way back: samples outside this range do not read `cell`; those inside may, as `tap_weight` of their `box_tap`
// says. A cell is read by samples with |y(i) - cell| < 1, and the border cells also by all beyond them. Positions grow
// with i, so that this is one range; it is widened by one sample on either side, more than rounding can move it.
template <typename Real>
FILA_HOST_DEVICE SampleRange box_samples(float box_low, float box_high, int64_t cell, int64_t size, int64_t cells) {
  const Real low = static_cast<Real>(box_low);
  const Real extent = static_cast<Real>(box_high) - low;
  if (!std::isfinite(extent)) {
    return {0, cell == 0 ? size : 0};
  }
  if (extent < Real(1)) {
    // All samples lie on one spot; an inverted box's two taps may be far from each other.
    const Tap<Real> tap = box_tap<Real>(box_low, box_high, 0, size, cells);
    return {0, cell == tap.first || cell == tap.second ? size : 0};
  }

  // Position start + (i + 1/2) step - 1/2 solved for i, within the clamp to [start, start + extent - 1].
  const Real origin = box_origin(low);
  const Real start = low - origin;
  const Real offset = static_cast<Real>(cell) - origin;
  const bool is_first = cell == 0;
  const bool is_last = cell == cells - 1;
  const Real step = extent / static_cast<Real>(size);
  const Real most = static_cast<Real>(size);
  const Real below = (offset - Real(0.5) - start) / step - Real(0.5);
  const Real above = (offset + Real(1.5) - start) / step - Real(0.5);
  const bool from_start = is_first || offset - Real(1) <= start;
  const bool to_end = is_last || offset + Real(1) >= start + (extent - Real(1));
  const int64_t begin = from_start ? 0 : static_cast<int64_t>(clamp_real(std::floor(below) - Real(1), Real(0), most));
  const int64_t end = to_end ? size : static_cast<int64_t>(clamp_real(std::ceil(above) + Real(2), Real(0), most));
  return {begin, end < begin ? begin : end};
}

}  // namespace fila
