// The single-pass kernel's layouts against CuTe's, on the host: our rules for the places of elements have to equal
// those by which TMA writes, wgmma reads and accumulators are laid out. Compiled as CUDA code without a launch; CTest
// leaves it out, since it needs the headers of CUTLASS and CUDA (tests/kernels/test_cuda_host.py runs it).

#include "../cuda/single_pass_sm90a.h"

#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

using Single = SinglePassKernel<Element::kBFloat16, ScalarOf<Element::kBFloat16>>;

template <class Layout>
void test_tiles(int rows) {
  // The swizzle is one of addresses.
  alignas(1024) static Single::Scalar base[cute::cosize_v<Layout>];
  const auto stages = cute::make_tensor(cute::make_smem_ptr(base), Layout{});
  for (int stage = 0; stage < kSinglePassStages; ++stage) {
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < kDepthTile; ++column) {
        const auto place = cute::raw_pointer_cast(&stages(row, column, stage)) - base;
        const int expected =
            stage * rows * kDepthTile + swizzled(row, column / kVectorElements) + column % kVectorElements;
        EXPECT(place == expected, "row ", row, ", column ", column, " of stage ", stage, " at ", place);
      }
    }
  }
}

void test_sums() {
  Single::TiledMma mma;
  EXPECT(int(cute::size(mma)) == kConsumerGroups * kGroupThreads);
  const auto whole = cute::make_identity_tensor(cute::make_shape(kClusterRows + 0, kBlockColumns + 0));
  for (int thread = 0; thread < kConsumerGroups * kGroupThreads; ++thread) {
    const auto mine = mma.get_slice(thread).partition_C(whole);
    EXPECT(int(cute::size(mine)) == 2 * kPairs);
    for (int i = 0; i < 2 * kPairs; ++i) {
      const SumPair pair = sum_pair(i / 2);
      const int row = thread / kGroupThreads * 64 + sum_row(thread % kGroupThreads, pair.half);
      const int column = pair.vector * kVectorElements + sum_column(thread) + i % 2;
      EXPECT(int(cute::get<0>(mine(i))) == row && int(cute::get<1>(mine(i))) == column, "thread ", thread, ", sum ", i);
    }
  }
}

// Block q's share of a tile of X: rows and columns in the matrix, and the place in the stage that it is written to.
void test_quarters() {
  const int rows = 1000;
  const auto matrix = cute::make_tensor(cute::make_gmem_ptr(static_cast<Single::Scalar const*>(nullptr)),
                                        cute::make_shape(rows, kSinglePassWidth + 0), Single::Stride{1024, {}});
  const auto copy =
      cute::make_tma_copy(cute::SM90_TMA_LOAD_MULTICAST{}, matrix, Single::RowLayout{}(cute::_, cute::_, 0),
                          Single::RowTile{}, cute::Int<kClusterBlocks>{});
  alignas(1024) static unsigned char bytes[sizeof(Single::Storage)];
  auto& storage = *reinterpret_cast<Single::Storage*>(bytes);
  const auto stages = cute::make_tensor(cute::make_smem_ptr(&storage.rows[0][0]), Single::RowLayout{});
  const int row_block = 3, tile = 5, stage = 2;
  for (int block = 0; block < kClusterBlocks; ++block) {
    const auto slice = copy.get_slice(block);
    const auto source =
        slice.partition_S(cute::local_tile(copy.get_tma_tensor(cute::make_shape(rows, cute::Int<kSinglePassWidth>{})),
                                           Single::RowTile{}, cute::make_coord(row_block, cute::_)));
    const auto target = slice.partition_D(stages);
    const auto from = source(cute::_, cute::_, cute::_, tile);
    const auto to = target(cute::_, cute::_, cute::_, stage);
    // One instruction, which each block issues for all: a whole tile arrives. Its coordinates, the contiguous one
    // first.
    EXPECT(int(cute::size<1>(from)) == 1 && int(cute::size<2>(from)) == 1);
    EXPECT(int(cute::size(to)) == kClusterRows * kDepthTile, int(cute::size(to)));
    EXPECT(int(cute::get<0>(from(0))) == tile * kDepthTile, int(cute::get<0>(from(0))));
    EXPECT(int(cute::get<1>(from(0))) == row_block * kClusterRows + block * kQuarterRows, int(cute::get<1>(from(0))));
    const auto offset = cute::raw_pointer_cast(&to(0)) - &storage.rows[0][0];
    EXPECT(offset == stage * kClusterRows * kDepthTile + block * kQuarterRows * kDepthTile, offset);
  }
}

}  // namespace

int main() {
  test_tiles<Single::RowLayout>(kClusterRows);
  test_tiles<Single::WeightLayout>(kBlockColumns);
  test_sums();
  test_quarters();
  return finish();
}
