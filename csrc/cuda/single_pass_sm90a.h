// The single-pass kernel: a cluster of four blocks makes 128 rows. Each block multiplies them with 256 rows of W1,
// keeps the 256 hidden columns that come out in shared memory, hands them round, and multiplies all 1024 with 256 rows
// of W2.
//
//     warps 0-3    producers: one thread starts all copies; all gather S
//     warps 4-11   consumers: two groups of 64 rows, 256 columns each in registers
//
// All operands pass through one ring of stages, a tile of 128 rows [128, 64] and a tile of a weight [256, 64] each. The
// rows come from all four blocks, by copies that report to the barrier of the receiving block: quarters of X by
// multicast, quarters of S, which are gathered straight into the stage, and tiles of the hidden activation. So a stage
// is free when the consumers of all four blocks are done with it.

#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
// After what they stand on.
#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "../single_pass_index.h"
#include "../tma.h"
#include "element.h"
#include "epilogue.h"
#include "launch.h"
#include "single_pass.h"

namespace fila {

constexpr int kSinglePassStages = 3;
constexpr int kGroupThreads = 128;
constexpr int kConsumerGroups = 2;
constexpr int kSinglePassThreads = (1 + kConsumerGroups) * kGroupThreads;
// Of 65536 registers, 168 a thread at the start.
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;
constexpr int kGatherItems = kQuarterRows * kTileVectors / kGroupThreads;
static_assert(kGatherItems * kGroupThreads == kQuarterRows * kTileVectors, "every vector of a quarter has its thread");

// From this block's shared memory to the same place, or another, of a block of the cluster, whose barrier counts the
// bytes.
CUTLASS_DEVICE void copy_to_block(const void* source, const void* target, const uint64_t* barrier, uint32_t bytes,
                                  uint32_t block) {
  uint32_t remote_target, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote_target)
               : "r"(cute::cast_smem_ptr_to_uint(target)), "r"(block));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote_barrier)
               : "r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(block));
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(remote_target), "r"(cute::cast_smem_ptr_to_uint(source)), "r"(bytes), "r"(remote_barrier)
               : "memory");
}

// Residual is the type of the tokens that are added, and of the result.
template <Element kElement, typename Residual>
struct SinglePassKernel {
  using Scalar = ScalarOf<kElement>;
  // What samples are computed with: the same type by the name that crop_resize knows.
  using MapScalar = cute::conditional_t<kElement == Element::kBFloat16, __nv_bfloat16, __half>;
  using Vector = Pack<MapScalar, kVectorElements>;

  using RowTile = cute::Shape<cute::Int<kClusterRows>, cute::Int<kDepthTile>>;
  using WeightTile = cute::Shape<cute::Int<kBlockColumns>, cute::Int<kDepthTile>>;
  using Swizzle = cute::GMMA::Layout_K_SW128_Atom<Scalar>;
  using RowLayout = decltype(cute::tile_to_shape(Swizzle{}, cute::append(RowTile{}, cute::Int<kSinglePassStages>{})));
  using WeightLayout =
      decltype(cute::tile_to_shape(Swizzle{}, cute::append(WeightTile{}, cute::Int<kSinglePassStages>{})));
  using Atom = cute::conditional_t<kElement == Element::kBFloat16,
                                   cute::SM90_64x256x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>,
                                   cute::SM90_64x256x16_F32F16F16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>>;
  using TiledMma = decltype(cute::make_tiled_mma(
      Atom{}, cute::Layout<cute::Shape<cute::Int<kConsumerGroups>, cute::_1, cute::_1>>{}));

  using Stride = cute::Stride<int64_t, cute::_1>;
  using GlobalMatrix = decltype(cute::make_tensor(cute::make_gmem_ptr(static_cast<Scalar const*>(nullptr)),
                                                  cute::make_shape(0, 0), Stride{}));
  using TmaRows =
      decltype(cute::make_tma_copy(cute::SM90_TMA_LOAD_MULTICAST{}, GlobalMatrix{}, RowLayout{}(cute::_, cute::_, 0),
                                   RowTile{}, cute::Int<kClusterBlocks>{}));
  using TmaWeight = decltype(cute::make_tma_copy(cute::SM90_TMA_LOAD{}, GlobalMatrix{},
                                                 WeightLayout{}(cute::_, cute::_, 0), WeightTile{}, cute::_1{}));

