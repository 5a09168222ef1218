"""Makes the weight gradient of a depthwise 7 x 7 convolution fast on a CPU; the convolution itself stays as it is.

oneDNN takes 15 to 40 times as long for it as for the forward pass. Here 16 channels at a time keep one row of the
kernel's gradient in registers while they walk along a row of the picture. The function is compiled when training
starts; without a compiler the library's gradient is taken, in float32.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as gradients

SIDE = 7
LANES = 16  # channels that are summed at once
SOURCE = r"""
// x [n, h + 6, w + 6, c] and g [n, h, w, c], float32: out [7, 7, c] += sum over n, y, x of shifted x times g.
extern "C" void weight_gradient(const float* x, const float* g, float* out, long n, long h, long w, long c) {
  typedef float lanes __attribute__((vector_size(64), aligned(4)));
  for (long k = 0; k < c; k += 16)
    for (long b = 0; b < n; b++)
      for (long y = 0; y < h; y++)
        for (long i = 0; i < 7; i++) {
          lanes sum[7] = {};
          const float* from = x + ((b * (h + 6) + y + i) * (w + 6)) * c + k;
          const float* by = g + ((b * h + y) * w) * c + k;
          for (long u = 0; u < w; u++) {
            lanes v = *(const lanes*)(by + u * c);
            for (long j = 0; j < 7; j++) sum[j] += v * *(const lanes*)(from + (u + j) * c);
          }
          for (long j = 0; j < 7; j++) *(lanes*)(out + (i * 7 + j) * c + k) += sum[j];
        }
}
"""


@cache
def compiled() -> Any:
    """The function above, or None without a compiler."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="fila-nano-") as folder:  # a loaded library may be unlinked
        source, library = Path(folder, "depthwise.cpp"), Path(folder, "depthwise.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        if subprocess.run([*compiler, *flags, "-o", library, source], capture_output=True).returncode:
            return None
        function = ctypes.CDLL(str(library)).weight_gradient
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 4
    function.restype = None
    return function


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient [C, 1, 7, 7] of a depthwise 7 x 7 convolution of x [n, C, h, w], padded by 3, from its output's."""
    channels = x.shape[1]
    if channels % LANES or compiled() is None:
        shape = (channels, 1, SIDE, SIDE)
        return gradients.conv2d_weight(x.float(), shape, grad.float(), padding=SIDE // 2, groups=channels)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 3, 3, 3, 3)).float().contiguous()
    grad = grad.permute(0, 2, 3, 1).float().contiguous()
    out = torch.zeros(SIDE, SIDE, channels)
    compiled()(padded.data_ptr(), grad.data_ptr(), out.data_ptr(), *grad.shape)
    return out.permute(2, 0, 1).unsqueeze(1)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=SIDE // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        back = gradients.conv2d_input(x.shape, weight, grad, padding=SIDE // 2, groups=len(weight))
        return back, weight_gradient(x, grad).to(weight.dtype), grad.sum((0, 2, 3))


class DepthwiseConv(nn.Conv2d):
    """A depthwise 7 x 7 convolution with the gradient above, for training under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        assert self.bias is not None
        return _Depthwise.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def quicken(model: nn.Module) -> None:
    """Gives every depthwise 7 x 7 convolution of the model the fast gradient; weights and results stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (SIDE, SIDE) and module.groups == module.in_channels:
            module.__class__ = DepthwiseConv
