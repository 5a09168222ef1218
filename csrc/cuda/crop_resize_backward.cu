#include "crop_resize.h"
#include "element.h"
#include "launch.h"

namespace fila {
namespace {

__global__ void __launch_bounds__(kMostThreads) crop_tables_kernel(CropTables tables, TileBoxes boxes) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t entry = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; entry < tables.entries(); entry += step) {
    fill_entry(tables, boxes, entry);
  }
}

template <typename Scalar, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 4)
    crop_resize_bwd_kernel(SampleGradients<Scalar> grad, CropTables tables, Scalar* out, LineBlocks blocks) {
  for (int64_t block = blockIdx.x; block < blocks.count(); block += gridDim.x) {
    sum_share<Scalar, kWidth>(grad, tables, out, blocks, block, threadIdx.x, blockDim.x);
  }
}

template <typename Scalar, int kWidth>
void launch(const SampleGradients<Scalar>& grad, const CropTables& tables, Scalar* out, cudaStream_t stream) {
  const LineBlocks blocks{tables.images * tables.height, tables.width, static_cast<int32_t>(grad.channels / kWidth)};
  crop_resize_bwd_kernel<Scalar, kWidth>
      <<<grid_blocks(blocks.count()), blocks.threads(), 0, stream>>>(grad, tables, out, blocks);
  check_launch("crop_resize_bwd_kernel",
               {tables.tiles, tables.size, tables.images, tables.height, tables.width, grad.channels, kWidth});
}

}  // namespace

template <typename Scalar>
void launch_crop_resize_backward(const SampleGradients<Scalar>& grad, const TileBoxes& boxes, const CropTables& tables,
                                 Scalar* out, cudaStream_t stream) {
  if (tables.images == 0 || tables.height == 0 || tables.width == 0 || grad.channels == 0) {
    return;
  }
  const int64_t blocks = (tables.entries() + kMostThreads - 1) / kMostThreads;
  crop_tables_kernel<<<grid_blocks(blocks), kMostThreads, 0, stream>>>(tables, boxes);
  check_launch("crop_tables_kernel", {tables.tiles, tables.size, tables.images, tables.height, tables.width});
  constexpr int kWidth = kVectorBytes / sizeof(Scalar);
  if (vector_width<Scalar>({grad.data, out}, {grad.stride_tile, grad.stride_line, grad.stride_sample, grad.channels}) ==
      kWidth) {
    launch<Scalar, kWidth>(grad, tables, out, stream);
  } else {
    launch<Scalar, 1>(grad, tables, out, stream);
  }
}

template void launch_crop_resize_backward(const SampleGradients<float>&, const TileBoxes&, const CropTables&, float*,
                                          cudaStream_t);
template void launch_crop_resize_backward(const SampleGradients<__nv_bfloat16>&, const TileBoxes&, const CropTables&,
                                          __nv_bfloat16*, cudaStream_t);
template void launch_crop_resize_backward(const SampleGradients<__half>&, const TileBoxes&, const CropTables&, __half*,
                                          cudaStream_t);

}  // namespace fila
