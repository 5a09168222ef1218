// The products on architectures with TMA: CUTLASS's warp-specialised persistent kernels, with a main loop that walks
// through two row operands and an epilogue of ours.

#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cute/tensor.hpp>

#include "../tma.h"
#include "epilogue.h"
#include "launch.h"

namespace fila {

// A node of the epilogue's visitor tree that needs no preparation on the host.
template <class NodeArguments>
struct NodeHost {
  using Arguments = NodeArguments;
  using Params = NodeArguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
};

// The source operand, which TMA reads where there is one.
template <typename Scalar>
struct OptionalSource : cutlass::epilogue::fusion::Sm90SrcFetch<Scalar>, NodeHost<bool> {
  using Arguments = bool;
  using Params = bool;
  using SharedStorage = cute::tuple<>;
  using NodeHost<bool>::to_underlying_arguments;
  using NodeHost<bool>::can_implement;
  using NodeHost<bool>::get_workspace_size;
  using NodeHost<bool>::initialize_workspace;

  CUTLASS_HOST_DEVICE OptionalSource() {}
  CUTLASS_HOST_DEVICE OptionalSource(Params const& present, SharedStorage const&) : present(present) {}

  bool present = false;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return present; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return present; }
};

// The root of the tree: accumulator, bias and source to the result; and Z or M from registers to the rows of samples,
// which are not a matrix within the flat rows that TMA could address.
template <typename Scalar, typename Residual, class Epilogue>
struct RowVisitor : cutlass::epilogue::fusion::Sm90VisitorImpl<>, NodeHost<Epilogue> {
  using Arguments = Epilogue;
  using Params = Epilogue;
  using SharedStorage = cute::tuple<>;
  using NodeHost<Epilogue>::to_underlying_arguments;
  using NodeHost<Epilogue>::can_implement;
  using NodeHost<Epilogue>::get_workspace_size;
  using NodeHost<Epilogue>::initialize_workspace;

  CUTLASS_HOST_DEVICE RowVisitor() {}
  CUTLASS_HOST_DEVICE RowVisitor(Params const& epilogue, SharedStorage const&) : epilogue(&epilogue) {}

  Epilogue const* epilogue = nullptr;

  // `coordinates` [CPY, CPY_M, CPY_N, EPI_M, EPI_N] of this thread's elements count from its first one, which lies at
  // (row, column); the matrix ends `residue` after it.
  template <class Coordinates, class Residue>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Epilogue const& epilogue, Coordinates coordinates, Residue residue, int row, int column)
        : epilogue(epilogue),
          layer(epilogue.layer()),
          coordinates(coordinates),
          residue(residue),
          row(row),
          column(column) {}

    Epilogue const& epilogue;
    decltype(epilogue.layer()) layer;
    Coordinates coordinates;
    Residue residue;
    int row, column;

    template <typename Sum, typename Bias, typename Source, int kSize>
    CUTLASS_DEVICE cutlass::Array<Residual, kSize> visit(cutlass::Array<Sum, kSize> const&, int epi_v, int epi_m,
                                                         int epi_n, cutlass::Array<Sum, kSize> const& sum,
                                                         cutlass::Array<Bias, kSize> const& bias,
                                                         cutlass::Array<Source, kSize> const& source) {
      // Elements 2 i and 2 i + 1 are neighbours in a row.
      using Layout = typename Coordinates::layout_type;
      using Neighbour = decltype(Layout{}(cute::_1{}));
      static_assert(kSize % 2 == 0 && cute::is_constant<0, decltype(cute::get<0>(Neighbour{}))>::value &&
                    cute::is_constant<1, decltype(cute::get<1>(Neighbour{}))>::value);

      auto subtile = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      cutlass::Array<Residual, kSize> result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; i += 2) {
        const auto at = subtile(epi_v * kSize + i);
        const Token token = token_of(row + cute::get<0>(at), epilogue.rows);
        cutlass::AlignedArray<Scalar, 2> kept;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float operand = static_cast<float>(source[i + j]);
          const float value = layer.keep(sum[i + j], static_cast<float>(bias[i + j]), operand);
          kept[j] = static_cast<Scalar>(value);
          result[i + j] = static_cast<Residual>(layer.finish(value, operand, is_patch(token)));
        }
        if (epilogue.kept != nullptr && is_patch(token) && cute::elem_less(at, residue)) {
          Scalar* target = epilogue.kept + sample_of(token, epilogue.rows) * epilogue.width;
          *reinterpret_cast<cutlass::AlignedArray<Scalar, 2>*>(target + column + cute::get<1>(at)) = kept;
        }
      }
      return result;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    const int row = cute::get<0>(args.problem_shape_mnkl) - cute::get<0>(args.residue_tCcD);
    const int column = cute::get<1>(args.problem_shape_mnkl) - cute::get<1>(args.residue_tCcD);
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(*epilogue, args.tCcD, args.residue_tCcD, row,
                                                                       column);
  }
};

