"""How much memory one call needs beyond what was there, and how much of it waits for the backward pass.

On a CPU the meter is the kernel's VmHWM, reset through /proc/self/clear_refs: it counts every allocator alike (torch's,
oneDNN's scratch, calloc) and only pages that are touched, on Linux only. On a GPU it is the peak of torch's allocator.
"""

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

METERS = {
    "cpu": "growth of VmHWM over one call after clear_refs, bytes",
    "cuda": "growth of the allocator's peak over one call, bytes",
}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which `call` lifts the peak, its results included."""
    call()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del kept
        return peak - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def kept_for_backward(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd holds between a forward pass and its backward pass, beside the inputs and the result."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in (*inputs, out):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())