  struct Params {
    TmaRows tokens;
    TmaWeight weight_x, weight_s, weight_2;
    Walk walk;
    FeatureMaps<MapScalar> maps;
    TileBoxes boxes;
    int64_t size;
    Rows rows;
    int32_t num_rows;
    Residual const* x;
    Scalar const *bias_1, *bias_2, *alpha;
    int64_t stride_x;
    bool product;
    Residual* out;
    Scalar *hidden, *branch;
  };

  static constexpr uint32_t kRowBytes = kClusterRows * kDepthTile * sizeof(Scalar);
  static constexpr uint32_t kQuarterBytes = kRowBytes / kClusterBlocks;
  static constexpr uint32_t kWeightBytes = kBlockColumns * kDepthTile * sizeof(Scalar);

  // One row of this block's quarter of S; a null map for rows that are not samples.
  struct SampleSource {
    MapScalar const* image;
    PlacedTap y, x;
  };

  struct Storage {
    alignas(1024) Scalar rows[kSinglePassStages][kClusterRows * kDepthTile];
    alignas(1024) Scalar weight[kSinglePassStages][kBlockColumns * kDepthTile];
    alignas(1024) Scalar hidden[kBlockColumns / kDepthTile][kClusterRows * kDepthTile];
    SampleSource sources[kQuarterRows];
    cutlass::arch::ClusterTransactionBarrier full[kSinglePassStages];
    cutlass::arch::ClusterBarrier empty[kSinglePassStages];
    cutlass::arch::ClusterBarrier hidden_ready;
  };

  // Row `lane` of this block's quarter: where its sample reads.
  static CUTLASS_DEVICE SampleSource source_of(const Params& params, int32_t row) {
    const Token token = token_of(row, params.rows);
    if (row >= params.num_rows || !is_patch(token)) {
      return {nullptr, {}, {}};
    }
    const auto place = [&](bool down) -> PlacedTap {
      const int64_t index = down ? token.patch / params.size : token.patch % params.size;
      const int64_t stride = down ? params.maps.stride_row : params.maps.stride_cell;
      const Tap<double> tap =
          box_tap<double>(params.boxes.edge(token.tile, down ? 0 : 1), params.boxes.edge(token.tile, down ? 2 : 3),
                          index, params.size, down ? params.maps.height : params.maps.width);
      return {tap.first * stride, tap.second * stride, static_cast<float>(1.0 - tap.weight),
              static_cast<float>(tap.weight)};
    };
    return {params.maps.data + params.boxes.image(token.tile, params.maps.images) * params.maps.stride_image,
            place(true), place(false)};
  }

