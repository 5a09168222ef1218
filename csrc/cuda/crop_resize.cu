#include "crop_resize.h"

#include "element.h"
#include "launch.h"

namespace fila {
namespace {

template <typename Scalar, int kWidth>
__global__ void __launch_bounds__(kMostThreads)
    crop_resize_fwd_kernel(FeatureMaps<Scalar> maps, TileBoxes boxes, int64_t size, SampleRows<Scalar> out,
                           LineBlocks blocks) {
  __shared__ PlacedTap taps[kColumns + 1];
  const int lane = threadIdx.x;
  for (int64_t block = blockIdx.x; block < blocks.count(); block += gridDim.x) {
    if (lane <= kColumns) {
      taps[lane] = place_tap(maps, boxes, size, blocks.line(block), blocks.first_column(block), lane);
    }
    __syncthreads();
    gather_share<Scalar, kWidth>(maps, boxes, size, out, blocks, block, taps, lane, blockDim.x);
    __syncthreads();  // the next block's taps take these ones' place
  }
}

template <typename Scalar, int kWidth>
void launch(const FeatureMaps<Scalar>& maps, const TileBoxes& boxes, int64_t size, const SampleRows<Scalar>& out,
            cudaStream_t stream) {
  const LineBlocks blocks{boxes.tiles * size, size, static_cast<int32_t>(maps.channels / kWidth)};
  crop_resize_fwd_kernel<Scalar, kWidth>
      <<<grid_blocks(blocks.count()), blocks.threads(), 0, stream>>>(maps, boxes, size, out, blocks);
  check_launch("crop_resize_fwd_kernel",
               {boxes.tiles, size, maps.images, maps.height, maps.width, maps.channels, kWidth});
}

}  // namespace

template <typename Scalar>
void launch_crop_resize(const FeatureMaps<Scalar>& maps, const TileBoxes& boxes, int64_t size,
                        const SampleRows<Scalar>& out, cudaStream_t stream) {
  if (boxes.tiles == 0 || maps.channels == 0) {
    return;
  }
  constexpr int kWidth = kVectorBytes / sizeof(Scalar);
  if (vector_width<Scalar>({maps.data, out.data}, {maps.stride_image, maps.stride_row, maps.stride_cell, maps.channels,
                                                   out.stride_tile, out.stride_sample}) == kWidth) {
    launch<Scalar, kWidth>(maps, boxes, size, out, stream);
  } else {
    launch<Scalar, 1>(maps, boxes, size, out, stream);
  }
}

template void launch_crop_resize(const FeatureMaps<float>&, const TileBoxes&, int64_t, const SampleRows<float>&,
                                 cudaStream_t);
template void launch_crop_resize(const FeatureMaps<__nv_bfloat16>&, const TileBoxes&, int64_t,
                                 const SampleRows<__nv_bfloat16>&, cudaStream_t);
template void launch_crop_resize(const FeatureMaps<__half>&, const TileBoxes&, int64_t, const SampleRows<__half>&,
                                 cudaStream_t);

}  // namespace fila
