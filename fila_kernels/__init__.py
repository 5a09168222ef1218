"""FILA's ConvNeXt-ViT deep fusion as one operation: crop a feature map, resize, concatenate, MLP, gate, add."""

from fila_kernels import reference
from fila_kernels.functional import crop_resize, cvfm, explain
from fila_kernels.module import CVFM

__all__ = ["crop_resize", "cvfm", "CVFM", "explain", "reference"]