  static CUTLASS_DEVICE void produce(const Params& params, Storage& storage, uint32_t block, int32_t row_block) {
    const int thread = threadIdx.x;
    const bool leader = thread == 0;
    auto rows = cute::make_tensor(cute::make_smem_ptr(&storage.rows[0][0]), RowLayout{});
    auto weight = cute::make_tensor(cute::make_smem_ptr(&storage.weight[0][0]), WeightLayout{});
    auto token_slice = params.tokens.get_slice(block);
    auto x_source = token_slice.partition_S(
        cute::local_tile(params.tokens.get_tma_tensor(cute::make_shape(params.num_rows, cute::Int<kSinglePassWidth>{})),
                         RowTile{}, cute::make_coord(row_block, cute::_)));
    auto x_target = token_slice.partition_D(rows);
    auto weight_slice = params.weight_x.get_slice(cute::_0{});
    auto w_source = weight_slice.partition_S(cute::local_tile(
        params.weight_x.get_tma_tensor(cute::make_shape(cute::Int<kSinglePassWidth>{}, cute::Int<kSinglePassWidth>{})),
        WeightTile{}, cute::make_coord(block, cute::_)));
    auto w_target = weight_slice.partition_D(weight);
    constexpr uint16_t kAllBlocks = (1 << kClusterBlocks) - 1;

    Ring<kSinglePassStages> ring;
    const int32_t count = params.walk.count();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int32_t at = 0; at < count; ++at, ring.next()) {
      const WalkTile tile = params.walk.tile(at);
      const bool gathers = tile.operand == Operand::kSamples;
      Vector samples[kGatherItems] = {};
      if (gathers) {
        // Before there is a place for them, so that the map's latency passes while the stage is still being read.
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kGatherItems; ++i) {
          const int item = thread + i * kGroupThreads;
          const SampleSource& source = storage.sources[item / kTileVectors];
          const int64_t channel = int64_t(tile.index) * kDepthTile + item % kTileVectors * kVectorElements;
          if (source.image != nullptr && channel < params.maps.channels) {
            samples[i] = sample_pack<MapScalar, kVectorElements>(source.image + channel, source.y, source.x);
          }
        }
      }
      // One thread waits for all: a phase is told by its parity, which threads that lag or skip tiles would misread.
      if (leader) {
        storage.empty[ring.stage].wait(ring.phase ^ 1u);
      }
      Scalar* stage_rows = storage.rows[ring.stage];
      if (gathers) {
        __syncwarp();
        cutlass::arch::NamedBarrier::sync(kGroupThreads, 0);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kGatherItems; ++i) {
          const int item = thread + i * kGroupThreads;
          const int32_t row = block * kQuarterRows + item / kTileVectors;
          *reinterpret_cast<uint4*>(stage_rows + swizzled(row, item % kTileVectors)) =
              *reinterpret_cast<const uint4*>(&samples[i]);
        }
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::sync(kGroupThreads, 0);
      }
      if (!leader) {
        continue;
      }

      auto& full = storage.full[ring.stage];
      uint64_t* full_barrier = reinterpret_cast<uint64_t*>(&full);
      // A block's own quarter of S is there already.
      full.arrive_and_expect_tx(kWeightBytes + kRowBytes - (gathers ? kQuarterBytes : 0));
      const TmaWeight& descriptor = tile.operand == Operand::kTokens    ? params.weight_x
                                    : tile.operand == Operand::kSamples ? params.weight_s
                                                                        : params.weight_2;
      cute::copy(descriptor.with(*full_barrier), w_source(cute::_, cute::_, cute::_, tile.index),
                 w_target(cute::_, cute::_, cute::_, ring.stage));
      if (tile.operand == Operand::kTokens) {
        cute::copy(params.tokens.with(*full_barrier, kAllBlocks), x_source(cute::_, cute::_, cute::_, tile.index),
                   x_target(cute::_, cute::_, cute::_, ring.stage));
      } else if (gathers) {
        const Scalar* quarter = stage_rows + block * kQuarterRows * kDepthTile;
        for (uint32_t other = 1; other < kClusterBlocks; ++other) {
          copy_to_block(quarter, quarter, full_barrier, kQuarterBytes, (block + other) % kClusterBlocks);
        }
      } else if (hidden_owner(tile.index) == static_cast<int32_t>(block)) {
        storage.hidden_ready.wait(0);
        for (uint32_t other = 0; other < kClusterBlocks; ++other) {
          copy_to_block(storage.hidden[hidden_slot(tile.index)], stage_rows, full_barrier, kRowBytes, other);
        }
      }
    }
  }

  // sum = rows weight' over `count` tiles of the ring.
  template <class Mma, class Sums, class RowFragments, class WeightFragments>
  static CUTLASS_DEVICE void multiply(Storage& storage, Ring<kSinglePassStages>& ring, int32_t count, Mma& mma,
                                      Sums& sums, RowFragments const& rows, WeightFragments const& weight) {
    // One thread of each warp tells one block that this group is done with a stage.
    const int thread = threadIdx.x % kGroupThreads;
    const auto release = [&](int stage) {
      storage.empty[stage].arrive(thread / cutlass::NumThreadsPerWarp, thread % cutlass::NumThreadsPerWarp == 0);
    };
    const auto start_tile = [&] {
      storage.full[ring.stage].wait(ring.phase);
      cute::warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < cute::size<2>(rows); ++k) {
        cute::gemm(mma, rows(cute::_, cute::_, k, ring.stage), weight(cute::_, cute::_, k, ring.stage), sums);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
    };
    // The first tile by itself: sums that a loop enters undefined would make ptxas serialise its products.
    mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    cute::warpgroup_fence_operand(sums);
    start_tile();
    cute::warpgroup_fence_operand(sums);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int32_t at = 1; at < count; ++at) {
      const int previous = ring.stage;
      ring.next();
      cute::warpgroup_fence_operand(sums);
      start_tile();
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(sums);
      release(previous);
    }
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sums);
    release(ring.stage);
    ring.next();
  }

  template <typename Number>
  using PairOf = cutlass::AlignedArray<Number, 2>;
  using Pair = PairOf<Scalar>;

  // Neighbours of a row, of the vector of columns that `row` points into.
  template <typename Number>
  static CUTLASS_DEVICE PairOf<Number> load_pair(Number const* row, int vector) {
    return *reinterpret_cast<PairOf<Number> const*>(row + vector * kVectorElements);
  }
  template <typename Number>
  static CUTLASS_DEVICE void store_pair(Number* row, int vector, const float (&values)[2]) {
    PairOf<Number> pair;
    pair[0] = static_cast<Number>(values[0]);
    pair[1] = static_cast<Number>(values[1]);
    *reinterpret_cast<PairOf<Number>*>(row + vector * kVectorElements) = pair;
  }

  // What a thread's two rows are of the whole, and where its first pair of columns lies in them.
  struct ThreadRows {
    int32_t row[2];
    Token token[2];
    int32_t column;

    // In a matrix of all rows.
    template <class Pointer>
    CUTLASS_DEVICE Pointer in_rows(Pointer matrix, int64_t stride, int half) const {
      return matrix + row[half] * stride + column;
    }
    // In a matrix of samples; null where there is none, or none of this row.
    CUTLASS_DEVICE Scalar* in_samples(Scalar* matrix, const Params& params, int half) const {
      const bool has = matrix != nullptr && row[half] < params.num_rows && is_patch(token[half]);
      return has ? matrix + sample_of(token[half], params.rows) * kSinglePassWidth + column : nullptr;
    }
  };

  static CUTLASS_DEVICE void consume(const Params& params, Storage& storage, uint32_t block, int32_t row_block) {
    const int thread = threadIdx.x - kGroupThreads;
    const int group = thread / kGroupThreads;
    TiledMma mma;
    auto rows = cute::make_tensor(cute::make_smem_ptr(&storage.rows[0][0]), RowLayout{});
    auto weight = cute::make_tensor(cute::make_smem_ptr(&storage.weight[0][0]), WeightLayout{});
    auto thread_mma = mma.get_slice(thread);
    auto row_fragments = thread_mma.make_fragment_A(thread_mma.partition_A(rows));
    auto weight_fragments = thread_mma.make_fragment_B(thread_mma.partition_B(weight));
    auto sums = cute::partition_fragment_C(mma, cute::Shape<cute::Int<kClusterRows>, cute::Int<kBlockColumns>>{});

    const int first_row = group * (kClusterRows / kConsumerGroups);
    ThreadRows own;
    own.column = block * kBlockColumns + sum_column(thread);
    for (int half = 0; half < 2; ++half) {
      own.row[half] = row_block * kClusterRows + first_row + sum_row(thread % kGroupThreads, half);
      own.token[half] = token_of(own.row[half], params.rows);
    }

    Ring<kSinglePassStages> ring;
    multiply(storage, ring, params.walk.token_tiles + params.walk.sample_tiles, mma, sums, row_fragments,
             weight_fragments);
    activate(params, storage, own, first_row + sum_row(thread % kGroupThreads, 0), sums);
    cutlass::arch::fence_view_async_shared();
    storage.hidden_ready.arrive();

    multiply(storage, ring, params.walk.hidden_tiles, mma, sums, row_fragments, weight_fragments);
    fuse(params, own, sums);
  }

  // Sums are gone through a few vectors of columns at a time, whose loads are in flight together; more of them at once
  // would not fit beside the sums.
  static constexpr int kPairsAtOnce = 4;
  static_assert(kPairs % kPairsAtOnce == 0);

  // A = gelu(Z) to this block's part of the hidden activation, from `local_row` on, and Z to where it is kept.
  template <class Sums>
  static CUTLASS_DEVICE void activate(const Params& params, Storage& storage, const ThreadRows& own, int32_t local_row,
                                      const Sums& sums) {
    const Fc1Layer layer{false};
    Scalar* kept[2] = {own.in_samples(params.hidden, params, 0), own.in_samples(params.hidden, params, 1)};
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kPairs; first += kPairsAtOnce) {
      Pair bias[kPairsAtOnce / 2];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce / 2; ++i) {
        bias[i] = load_pair(params.bias_1 + own.column, first / 2 + i);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce; ++i) {
        const SumPair pair = sum_pair(first + i);
        float z[2], a[2];
        for (int j = 0; j < 2; ++j) {
          z[j] = layer.keep(sums(2 * (first + i) + j), static_cast<float>(bias[i / 2][j]), 0.0f);
          a[j] = layer.finish(z[j], 0.0f, true);
        }
        if (kept[pair.half] != nullptr) {
          store_pair(kept[pair.half], pair.vector, z);
        }
        // Rows eight apart are swizzled alike.
        Scalar* tile = storage.hidden[pair.vector / kTileVectors] + 8 * kDepthTile * pair.half;
        store_pair(tile + swizzled(local_row, pair.vector % kTileVectors) + own.column % kVectorElements, 0, a);
      }
      asm volatile("" ::: "memory");
    }
  }

  // M to where it is kept, and the fused tokens.
  template <class Sums>
  static CUTLASS_DEVICE void fuse(const Params& params, const ThreadRows& own, const Sums& sums) {
    const Fc2Layer layer{make_gate(static_cast<float>(*params.alpha), params.product)};
    Scalar* kept[2] = {own.in_samples(params.branch, params, 0), own.in_samples(params.branch, params, 1)};
    Residual const* x[2] = {own.in_rows(params.x, params.stride_x, 0), own.in_rows(params.x, params.stride_x, 1)};
    Residual* out[2] = {own.in_rows(params.out, kSinglePassWidth, 0), own.in_rows(params.out, kSinglePassWidth, 1)};
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kPairs; first += kPairsAtOnce) {
      Pair bias[kPairsAtOnce / 2];
      PairOf<Residual> tokens[kPairsAtOnce] = {};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce; ++i) {
        const SumPair pair = sum_pair(first + i);
        bias[i / 2] = load_pair(params.bias_2 + own.column, pair.vector);
        if (own.row[pair.half] < params.num_rows) {
          tokens[i] = load_pair(x[pair.half], pair.vector);
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce; ++i) {
        const SumPair pair = sum_pair(first + i);
        float m[2], fused[2];
        for (int j = 0; j < 2; ++j) {
          m[j] = layer.keep(sums(2 * (first + i) + j), static_cast<float>(bias[i / 2][j]), 0.0f);
          fused[j] = layer.finish(m[j], static_cast<float>(tokens[i][j]), is_patch(own.token[pair.half]));
        }
        if (kept[pair.half] != nullptr) {
          store_pair(kept[pair.half], pair.vector, m);
        }
        if (own.row[pair.half] < params.num_rows) {
          store_pair(out[pair.half], pair.vector, fused);
        }
      }
      asm volatile("" ::: "memory");
    }
  }

  static CUTLASS_DEVICE void run_block(const Params& params, Storage& storage) {
    const uint32_t block = cute::block_rank_in_cluster();
    const int32_t row_block = blockIdx.x / kClusterBlocks;
    const int thread = threadIdx.x;
    if (thread == 0) {
      for (int stage = 0; stage < kSinglePassStages; ++stage) {
        storage.full[stage].init(1);
        storage.empty[stage].init(kClusterBlocks * kConsumerGroups);
      }
      storage.hidden_ready.init(kConsumerGroups * kGroupThreads);
      cutlass::arch::fence_barrier_init();
    }
    if (thread < kQuarterRows) {
      storage.sources[thread] = source_of(params, row_block * kClusterRows + block * kQuarterRows + thread);
    }
    cute::cluster_arrive();
    cute::cluster_wait();

    if (thread < kGroupThreads) {
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      produce(params, storage, block, row_block);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
      consume(params, storage, block, row_block);
    }
    // No block leaves while others copy from its memory or report to its barriers.
    __syncwarp();
    cute::cluster_arrive();
    cute::cluster_wait();
  }
};