// Counts tiles along K, as the main loops' iterators do.
struct DepthIterator {
  int tile;
  CUTLASS_DEVICE int operator*() const { return tile; }
  CUTLASS_DEVICE DepthIterator& operator++() {
    ++tile;
    return *this;
  }
};

// The main loop of [first ; second] weight'. Each operand has descriptors of its own, for itself and for its columns of
// the weight, whose ends TMA pads with zeros; the producer walks through the first, then through the second, and the
// pipeline between it and the tensor cores sees one sequence of tiles. The coordinates along K start anew with the
// second operand, and mean the same for both.
template <class Base>
struct TwoOperandArguments {
  typename Base::Arguments first, second;
  int first_depth, second_depth;
};

template <class Base>
struct TwoOperandParams : Base::Params {
  typename Base::Params second;
  DepthTiles tiles;
};

template <class Base>
struct TwoOperandsHost : Base {
  using Arguments = TwoOperandArguments<Base>;
  using Params = TwoOperandParams<Base>;

  using Base::Base;

  // `hardware` is there where the base takes it.
  template <class ProblemShape, class... Hardware>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& arguments, void* workspace,
                                        Hardware const&... hardware) {
    const auto params_of = [&](typename Base::Arguments const& operand, int depth) {
      return Base::to_underlying_arguments(cute::replace<2>(shape, depth), operand, workspace, hardware...);
    };
    const auto first = params_of(arguments.first, arguments.first_depth);
    return {first, arguments.second_depth > 0 ? params_of(arguments.second, arguments.second_depth) : first,
            depth_tiles(arguments.first_depth, arguments.second_depth, cute::size<2>(typename Base::TileShape{}))};
  }

  template <class ProblemShape>
  static bool can_implement(ProblemShape const& shape, Arguments const& arguments) {
    return Base::can_implement(shape, arguments.first);
  }
};

template <class Base>
struct TwoOperandsSm90 : TwoOperandsHost<Base> {
  using Params = TwoOperandParams<Base>;

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.second);
  }

  template <class Inputs, class BlockCoord, class KTileIterator, class TensorStorage>
  CUTLASS_DEVICE void load(Params const& params, typename Base::MainloopPipeline pipeline,
                           typename Base::PipelineState state, Inputs const& inputs, BlockCoord const& block,
                           KTileIterator k_tile, int k_tile_count, int thread, uint32_t block_rank,
                           TensorStorage& storage) {
    // Tile by tile: a loop for each operand would hold more registers than the producer has.
    const int end = *k_tile + k_tile_count;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int k = *k_tile; k < end; ++k, ++state) {
      const bool is_first = k < params.tiles.first;
      typename Base::Params const& descriptors = is_first ? params : params.second;
      Base::load(descriptors, pipeline, state, inputs, block, DepthIterator{is_first ? k : k - params.tiles.first}, 1,
                 thread, block_rank, storage);
    }
  }
};

template <class Base>
struct TwoOperandsSm100 : TwoOperandsHost<Base> {
  using Params = TwoOperandParams<Base>;
  using PipelineState = typename Base::MainloopPipelineState;
  using ClusterShape = typename Base::DispatchPolicy::ClusterShape;

  CUTLASS_DEVICE TwoOperandsSm100(Params const& params, ClusterShape cluster, uint32_t block_rank)
      : TwoOperandsHost<Base>(params, cluster, block_rank), params(params) {}

  Params const& params;

  CUTLASS_DEVICE void prefetch_tma_descriptors() {
    for (int operand = 0; operand < 2; ++operand) {
      observe(operand);
      Base::prefetch_tma_descriptors();
    }
  }

  template <class Inputs, class BlockCoord, class KTileIterator>
  CUTLASS_DEVICE auto load(typename Base::MainloopPipeline pipeline, PipelineState state, Inputs const& inputs,
                           BlockCoord const& block, KTileIterator k_tile, int k_tile_count) {
    const DepthSplit split = split_depth(*k_tile, k_tile_count, params.tiles);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int operand = 0; operand < 2; ++operand) {
      observe(operand);
      const auto [next, unused] =
          Base::load(pipeline, state, inputs, block, DepthIterator{operand == 0 ? *k_tile : split.second_begin},
                     operand == 0 ? split.first_count : split.second_count);
      state = next;
    }
    for (int i = 0; i < k_tile_count; ++i) {
      ++k_tile;
    }
    return cute::make_tuple(state, k_tile);
  }

 private:
  // Which operand's descriptors the base reads.
  CUTLASS_DEVICE void observe(int operand) {
    typename Base::Params const& descriptors = operand == 0 ? params : params.second;
    this->observed_tma_load_a_ = &descriptors.tma_load_a;
    this->observed_tma_load_b_ = &descriptors.tma_load_b;
  }
};

// Two consumer groups take turns, so that the epilogue of one, which is long (erf, tanh), hides behind the other's
// products. A cluster of two shares the weight's tiles.
struct Sm90 {
  using Arch = cutlass::arch::Sm90;
  using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
  using BlockShape = TileShape;
  template <class Base>
  using TwoOperands = TwoOperandsSm90<Base>;
};

