// The products on architectures without TMA, by cp.async and warp-level tensor cores: CUTLASS's multistage main loop
// with iterators that walk through two operands, and its visitors around an epilogue of ours.

#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
// After what it stands on.
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include <cute/tensor.hpp>

#include "epilogue.h"
#include "launch.h"
#include "two_operand_iterator.h"

namespace fila {

template <class Mma>
struct TwoOperandMma;

template <class Shape, class IteratorA, class SmemA, cutlass::arch::CacheOperation::Kind kCacheA, class IteratorB,
          class SmemB, cutlass::arch::CacheOperation::Kind kCacheB, class Accumulator, class Layout, class Policy,
          int kStages, cutlass::gemm::SharedMemoryClearOption kClear>
struct TwoOperandMma<cutlass::gemm::threadblock::MmaMultistage<Shape, IteratorA, SmemA, kCacheA, IteratorB, SmemB,
                                                               kCacheB, Accumulator, Layout, Policy, kStages, kClear>> {
  using Type = cutlass::gemm::threadblock::MmaMultistage<Shape, TwoOperandIterator<IteratorA>, SmemA, kCacheA,
                                                         TwoOperandIterator<IteratorB>, SmemB, kCacheB, Accumulator,
                                                         Layout, Policy, kStages, kClear>;
};

// The source operand, read where there is one.
template <class Base>
struct OptionalLoad : Base {
  using Base::Base;

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    CUTLASS_DEVICE explicit Callbacks(BaseCallbacks const& base) : BaseCallbacks(base) {}

    CUTLASS_DEVICE void begin_step(int step) {
      if (this->params_ptr->ptr_aux != nullptr) {
        BaseCallbacks::begin_step(step);
      }
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto base = Base::get_callbacks(tile, thread, shape);
    return Callbacks<cute::remove_cvref_t<decltype(base)>>(base);
  }
};

// Accumulator, bias and source to the result; and Z or M to the rows of samples.
template <class ThreadMap, typename Scalar, typename Residual, class Epilogue>
struct RowVisitor2x : cutlass::epilogue::threadblock::VisitorImpl2x<> {
  using Arguments = Epilogue;
  using Params = Epilogue;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE RowVisitor2x() {}
  CUTLASS_HOST_DEVICE RowVisitor2x(Params const& epilogue, SharedStorage const&) : epilogue(&epilogue) {}

  Epilogue const* epilogue = nullptr;

  // `coordinates` [VECTOR, COLUMN, ROW, ITERATION] of this thread's elements.
  template <class Coordinates, class ProblemShape>
  struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Epilogue const& epilogue, Coordinates coordinates, ProblemShape shape)
        : epilogue(epilogue), layer(epilogue.layer()), coordinates(coordinates), shape(shape) {}

    Epilogue const& epilogue;
    decltype(epilogue.layer()) layer;
    Coordinates coordinates;
    ProblemShape shape;

    template <typename Sum, typename Bias, typename Source, int kSize>
    CUTLASS_DEVICE cutlass::Array<Residual, kSize> visit(int iteration, int row, int column, int,
                                                         cutlass::Array<Sum, kSize> const&,
                                                         cutlass::Array<Sum, kSize> const& sum,
                                                         cutlass::Array<Bias, kSize> const& bias,
                                                         cutlass::Array<Source, kSize> const& source) {
      const auto at = coordinates(cute::_0{}, column, row, iteration);
      const Token token = token_of(cute::get<0>(at), epilogue.rows);
      cutlass::AlignedArray<Scalar, kSize> kept;
      cutlass::Array<Residual, kSize> result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const float operand = static_cast<float>(source[i]);
        const float value = layer.keep(sum[i], static_cast<float>(bias[i]), operand);
        kept[i] = static_cast<Scalar>(value);
        result[i] = static_cast<Residual>(layer.finish(value, operand, is_patch(token)));
      }
      if (epilogue.kept != nullptr && is_patch(token) && cute::elem_less(at, shape)) {
        Scalar* target = epilogue.kept + sample_of(token, epilogue.rows) * epilogue.width + cute::get<1>(at);
        *reinterpret_cast<cutlass::AlignedArray<Scalar, kSize>*>(target) = kept;
      }
      return result;
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto coordinates =
        cute::group_modes<3, 6>(ThreadMap::partition(cute::make_identity_tensor(shape), thread, tile));
    return Callbacks<cute::remove_cvref_t<decltype(coordinates)>, ProblemShape>(*epilogue, coordinates, shape);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    sm80_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) char storage[];
  Kernel::run_block(params, *reinterpret_cast<typename Kernel::SharedStorage*>(storage));
}

// Blocks of four warps, two to a multiprocessor: the epilogue of one hides behind the other's products. Columns go
// fastest, so that blocks that run together share rows, and the weight stays in the second-level cache.
template <class Product>
struct Sm80Product {
  using Scalar = typename Product::Scalar;
  using Residual = typename Product::Residual;
  using Epilogue = typename Product::Epilogue;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using TileShape = cutlass::gemm::GemmShape<128, 128, 32>;
  using WarpShape = cutlass::gemm::GemmShape<64, 64, 32>;
  using InstructionShape = cutlass::gemm::GemmShape<16, 8, 16>;
  static constexpr int kStages = 4;
  static constexpr int kThreads = 128;

