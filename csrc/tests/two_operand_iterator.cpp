// The sm_80 main loop over two operands, executed on the host: CUTLASS's own iterators, in its multistage loop's order
// of calls, for every thread of a block. Each element of [X ; S] and of the weight's columns has to be loaded once, in
// its operand's tiles, and nothing outside. CTest leaves it out, since it needs the headers of CUTLASS and CUDA
// (tests/kernels/test_cuda_host.py runs it).

#include <cuda_runtime_api.h>

#include <algorithm>

// nvcc names itself to the host's compiler too, from which CUTLASS takes it that kernels can be compiled.
#undef __NVCC__
#undef __CUDACC_VER_MAJOR__
// Names that only device code declares.
static const uint3 blockIdx{};
using std::max;
using std::min;
namespace cutlass::arch {
inline int LaneId() {
  return 0;
}
}  // namespace cutlass::arch

#include <cutlass/cutlass.h>
#include <cutlass/gemm/threadblock/default_mma.h>

#include <map>
#include <vector>

#include "../cuda/two_operand_iterator.h"
#include "../rows.h"
#include "testing.h"

// What the iterators are told; another value plants a fault.
#ifndef TURN
#define TURN turn_after(tiles)
#endif

namespace {

using namespace fila;
using namespace fila::testing;

using Scalar = cutlass::half_t;
constexpr int kStages = 4, kTile = 32, kThreads = 128, kBlockRows = 128, kVector = 8;
using Mma = cutlass::gemm::threadblock::DefaultMma<
    Scalar, cutlass::layout::RowMajor, kVector, Scalar, cutlass::layout::ColumnMajor, kVector, float,
    cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<128, 128, kTile>, cutlass::gemm::GemmShape<64, 64, kTile>,
    cutlass::gemm::GemmShape<16, 8, 16>, kStages, cutlass::arch::OpMultiplyAdd>::ThreadblockMma;

// Rows of `depth` elements that count, with others behind them up to the stride, and nothing behind the last.
struct Operand {
  int rows, depth, stride;
  std::vector<Scalar> data;
  std::vector<int> loads, tile;

  Operand(int rows, int depth, int padding)
      : rows(rows),
        depth(depth),
        stride(depth + padding),
        data(rows * stride),
        loads(data.size(), 0),
        tile(data.size(), -1) {}

  bool load(const Scalar* element, int at) {
    const auto offset = element - data.data();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(data.size())) {
      return false;
    }
    ++loads[offset];
    tile[offset] = at;
    return true;
  }
};

template <class Iterator, bool kDepthFirst>
void walk(int rows, int first_depth, int second_depth, int first_row) {
  using Coord = typename Iterator::TensorCoord;
  const auto coord = [](int row, int depth) { return kDepthFirst ? Coord(depth, row) : Coord(row, depth); };
  Operand x(rows, first_depth, 24), s(rows, second_depth, second_depth > 0 ? 8 : 0);
  const auto operand = [&](Operand& o) {
    return typename Iterator::Operand{{typename Iterator::Layout(o.stride)}, o.data.data(), coord(o.rows, o.depth)};
  };
  const auto first = operand(x), second = operand(s);
  const DepthTiles tiles = depth_tiles(first_depth, second_depth, kTile);

  for (int thread = 0; thread < kThreads; ++thread) {
    Iterator iterator(first, second, TURN, thread, coord(first_row, 0));
    int at = 0;
    const auto load_tile = [&] {
      iterator.set_iteration_index(0);
      for (int i = 0; i < Iterator::ThreadMap::Iterations::kCount * Iterator::kAccessesPerVector; ++i, ++iterator) {
        const auto* vector = reinterpret_cast<const Scalar*>(iterator.get());
        for (int e = 0; iterator.valid() && e < kVector; ++e) {
          EXPECT(x.load(vector + e, at) || s.load(vector + e, at), "outside both at tile ", at);
        }
      }
      ++at;
      iterator.add_tile_offset(coord(0, 1));
    };
    // As MmaMultistage does: a prologue of all stages but one, then on until the last of those is used up.
    int left = tiles.first + tiles.second;
    for (int stage = 0; stage < kStages - 1; ++stage, --left) {
      iterator.clear_mask(left == 0);
      load_tile();
    }
    iterator.clear_mask(left == 0);
    while (left > 1 - kStages) {
      load_tile();
      --left;
      iterator.clear_mask(left == 0);
    }
  }

  const auto check = [&](const Operand& o, bool is_second) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < o.stride; ++k) {
        const int wanted = k < o.depth && row >= first_row && row < first_row + kBlockRows;
        const int i = row * o.stride + k;
        EXPECT(o.loads[i] == wanted && (!wanted || (o.tile[i] >= tiles.first) == is_second), is_second ? "S" : "X",
               " at row ", row, ", ", k, " of ", o.depth, ": ", o.loads[i], " loads, the last at tile ", o.tile[i]);
      }
    }
  };
  check(x, false);
  check(s, true);
}

}  // namespace

int main() {
  for (const auto& [first, second] : {std::pair(64, 64),
                                      {64, 0},
                                      {8, 8},
                                      {8, 0},
                                      {32, 0},
                                      {40, 72},
                                      {1024, 192},
                                      {1000, 200},
                                      {96, 8},
                                      {8, 96},
                                      {104, 0},
                                      {128, 0}}) {
    for (const auto& [rows, first_row] : {std::pair(128, 0), {130, 128}, {300, 128}, {5, 0}}) {
      walk<TwoOperandIterator<Mma::IteratorA>, false>(rows, first, second, first_row);
      walk<TwoOperandIterator<Mma::IteratorB>, true>(rows, first, second, first_row);
    }
  }
  return finish();
}