template <Element kElement, typename Residual>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kSinglePassThreads, 1)
    single_pass_kernel(const __grid_constant__ typename SinglePassKernel<kElement, Residual>::Params params) {
  using Kernel = SinglePassKernel<kElement, Residual>;
  extern __shared__ __align__(1024) char storage[];
  Kernel::run_block(params, *reinterpret_cast<typename Kernel::Storage*>(storage));
}

template <Element kElement, typename Residual>
const char* launch_single_pass_of(const SinglePass& call, CUstream_st* stream) {
  using Kernel = SinglePassKernel<kElement, Residual>;
  using Scalar = typename Kernel::Scalar;
  const auto matrix = [](const Matrix& matrix, int64_t first, int64_t rows, int64_t columns) {
    return cute::make_tensor(cute::make_gmem_ptr(static_cast<Scalar const*>(matrix.data) + first),
                             cute::make_shape(static_cast<int>(rows), static_cast<int>(columns)),
                             typename Kernel::Stride{matrix.stride, {}});
  };
  const auto weight = [&](const Matrix& whole, int64_t first, int64_t columns) {
    return cute::make_tma_copy(cute::SM90_TMA_LOAD{}, matrix(whole, first, kSinglePassWidth, columns),
                               typename Kernel::WeightLayout{}(cute::_, cute::_, 0), typename Kernel::WeightTile{},
                               cute::_1{});
  };
  const auto& maps = call.maps;
  const int64_t width = kSinglePassWidth;
  const char* fault = tma_fault({{call.tokens.data, call.tokens.stride, call.num_rows, width},
                                 {call.fc1_weight.data, call.fc1_weight.stride, width, width + maps.channels},
                                 {call.fc2_weight.data, call.fc2_weight.stride, width, width}},
                                sizeof(Scalar));
  if (fault != nullptr) {
    return fault;
  }
  const typename Kernel::Params params{
      cute::make_tma_copy(cute::SM90_TMA_LOAD_MULTICAST{}, matrix(call.tokens, 0, call.num_rows, kSinglePassWidth),
                          typename Kernel::RowLayout{}(cute::_, cute::_, 0), typename Kernel::RowTile{},
                          cute::Int<kClusterBlocks>{}),
      weight(call.fc1_weight, 0, kSinglePassWidth),
      weight(call.fc1_weight, kSinglePassWidth, maps.channels),
      weight(call.fc2_weight, 0, kSinglePassWidth),
      make_walk(static_cast<int32_t>(maps.channels)),
      {reinterpret_cast<typename Kernel::MapScalar const*>(maps.data), maps.stride_image, maps.stride_row,
       maps.stride_cell, maps.images, maps.height, maps.width, maps.channels},
      call.boxes,
      call.size,
      call.rows,
      static_cast<int32_t>(call.num_rows),
      static_cast<Residual const*>(call.residual.data),
      static_cast<Scalar const*>(call.fc1_bias),
      static_cast<Scalar const*>(call.fc2_bias),
      static_cast<Scalar const*>(call.alpha),
      call.residual.stride,
      call.product,
      static_cast<Residual*>(call.out),
      static_cast<Scalar*>(call.hidden),
      static_cast<Scalar*>(call.branch)};

  constexpr int kBytes = sizeof(typename Kernel::Storage);
  static_assert(kBytes <= 232448, "shared memory that a block may have on compute capability 9.0");
  const auto kernel = single_pass_kernel<kElement, Residual>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status == cudaSuccess) {
    const int64_t clusters = (call.num_rows + kClusterRows - 1) / kClusterRows;
    kernel<<<static_cast<unsigned>(clusters * kClusterBlocks), kSinglePassThreads, kBytes, stream>>>(params);
    status = cudaGetLastError();
  }
  return forget_error(status);
}

template <Element kElement>
const char* launch_single_pass(const SinglePass& call, CUstream_st* stream) {
  return call.mixed ? launch_single_pass_of<kElement, float>(call, stream)
                    : launch_single_pass_of<kElement, ScalarOf<kElement>>(call, stream);
}

}  // namespace fila
