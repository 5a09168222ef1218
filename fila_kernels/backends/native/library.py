"""Loads the compiled library of csrc/, or says why there is none.

After a successful `load` its operators are at `torch.ops.fila`. Only the backend `native` needs them.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).resolve().parents[2] / "lib"
LIBRARY = FOLDER / "libfila_kernels.so"

# What this version calls; a library built from older sources lacks some of it.
OPERATORS = ("build_info", "crop_resize", "crop_resize_backward", "cvfm", "cvfm_forward", "gate_backward")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@cache
def load() -> tuple[bool, str]:
    """Load the native library once per process and return `(loaded, reason)`; it never raises."""
    if not LIBRARY.exists():
        note = FOLDER / "not_built.txt"
        reason = note.read_text().strip() if note.exists() else f"{LIBRARY} does not exist; install with a C++ compiler"
        return False, f"not built: {reason}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return False, f"built, but torch {torch.__version__} cannot load it: {error}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.fila, name)]
    if missing:
        return False, f"{LIBRARY} was built from older sources and lacks {', '.join(missing)}; install again"
    torch.library.register_fake("fila::crop_resize", _crop_resize_fake)
    torch.library.register_fake("fila::crop_resize_backward", _crop_resize_backward_fake)
    torch.library.register_fake("fila::cvfm", _cvfm_forward_fake)
    torch.library.register_fake("fila::cvfm_forward", _cvfm_forward_fake)
    torch.library.register_fake("fila::gate_backward", _gate_backward_fake)
    return True, f"loaded {LIBRARY}"


class Build(NamedTuple):
    """The settings that the library was built with, as it reports them."""

    architectures: tuple[str, ...]  # of its CUDA kernels, such as "9.0a"; empty without them
    toolkit: str  # the CUDA compiler's version
    without_cuda: str  # why it has no CUDA kernels

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability executes what was compiled."""
        return any(_runs_on(name, capability) for name in self.architectures)


@cache
def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Code for 8.0 runs on all of 8.x from there on, that for 9.0a on 9.0 alone; "+PTX" on whatever came later, too."""
    number, _, ptx = architecture.partition("+")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number[-1] == "a":
        return capability == (major, minor)
    later = ptx and number[-1].isdigit() and capability >= (major, minor)
    return bool(later) or (capability[0] == major and capability[1] >= minor)


def build() -> Build | None:
    """The build of the library that `load` found; None where it did not load."""
    return _read_build() if load()[0] else None


@cache
def _read_build() -> Build:
    values = dict(line.split("=", 1) for line in torch.ops.fila.build_info().splitlines())
    return Build(tuple(values["cuda"].split()), values["toolkit"], values["without_cuda"])


def describe_cuda() -> str:
    """The library's CUDA kernels in a few words, or why there are none."""
    found = build()
    return f"no CUDA kernels: the native library is {load()[1]}" if found is None else _describe(found)


@cache
def _describe(found: Build) -> str:
    if not found.architectures:
        return f"no CUDA kernels in the native library: {found.without_cuda}"
    return f"CUDA kernels for {', '.join(found.architectures)}, compiled by nvcc {found.toolkit}"


def _on_one_device(*tensors: object) -> None:
    """A meta tensor among real ones brings a call here, where it would return memory that nobody writes."""
    devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")


def _crop_resize_fake(features, boxes, image_index, size, *, check_values=True):  # type: ignore[no-untyped-def]
    _on_one_device(features, boxes, image_index)
    return features.new_empty(boxes.shape[0], size, size, features.shape[3])


def _crop_resize_backward_fake(grad, boxes, image_index, images, height, width, *, check_values=True):  # type: ignore[no-untyped-def]
    _on_one_device(grad, boxes, image_index)
    return grad.new_empty(images, height, width, grad.shape[3])


def _cvfm_forward_fake(tokens, *arguments, **settings):  # type: ignore[no-untyped-def]
    _on_one_device(tokens, *arguments, *settings.values())
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _gate_backward_fake(grad, branch, alpha, out):  # type: ignore[no-untyped-def]
    _on_one_device(grad, branch, alpha, out)
    return grad.new_empty(1, dtype=torch.float64)
