"""The `triton` backend: the operation as fused kernels for NVIDIA GPUs; also runs under TRITON_INTERPRET=1.

`launch` holds what the operators call, `forward`, `backward` and `crop_resize` the kernels, `primitives` what these
share, and `configs` the tile shapes with the one predicate that says where each can run.
"""