// Pairs of blocks work on one tile; accumulators are buffered in tensor memory, so that here too the epilogue hides.
struct Sm100 {
  using Arch = cutlass::arch::Sm100;
  using TileShape = cute::Shape<cute::_256, cute::_128, cute::_64>;
  using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecialized2SmSm100;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized2Sm;
  using BlockShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  template <class Base>
  using TwoOperands = TwoOperandsSm100<Base>;
};

template <class Config, class Product>
struct TmaProduct {
  using Scalar = typename Product::Scalar;
  using Residual = typename Product::Residual;
  using Epilogue = typename Product::Epilogue;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;

  using Visitor = cutlass::epilogue::fusion::Sm90EVT<
      RowVisitor<Scalar, Residual, Epilogue>, cutlass::epilogue::fusion::Sm90AccFetch,
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, typename Config::BlockShape, Scalar, float>,
      OptionalSource<Residual>>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassTensorOp, typename Config::TileShape, typename Config::ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Residual, RowMajor, Product::kResidualAlignment,
      Residual, RowMajor, Product::kResidualAlignment, typename Config::EpilogueSchedule, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassTensorOp, Scalar, RowMajor, kAlignment, Scalar, ColumnMajor,
      kAlignment, float, typename Config::TileShape, typename Config::ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Config::MainloopSchedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>,
                                           typename Config::template TwoOperands<Mainloop>, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;

  static const char* run(const Product& product, cudaStream_t stream) {
    const auto operand = [](const Matrix& matrix, int64_t first = 0) {
      return static_cast<Scalar const*>(matrix.data) + first;
    };
    const auto stride = [](const Matrix& matrix) { return Stride{matrix.stride, {}, 0}; };
    const Matrix out{product.out, product.num_columns};
    // Not read where there is none; its descriptor is made all the same.
    const bool has_source = product.source.data != nullptr;
    const Matrix source = has_source ? product.source : out;
    constexpr int kDepth = cute::size<2>(typename Config::TileShape{});
    const DepthTiles tiles = depth_tiles(product.first_depth, product.second_depth, kDepth);

    const int64_t num_rows = product.num_rows, num_columns = product.num_columns;
    const auto fault_of = [&](const Matrix& rows, int64_t first, int64_t depth) {
      return tma_fault({{rows.data, rows.stride, num_rows, depth},
                        {operand(product.weight, first), product.weight.stride, num_columns, depth}},
                       sizeof(Scalar));
    };
    const char* fault =
        tma_fault({{source.data, source.stride, num_rows, num_columns}, {out.data, out.stride, num_rows, num_columns}},
                  sizeof(Residual));
    if (fault == nullptr) {
      fault = fault_of(product.first, 0, product.first_depth);
    }
    if (fault == nullptr && product.second_depth > 0) {
      fault = fault_of(product.second, product.first_depth, product.second_depth);
    }
    if (fault != nullptr) {
      return fault;
    }

    typename Gemm::Arguments arguments;
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {product.num_rows, product.num_columns, (tiles.first + tiles.second) * kDepth, 1};
    arguments.mainloop.first = {operand(product.first), stride(product.first), operand(product.weight),
                                stride(product.weight)};
    arguments.mainloop.second = {operand(product.second), stride(product.second),
                                 operand(product.weight, product.first_depth), stride(product.weight)};
    arguments.mainloop.first_depth = product.first_depth;
    arguments.mainloop.second_depth = product.second_depth;
    arguments.epilogue.thread = {{}, {product.bias}, has_source, product.epilogue};
    arguments.epilogue.ptr_C = static_cast<Residual const*>(source.data);
    arguments.epilogue.dC = stride(source);
    arguments.epilogue.ptr_D = product.out;
    arguments.epilogue.dD = stride(out);
    cudaError_t error = cudaGetDevice(&arguments.hw_info.device_id);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount,
                                     arguments.hw_info.device_id);
    }
    if (error != cudaSuccess) {
      return forget_error(error);
    }

    Gemm gemm;
    if (Gemm::get_workspace_size(arguments) != 0) {
      return "the kernel wants a workspace";
    }
    cutlass::Status status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
      status = gemm.initialize(arguments, nullptr, stream);
    }
    if (status == cutlass::Status::kSuccess) {
      status = gemm.run(stream);
    }
    if (status == cutlass::Status::kSuccess) {
      return nullptr;
    }
    // What the runtime says is more than CUTLASS passes on; asked for, it is also forgotten.
    error = cudaGetLastError();
    return error == cudaSuccess ? cutlassGetStatusString(status) : cudaGetErrorString(error);
  }
};

template <class Config, Element kElement, class Call>
const char* run_tma(const Call& call, cudaStream_t stream) {
  return TmaProduct<Config, ProductOf<kElement, Call>>::run(make_product<kElement>(call), stream);
}

}  // namespace fila
