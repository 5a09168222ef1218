"""FILA's ConvNeXt-ViT deep fusion as one operation: crop a feature map, resize, concatenate, MLP, gate, add."""

from fila_kernels import reference
from fila_kernels.functional import crop_resize, cvfm, explain
from fila_kernels.module import CVFM
from fila_kernels.validation import check_gpu_values

__all__ = ["check_gpu_values", "crop_resize", "cvfm", "CVFM", "explain", "reference"]