  using Default = typename cutlass::gemm::kernel::DefaultGemmUniversal<
      Scalar, RowMajor, cutlass::ComplexTransform::kNone, kAlignment, Scalar, ColumnMajor,
      cutlass::ComplexTransform::kNone, kAlignment, Residual, RowMajor, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, TileShape, WarpShape, InstructionShape,
      cutlass::epilogue::thread::LinearCombination<Residual, Product::kResidualAlignment, float, float>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, kStages, cutlass::arch::OpMultiplyAdd>::GemmKernel;
  using Mma = typename TwoOperandMma<typename Default::Mma>::Type;
  using OperandA = typename Mma::IteratorA::Operand;
  using OperandB = typename Mma::IteratorB::Operand;

  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<TileShape, WarpShape, Residual,
                                                                           Product::kResidualAlignment>;
  using Stride = cute::Stride<int64_t, cute::_1, cute::_0>;
  using Bias = cutlass::epilogue::threadblock::VisitorRowBroadcast<ThreadMap, Scalar,
                                                                   cute::Stride<cute::_0, cute::_1, cute::_0>>;
  using Source = OptionalLoad<cutlass::epilogue::threadblock::VisitorAuxLoad<ThreadMap, Residual, Stride>>;
  using Visitor = cutlass::epilogue::threadblock::Sm80EVT<
      cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Residual, cutlass::FloatRoundStyle::round_to_nearest,
                                                      Stride>,
      cutlass::epilogue::threadblock::Sm80EVT<RowVisitor2x<ThreadMap, Scalar, Residual, Epilogue>,
                                              cutlass::epilogue::threadblock::VisitorAccFetch, Bias, Source>>;
  using BlockEpilogue =
      cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<typename Default::Epilogue, Visitor, 1>;
  using ProblemShape = cute::Shape<int32_t, int32_t, int32_t>;

  struct Params {
    ProblemShape shape;
    DepthTiles depth;
    int column_tiles;
    OperandA first, second;
    OperandB first_weight, second_weight;
    typename Visitor::Params visitor;
  };

  union SharedStorage {
    typename Mma::SharedStorage main_loop;
    typename BlockEpilogue::SharedStorage epilogue;
  };

  static CUTLASS_DEVICE void run_block(Params const& params, SharedStorage& storage) {
    const int thread = threadIdx.x, warp = cutlass::canonical_warp_idx_sync(), lane = thread % 32;
    const int tile_m = blockIdx.x / params.column_tiles, tile_n = blockIdx.x % params.column_tiles;

    const int turn = turn_after(params.depth);
    typename Mma::IteratorA rows(params.first, params.second, turn, thread, {tile_m * TileShape::kM, 0});
    typename Mma::IteratorB columns(params.first_weight, params.second_weight, turn, thread,
                                    {0, tile_n * TileShape::kN});
    typename Mma::FragmentC sums;
    sums.clear();
    Mma mma(storage.main_loop, thread, warp, lane);
    mma(params.depth.first + params.depth.second, sums, rows, columns, sums);

    BlockEpilogue epilogue(params.visitor, storage.epilogue, thread, warp, lane);
    epilogue(sums, {tile_m, tile_n, 0}, params.shape, thread);
  }

  static const char* run(const Product& product, cudaStream_t stream) {
    const auto pointer = [](const Matrix& matrix, int64_t first = 0) {
      return const_cast<Scalar*>(static_cast<Scalar const*>(matrix.data)) + first;
    };
    const auto rows = [&](const Matrix& matrix, int depth) {
      return OperandA{{RowMajor(matrix.stride)}, pointer(matrix), {product.num_rows, depth}};
    };
    const auto columns = [&](int first, int depth) {
      return OperandB{
          {ColumnMajor(product.weight.stride)}, pointer(product.weight, first), {depth, product.num_columns}};
    };
    const int row_tiles = cutlass::ceil_div(product.num_rows, TileShape::kM);
    const int column_tiles = cutlass::ceil_div(product.num_columns, TileShape::kN);
    const ProblemShape shape{product.num_rows, product.num_columns, 1};
    Residual* source = const_cast<Residual*>(static_cast<Residual const*>(product.source.data));
    typename Visitor::Arguments visitor{
        {{}, {product.bias}, {source, Residual(0), {product.source.stride, {}, {}}}, product.epilogue},
        {product.out, {product.num_columns, {}, {}}}};
    const Params params{shape,
                        depth_tiles(product.first_depth, product.second_depth, TileShape::kK),
                        column_tiles,
                        rows(product.first, product.first_depth),
                        rows(product.second, product.second_depth),
                        columns(0, product.first_depth),
                        columns(product.first_depth, product.second_depth),
                        Visitor::to_underlying_arguments(shape, visitor, nullptr)};

    constexpr int kBytes = sizeof(SharedStorage);
    const auto kernel = sm80_kernel<Sm80Product>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (status == cudaSuccess) {
      kernel<<<row_tiles * column_tiles, kThreads, kBytes, stream>>>(params);
      status = cudaGetLastError();
    }
    return forget_error(status);
  }
};

template <Element kElement, class Call>
const char* run_sm80(const Call& call, cudaStream_t stream) {
  return Sm80Product<ProductOf<kElement, Call>>::run(make_product<kElement>(call), stream);
}

}  // namespace fila
