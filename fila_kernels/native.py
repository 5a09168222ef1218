"""The compiled library of csrc/: where it is, whether it loads, and if not, why.

After a successful `load` its operators are at `torch.ops.fila`. Nothing in the package needs them to be there.
"""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "lib"
LIBRARY = FOLDER / "libfila_kernels.so"


@cache
def load() -> tuple[bool, str]:
    """Load the native library once a process and return `(loaded, reason)`; it never raises."""
    if not LIBRARY.exists():
        note = FOLDER / "not_built.txt"
        reason = note.read_text().strip() if note.exists() else f"{LIBRARY} does not exist; install with a C++ compiler"
        return False, f"not built: {reason}"

    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return False, f"built, but torch {torch.__version__} cannot load it: {error}"
    torch.library.register_fake("fila::crop_resize", _crop_resize_fake)
    return True, f"loaded {LIBRARY}"


def _crop_resize_fake(features, boxes, image_index, size):  # type: ignore[no-untyped-def]
    return features.new_empty(boxes.shape[0], size, size, features.shape[3])
