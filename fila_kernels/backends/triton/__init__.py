"""The `triton` backend: the operation as fused kernels for NVIDIA GPUs; also runs under TRITON_INTERPRET=1.

The operators call `cvfm`, which composes a call from launches. `crop_resize`, `gemm` (with `epilogue`), `pointwise` and
`single_pass` hold kernels, each with its launchers beneath; `primitives` has the device functions that they share,
`configs` the tile shapes, `host` descriptors and the launch itself. All but `configs` import Triton.
"""
